#!/usr/bin/env python
"""Before a recipe works: are the options right, and what does the folder of the run hold?

    python scripts/begin_run.py RUN OPTION OF fairseq-train …

A wrong option is an error here, and not after the data have been prepared. A folder with a run of other settings is
refused. A checkpoint that was cut short when a run was killed is replaced by the newest one that is whole. The file
RUN/trained says that nothing is left to train: this makes or removes it, and with it run.json. Prints the --user-dir.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from settings import LENGTH, UPDATES, mapping_of, settings_of

from multimax_fairseq.models.options import check_options  # imports fairseq quietly
from multimax_fairseq.tools import UserError, entry, errors_in_a_line, read_checkpoint, replacing


class Progress(NamedTuple):
    """Of a checkpoint: updates, the next epoch, its score on validation, and the best so far."""

    updates: int
    epoch: int
    score: float | None
    best: float | None


def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
    raise UserError(f"{message}; fairseq-train --help, and docs/flags.md, have the options")


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Any]:
    """fairseq-train's options, as it parses them, and the plugin's checks of its own.

    Raises:
        UserError: one is wrong.
    """
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    argparse.ArgumentParser.error = error
    try:
        args = options.parse_args_and_arch(options.get_training_parser(), arguments)
        cfg = convert_namespace_to_omegaconf(args)
        if hasattr(args, "attention_mapping"):
            check_options(args)
    except (ValueError, FileNotFoundError) as problem:
        raise UserError(str(problem)) from problem
    except ImportError as problem:
        raise UserError(f"{problem}; if another copy is installed: pip install -e . in this checkout") from problem
    precision = [name for name in ("fp16", "bf16", "amp") if cfg.common[name]]
    if precision and not (torch.cuda.is_available() or cfg.common.cpu):
        raise UserError(f"--{precision[0]} needs a GPU, and torch sees none: without it the CPU trains")
    updates, warmup = cfg.optimization.max_update, getattr(cfg.lr_scheduler, "warmup_updates", 0)
    if 0 < updates < warmup:
        print(f"WARNING: the learning rate still rises at the end: {updates} updates of {warmup} that warm up",
              file=sys.stderr)
    return args, cfg


def check_data(folder: Path) -> None:
    """Raise UserError if a folder of binarised data is there, and a split of it is missing or empty."""
    for split in ("train", "valid", "test") if folder.is_dir() else ():
        files = [path for path in folder.glob(f"{split}.*bin")]
        if not files or not all(path.stat().st_size for path in files):
            raise UserError(f"{folder} has no text of the split {split!r}: remove it, and prepare the data again")


def mend(run: Path) -> tuple[Progress, dict[str, Any]] | None:
    """The progress and the configuration of checkpoint_last.pt, which this makes whole; None if there is none.

    fairseq writes a checkpoint whole or not at all, then copies it to other names: a kill in between cuts the copy.

    Raises:
        UserError: no checkpoint can be read.
    """
    whole, wrong = {}, {}
    for path in sorted(run.glob("checkpoint*.pt")):
        try:
            state = read_checkpoint(path)
            extra = entry(state, path, "extra_state")
            progress = Progress(entry(state, path, *UPDATES), entry(extra, path, "train_iterator", "epoch"),
                                extra.get("val_loss"), extra.get("best"))
            whole[path] = progress, entry(state, path, "cfg")
        except UserError as problem:
            wrong[path] = problem
    if not whole:
        if wrong:
            raise UserError(f"no checkpoint of {run} can be read ({[*wrong.values()][0]}): choose another folder")
        return None
    last, best = run / "checkpoint_last.pt", run / "checkpoint_best.pt"
    newest = max(whole, key=lambda path: (whole[path][0].updates, path == last))
    if newest != last and whole[newest][0].updates > (whole[last][0].updates if last in whole else -1):
        why = wrong.get(last, f"{last} is older or missing")
        print(f"WARNING: going on from {newest.name}: {why}", file=sys.stderr)
        copy(newest, last)
    progress = whole[newest][0]
    if progress.best is not None and (best not in whole or whole[best][0].score != progress.best):
        same = [path for path in whole if whole[path][0].score == progress.best and path != best]
        if not same:
            raise UserError(f"the best checkpoint, {best}, is lost: put a copy there, or choose another folder")
        copy(max(same, key=lambda path: whole[path][0].updates), best)  # of equal scores fairseq keeps the last
    return whole[newest]


def copy(source: Path, target: Path) -> None:
    with replacing(target) as file, source.open("rb") as content:
        shutil.copyfileobj(content, file)


def check_settings(run: Path, asked: Any, there: dict[str, Any]) -> None:
    """Raise UserError if a run that is there has other settings than asked for, but for its length."""
    old, new = ({**settings_of(cfg), **mapping_of(cfg["model"]), "seed": cfg["common"]["seed"]}
                for cfg in (there, asked))
    different = [f"{key}: there {old.get(key)}, asked for {new[key]}" for key in sorted(new)
                 if old.get(key) != new[key] and key not in LENGTH and (key in old or key != "dictionary")]
    if different:
        raise UserError(f"{run} holds a run with other settings ({'; '.join(different)}): choose another folder")


def begin(run: Path, arguments: list[str]) -> str:
    """See the top of this file; returns the --user-dir."""
    args, cfg = parse(arguments)
    if Path(cfg.checkpoint.save_dir) != run:
        raise UserError(f"--save-dir {cfg.checkpoint.save_dir}: the first argument, {run}, is the folder of the run")
    check_data(Path(cfg.task.data))
    found = mend(run)
    run.mkdir(parents=True, exist_ok=True)
    trained = run / "trained"
    if found:
        progress, there = found
        check_settings(run, cfg, there)
        max_update, max_epoch, _ = length = tuple(cfg.optimization[key] for key in LENGTH)
        if 0 < max_update <= progress.updates or 0 < max_epoch < progress.epoch:
            trained.exists() or trained.touch()
        elif length != tuple(there["optimization"][key] for key in LENGTH):
            trained.unlink(missing_ok=True)  # a longer one
    else:
        trained.unlink(missing_ok=True)
    if not trained.exists():
        (run / "run.json").unlink(missing_ok=True)
    return cfg.common.user_dir or ""


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    with errors_in_a_line(), redirect_stdout(sys.stderr):  # --help, and what fairseq prints
        try:
            user_dir = begin(Path(sys.argv[1]), sys.argv[2:])
        except SystemExit:  # --help
            sys.exit(1)
    print(user_dir)


if __name__ == "__main__":
    main()
