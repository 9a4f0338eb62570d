"""Writes a model whose attention and output are softmax as a checkpoint of fairseq's own Transformer.

    python scripts/to_stock.py runs/softmax/checkpoint_best.pt --output stock.pt

Whatever reads fairseq's checkpoints takes the result: fairseq without --user-dir, CTranslate2 and other converters.
The weights stay as they are; the state of the optimizer is left out.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any, Dict

import torch

from multimax_fairseq import tools
from multimax_fairseq.models import MappingOptions

PREFIX = "multimax_"
STOCK = {"attention_mapping": "softmax", "attention_scale": "none", "output_mapping": "softmax"}


def to_stock(checkpoint: Dict[str, Any], path: Path) -> Dict[str, Any]:
    """The checkpoint of the same model in fairseq's own architecture.

    Raises:
        UserError: it is of no model of this plugin, or of one that fairseq cannot compute.
    """
    model = checkpoint["cfg"]["model"]
    fields = vars(model) if isinstance(model, Namespace) else model
    name = str(fields.get("arch") or fields.get("_name"))
    if not name.startswith(PREFIX):
        raise tools.UserError(f"{path} is of {name}, not of an architecture of this plugin ({PREFIX}…)")
    for field, stock in STOCK.items():
        if fields[field] != stock:
            flag = f"--{field.replace('_', '-')} {fields[field]}"
            raise tools.UserError(f"{path} was trained with {flag}, which fairseq's own models do not have")
    ours = {key for key in MappingOptions.__dataclass_fields__ if not key.startswith("_")}
    stock_fields = {key: value for key, value in fields.items() if key not in ours}
    for key in ("arch", "_name"):
        if stock_fields.get(key):
            stock_fields[key] = stock_fields[key].removeprefix(PREFIX)
    if "user_dir" in stock_fields:
        stock_fields["user_dir"] = None
    cfg = {**checkpoint["cfg"], "model": Namespace(**stock_fields) if isinstance(model, Namespace) else stock_fields}
    cfg["common"] = {**cfg["common"], "user_dir": None}
    if cfg["criterion"]["_name"] == "chunked_cross_entropy":  # the same number
        cfg["criterion"] = {**cfg["criterion"], "_name": "label_smoothed_cross_entropy"}
        cfg["criterion"].pop("chunk_tokens")
    return {**checkpoint, "cfg": cfg, "last_optimizer_state": None}


def main() -> None:
    parser = tools.ArgumentParser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="trained with --attention-mapping softmax")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint for fairseq")
    args = parser.parse_args()
    with tools.errors_in_a_line():
        tools.check_output(args.output)
        stock = to_stock(tools.read_checkpoint(args.checkpoint), args.checkpoint)
        with tools.replacing(args.output) as file:
            torch.save(stock, file)
    print(args.output)


if __name__ == "__main__":
    main()
