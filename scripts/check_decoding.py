"""Does a trained translation model decode with the probabilities that it was trained with?

    python scripts/check_decoding.py --path runs/demo/checkpoint_best.pt demo/grammar/data-bin

Decodes target sentences of a split twice: all at once, as in training, and step by step with the cache, as in beam
search. Prints the largest difference between log-probabilities. Each source has two targets, its own and the next
one's, which swap places on the way, as hypotheses in a beam do.
"""

import math
from pathlib import Path
from typing import Dict

import torch
from fairseq.models import BaseFairseqModel
from torch import Tensor

from multimax_fairseq.analysis.checkpoint import batches, fitting, load_model, load_split
from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line, positive

MAX_TOKENS = 600  # in a batch


def log_softmax(logits: Tensor) -> Tensor:
    """In fp32, as in fairseq; in fp64 for fp64 logits."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def largest_difference(model: BaseFairseqModel, net_input: Dict[str, Tensor]) -> float:
    """max |log p(step by step) − log p(all at once)| over a batch's tokens and the vocabulary, in nats; infinite if
    one is NaN."""
    number = torch.arange(net_input["src_tokens"].size(0))
    twice = number.repeat_interleave(2)
    targets = torch.stack([number, number.roll(-1)], dim=1).flatten()
    swapped = torch.arange(len(twice)).view(-1, 2).flip(1).flatten()
    tokens = net_input["prev_output_tokens"][targets]
    encoder_out = model.encoder(net_input["src_tokens"][twice], net_input["src_lengths"][twice])

    full = log_softmax(model.decoder(tokens, encoder_out=encoder_out)[0])
    largest, incremental_state = 0.0, {}
    for step in range(tokens.size(1)):
        if step % 3 == 2:
            model.decoder.reorder_incremental_state_scripting(incremental_state, swapped)
            tokens, full = tokens[swapped], full[swapped]
        output = model.decoder(tokens[:, : step + 1], encoder_out=encoder_out, incremental_state=incremental_state)
        difference = (log_softmax(output[0])[:, 0] - full[:, step]).abs().amax(dim=1)
        of_tokens = difference[tokens[:, step] != model.decoder.padding_idx].tolist()
        largest = max([largest, *(math.inf if math.isnan(nats) else nats for nats in of_tokens)])
    return largest


def check(checkpoint: Path, data: Path, split: str, sentences: int, fp64: bool) -> float:
    """:func:`largest_difference` over the first sentences of a split.

    Raises:
        UserError: a file is missing or damaged, the model does not translate, or its probabilities are not finite.
    """
    model, _, task = load_model(checkpoint, data)
    if not hasattr(model, "encoder") or not hasattr(model, "decoder"):
        raise UserError(f"{checkpoint} is no translation model: there is no beam search to compare with")
    model = model.double() if fp64 else model
    dataset = load_split(task, data, split, sentences)
    indices = fitting(task, dataset, range(len(dataset))[:sentences], [model], f"the split {split!r} of {data}")
    largest = 0.0
    for batch in batches(dataset, indices, MAX_TOKENS, torch.device("cpu")):
        largest = max(largest, largest_difference(model, batch["net_input"]))
    if not math.isfinite(largest):
        raise UserError(f"{checkpoint} computes NaN or infinity on sentences of {split!r}: its training has diverged")
    return largest


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("data_bin", type=Path)
    parser.add_argument("--path", type=Path, required=True, help="the checkpoint")
    parser.add_argument("--split", default="test")
    parser.add_argument("--sentences", type=positive, default=100)
    parser.add_argument("--fp64", action="store_true", help="compute in fp64: tells rounding from another model")
    args = parser.parse_args()
    with errors_in_a_line():
        largest = check(args.path, args.data_bin, args.split, args.sentences, args.fp64)
    print(f"{args.path}: largest difference {largest:.2e} nat")


if __name__ == "__main__":
    main()
