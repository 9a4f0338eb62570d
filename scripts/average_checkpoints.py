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
from typing import Dict, List

import torch
from fairseq import checkpoint_utils
from torch import Tensor

import multimax_fairseq  # noqa: F401  registers the models, and lets torch load fairseq's checkpoints


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


def average(states: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
    """The mean of each parameter, taken in fp64 and returned in the parameter's own dtype.

    Raises:
        ValueError: the state dicts do not have the same parameters, of the same shapes.
    """
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    for number, other in enumerate(shapes[1:], start=2):
        different = sorted(name for name in {*shapes[0], *other} if shapes[0].get(name) != other.get(name))
        if different:
            raise ValueError(
                f"input {number} is of another model than the first: they differ in {', '.join(different[:3])}"
            )
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(tensor.dtype)
        for name, tensor in states[-1].items()
    }


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
        checkpoints = [checkpoint_utils.load_checkpoint_to_cpu(str(path)) for path in paths]
        result = checkpoints[-1]
        result["model"] = average([checkpoint["model"] for checkpoint in checkpoints])
    except ValueError as error:
        sys.exit(f"ERROR: {error}")
    part = args.output.with_name(args.output.name + ".part")
    checkpoint_utils.torch_persistent_save(result, str(part))
    os.replace(part, args.output)
    print(f"averaged {', '.join(path.name for path in paths)} into {args.output}")


if __name__ == "__main__":
    main()
