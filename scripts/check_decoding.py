"""Does a trained translation model decode with the probabilities that it was trained with?

    python scripts/check_decoding.py --path runs/demo/checkpoint_best.pt demo/grammar/data-bin

Takes target sentences of a split through the decoder twice: all at once, as training does, and step by step with
the cache, as beam search does, and prints the largest difference between log-probabilities. Each source has two
targets, its own and the next one's, which change places on the way, as the hypotheses of a beam do.
"""

import argparse
import sys
from pathlib import Path
from typing import Dict

import torch
from fairseq import checkpoint_utils, utils
from fairseq.models import BaseFairseqModel
from torch import Tensor

import multimax_fairseq.models  # noqa: F401  registers the models, and lets torch load fairseq's checkpoints


def log_softmax(logits: Tensor) -> Tensor:
    """In fp32, as fairseq has it, or in fp64 if the logits are."""
    return logits.log_softmax(-1) if logits.dtype == torch.float64 else utils.log_softmax(logits, dim=-1)


@torch.no_grad()
def largest_difference(model: BaseFairseqModel, net_input: Dict[str, Tensor]) -> float:
    """max |log p(step by step) − log p(all at once)| over the tokens of a batch and the vocabulary, in nats."""
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
        largest = max([largest, *difference[tokens[:, step] != model.decoder.padding_idx].tolist()])
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_bin", type=Path)
    parser.add_argument("--path", required=True, help="the checkpoint")
    parser.add_argument("--split", default="test")
    parser.add_argument("--sentences", type=int, default=100)
    parser.add_argument("--fp64", action="store_true", help="compute in fp64: tells rounding from another model")
    args = parser.parse_args()
    if not args.data_bin.is_dir():
        sys.exit(f"ERROR: there is no folder {args.data_bin}")
    if not Path(args.path).is_file():
        sys.exit(f"ERROR: there is no file {args.path}")

    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [args.path], arg_overrides={"data": str(args.data_bin)}
    )
    model = model.double().eval() if args.fp64 else model.eval()
    task.load_dataset(args.split)
    dataset = task.dataset(args.split)
    largest = 0.0
    for start in range(0, min(args.sentences, len(dataset)), 20):
        indices = range(start, min(start + 20, args.sentences, len(dataset)))
        batch = dataset.collater([dataset[index] for index in indices])
        largest = max(largest, largest_difference(model, batch["net_input"]))
    print(f"{args.path}: largest difference {largest:.2e} nat")


if __name__ == "__main__":
    main()
