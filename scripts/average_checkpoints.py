"""Averages the parameters of checkpoints into one that fairseq-generate and fairseq-eval-lm can load.

    python scripts/average_checkpoints.py --last 5 runs/demo --output runs/demo/average.pt
    python scripts/average_checkpoints.py runs/demo/checkpoint8.pt runs/demo/checkpoint9.pt --output average.pt

Everything but the parameters (configuration, training state) is that of the last input.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, List

import torch
from torch import Tensor

import multimax_fairseq.models  # noqa: F401  lets torch load fairseq's checkpoints


def last_epochs(folder: Path, count: int) -> List[Path]:
    """The ``count`` newest ``checkpoint<epoch>.pt`` of a folder, oldest first.

    Raises:
        ValueError: there are fewer of them.
    """
    by_epoch = {}
    for path in folder.glob("checkpoint*.pt"):
        match = re.fullmatch(r"checkpoint(\d+)\.pt", path.name)
        if match:
            by_epoch[int(match[1])] = path
    if len(by_epoch) < count:
        raise ValueError(
            f"{folder} holds {len(by_epoch)} checkpoints of whole epochs, not {count}: train without "
            f"--no-epoch-checkpoints and with --keep-last-epochs {count} or more"
        )
    return [by_epoch[epoch] for epoch in sorted(by_epoch)[-count:]]


def average(paths: List[Path]) -> Dict[str, Any]:
    """The last checkpoint with the mean of the parameters of all: taken in fp64, in each parameter's own dtype.

    Raises:
        ValueError: the checkpoints do not have the same parameters, of the same shapes.
    """
    total: Dict[str, Tensor] = {}
    for path in paths:
        checkpoint = torch.load(path, map_location="cpu")
        parameters = checkpoint["model"]
        total = total or {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parameters.items()}
        different = [
            name
            for name in sorted({*total, *parameters})
            if name not in total or name not in parameters or total[name].shape != parameters[name].shape
        ]
        if different:
            raise ValueError(f"{path} is of another model than {paths[0]}: they differ in {', '.join(different[:3])}")
        for name, tensor in parameters.items():
            total[name] += tensor
    checkpoint["model"] = {name: (total[name] / len(paths)).to(tensor.dtype) for name, tensor in parameters.items()}
    return checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, help="checkpoints, or with --last one folder of them")
    parser.add_argument("--last", type=int, metavar="N", help="take the last N epochs of the folder")
    parser.add_argument("--output", type=Path, required=True, help="the averaged checkpoint")
    args = parser.parse_args()
    try:
        if args.last is not None and (args.last < 1 or len(args.inputs) != 1 or not args.inputs[0].is_dir()):
            raise ValueError("--last takes a number of at least 1, and one folder")
        paths = args.inputs if args.last is None else last_epochs(args.inputs[0], args.last)
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise ValueError(f"no such file: {', '.join(missing)}")
        averaged = average(paths)
    except ValueError as error:
        sys.exit(f"ERROR: {error}")
    part = args.output.with_name(args.output.name + ".part")
    torch.save(averaged, part)
    os.replace(part, args.output)
    print(f"averaged {', '.join(path.name for path in paths)} into {args.output}")


if __name__ == "__main__":
    main()
