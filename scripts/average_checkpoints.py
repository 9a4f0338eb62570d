"""Averages checkpoints' parameters into one checkpoint that fairseq-generate and fairseq-eval-lm can load.

    python scripts/average_checkpoints.py --last 5 runs/demo --output runs/demo/average.pt
    python scripts/average_checkpoints.py runs/demo/checkpoint8.pt runs/demo/checkpoint9.pt --output average.pt

Everything else (configuration, training state) comes from the last input.
"""

import re
from pathlib import Path
from typing import Any, Dict, List

import torch
from torch import Tensor

from multimax_fairseq import tools


def last_epochs(folder: Path, count: int) -> List[Path]:
    """The ``count`` newest ``checkpoint<epoch>.pt`` of a folder, or all if there are fewer, oldest first.

    Raises:
        UserError: there is none.
    """
    matches = (re.fullmatch(r"checkpoint(\d+)\.pt", path.name) for path in folder.glob("checkpoint*.pt"))
    epochs = sorted(int(match[1]) for match in matches if match)
    if not epochs:
        raise tools.UserError(f"{folder} has no checkpoint of a whole epoch: train without --no-epoch-checkpoints "
                              f"and with --keep-last-epochs {count} or more")
    return [folder / f"checkpoint{epoch}.pt" for epoch in epochs[-count:]]


def average(paths: List[Path]) -> Dict[str, Any]:
    """The last checkpoint with the mean of all parameters, computed in fp64, stored in each parameter's own dtype.

    Raises:
        UserError: one is no checkpoint, or their parameters differ in name or shape.
    """
    total: Dict[str, Tensor] = {}
    for path in paths:
        checkpoint = tools.read_checkpoint(path)
        parameters = checkpoint["model"]
        total = total or {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parameters.items()}
        shapes, others = ({name: tensor.shape for name, tensor in part.items()} for part in (total, parameters))
        different = sorted(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
        if different:
            differ = ", ".join(different[:3])
            raise tools.UserError(f"{path} is of another model than {paths[0]}: they differ in {differ}")
        for name, tensor in parameters.items():
            total[name] += tensor
    checkpoint["model"] = {name: (total[name] / len(paths)).to(tensor.dtype) for name, tensor in parameters.items()}
    return checkpoint


def main() -> None:
    parser = tools.ArgumentParser(__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, help="checkpoints, or with --last one folder of them")
    parser.add_argument("--last", type=tools.positive, metavar="N",
                        help="take the last N epochs of the folder, or as many as there are")
    parser.add_argument("--output", type=Path, required=True, help="the averaged checkpoint")
    args = parser.parse_args()
    with tools.errors_in_a_line():
        if args.last and (len(args.inputs) != 1 or not args.inputs[0].is_dir()):
            raise tools.UserError("--last goes with one folder")
        tools.check_output(args.output)
        paths = last_epochs(args.inputs[0], args.last) if args.last else args.inputs
        averaged = average(paths)
        with tools.replacing(args.output) as file:
            torch.save(averaged, file)
    print(f"averaged {', '.join(path.name for path in paths)} into {args.output}")


if __name__ == "__main__":
    main()
