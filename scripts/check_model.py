"""Why has a command of fairseq failed? What is wrong with the files that were given to it, in a line."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from multimax_fairseq.tools import UserError, import_user_dir


def split_checkpoints(names: str) -> list[Path]:
    """The files of an ensemble, joined by ':'.

    Raises:
        UserError: one has no name, or is not there.
    """
    if not all(names.split(":")):
        raise UserError(f"--checkpoint {names!r} has an empty name")
    for path in map(Path, names.split(":")):
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
    return list(map(Path, names.split(":")))


def check(args: Namespace) -> int | None:
    """The longest source sentence that all models take; None for language models.

    Args:
        args: checkpoint (several are joined by ':'), data_bin, user_dir and, if it has to be there too, split.

    Raises:
        UserError: a file is missing, damaged, or belongs to another model or data.
    """
    from multimax_fairseq.analysis.checkpoint import load_model, load_split  # here: it takes seconds

    import_user_dir(Path(args.user_dir))
    longest = []
    for path in split_checkpoints(args.checkpoint):
        model, _, task = load_model(path, Path(args.data_bin))
        if hasattr(model, "encoder"):
            longest.append(model.encoder.max_positions())
    if getattr(args, "split", None):
        load_split(task, Path(args.data_bin), args.split)
    return min(longest, default=None)


def explain(log: Path, args: Namespace) -> str:
    """What :func:`check` finds, or else the last line that the command has written."""
    try:
        check(args)
    except UserError as error:
        return f"{error}{'; of your own? --user-dir names its folder' if 'mapping' in str(error) else ''}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "it has said nothing"
