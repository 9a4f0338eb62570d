"""Do checkpoints and data fit together? Prints nothing, or a line that says what is wrong.

    python scripts/check_model.py --checkpoint runs/a/checkpoint_best.pt:average.pt --data data/data-bin

The shell scripts run it after a failed fairseq command, whose output ends in a traceback. For translation models it
prints how many tokens a source sentence may have.
"""

from pathlib import Path

from multimax_fairseq.analysis.checkpoint import check_sentences, load_model, load_split
from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line


def check(checkpoints: list[Path], data: Path, split: str | None) -> int | None:
    """The longest source sentence that all models take; None for language models.

    Raises:
        UserError: a file is missing, damaged, or belongs to another model or data.
    """
    longest = []
    for path in checkpoints:
        model, _, task = load_model(path, data)
        if hasattr(model, "encoder"):
            longest.append(model.encoder.max_positions())
    if split:
        dataset = load_split(task, data, split)
        check_sentences(task, dataset, range(len(dataset)), f"the split {split!r} of {data}")
    return min(longest, default=None)


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="several, joined by ':', are an ensemble")
    parser.add_argument("--data", type=Path, required=True, help="the folder that fairseq-preprocess made")
    parser.add_argument("--split", help="of the data that has to be there, too")
    args = parser.parse_args()
    with errors_in_a_line():
        names = args.checkpoint.split(":")
        if "" in names:
            raise UserError(f"--checkpoint {args.checkpoint!r} has an empty name")
        longest = check(list(map(Path, names)), args.data, args.split)
    if longest is not None:
        print(longest)


if __name__ == "__main__":
    main()
