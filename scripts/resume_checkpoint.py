"""Prepares a killed run for resuming: makes checkpoint_last.pt and checkpoint_best.pt whole and up to date.

    python scripts/resume_checkpoint.py runs/demo

fairseq writes each checkpoint whole or not at all, then copies it to these names. A run killed during the copy leaves
a file that is empty or cut short, from which training would resume. The original is still in the folder: this copies
the newest readable checkpoint to checkpoint_last.pt, and says so. If all is well it does and prints nothing.
"""

import shutil
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from multimax_fairseq.tools import (
    ArgumentParser,
    UserError,
    entry,
    errors_in_a_line,
    read_checkpoint,
    replacing,
)


class Progress(NamedTuple):
    """A checkpoint's progress: updates, its validation score, and the run's best validation score so far."""

    updates: int
    validation: Optional[Any]
    best: Optional[Any]


def progress_of(path: Path) -> Progress:
    state = read_checkpoint(path)
    extra, updates = entry(state, path, "extra_state"), entry(state, path, "optimizer_history", -1, "num_updates")
    return Progress(updates, extra.get("val_loss"), extra.get("best"))


def put_right(folder: Path) -> None:
    """See the top of this file.

    Raises:
        UserError: no checkpoint can be read, or the best one is lost.
    """
    paths = sorted(folder.glob("checkpoint*.pt"))
    if not paths or any("-shard" in path.name for path in paths):  # a shard is only a part of a checkpoint
        return
    found: Dict[Path, Progress] = {}
    wrong: Dict[Path, str] = {}
    for path in paths:
        try:
            found[path] = progress_of(path)
        except UserError as error:
            wrong[path] = str(error)
    if not found:
        raise UserError(f"no checkpoint of {folder} can be read, so it cannot go on: {wrong[paths[0]]}")

    last, best = folder / "checkpoint_last.pt", folder / "checkpoint_best.pt"
    newest = max(found, key=lambda path: (found[path].updates, path == last))
    if newest != last and (last not in found or found[last].updates < found[newest].updates):
        why = wrong.get(last, f"{last} is older" if last in found else f"there is no {last}")
        print(f"WARNING: going on from {newest.name}, after {found[newest].updates} updates: {why}")
        copy(newest, last)
    wanted = found[newest].best
    if wanted is not None and (best not in found or found[best].validation != wanted):
        of_that_score = [path for path in found if found[path].validation == wanted and path != best]
        if of_that_score:
            copy(of_that_score[-1], best)
        elif best not in found:
            raise UserError(
                f"the best checkpoint, of score {wanted}, is lost ({wrong.get(best, f'there is no {best}')}): put a "
                "copy in its place, or begin again in another folder"
            )


def copy(source: Path, target: Path) -> None:
    with replacing(target) as file, open(source, "rb") as content:
        shutil.copyfileobj(content, file)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, help="where fairseq-train saves")
    args = parser.parse_args()
    with errors_in_a_line():
        put_right(args.folder)


if __name__ == "__main__":
    main()
