"""``multimax-analyze``: reports what the attention of one or more checkpoints does on a split of the data.

    multimax-analyze softmax/checkpoint_best.pt multimax/checkpoint_best.pt --data DATA_BIN --split valid --out FOLDER

FOLDER gets report.html (one file, opens offline), figures/ (PNG and SVG), results.json and a CSV file for each table.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import List, Optional, Sequence

import torch
import tqdm

from .alignment import SUBWORDS, GoldAlignment, guess_subwords, read_alignments
from .checkpoint import LoadedModel, batches, labels_of, load
from .files import ArgumentParser, UserError, check_output_folder, errors_in_a_line, import_user_dir, positive
from .measure import MOST_TOKENS, Measurement


def parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__, prog="multimax-analyze")
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="of this plugin or of fairseq")
    add("--data", type=Path, required=True, help="the folder that fairseq-preprocess made")
    add("--split", default="valid", help="of the data (default: valid)")
    add("--out", type=Path, required=True, help="folder for the report")
    add("--force", action="store_true", help="replace a report that is in the folder")
    add("--labels", nargs="+", metavar="NAME", help="names of the models (default: their folders')")
    text = "analyse the first N sentences (language models: samples) of the split (default: 1000)"
    add("--max-sentences", type=positive, default=1000, metavar="N", help=text)
    text = "tokens in a batch; fewer take less memory (default: 1024)"
    add("--max-tokens", type=positive, default=1024, metavar="N", help=text)
    text = "sentences (from 0) to draw heat maps of (default: one of middling length; without numbers: none)"
    add("--show", nargs="*", type=int, metavar="I", help=text)
    text = "gold word alignments of the split, Pharaoh format (i-j), for the alignment error rate"
    add("--alignments", type=Path, metavar="FILE", help=text)
    text = "how pieces of words are marked in the data (default: as its dictionary looks)"
    add("--subwords", choices=SUBWORDS, help=text)
    add("--user-dir", type=Path, metavar="DIR", help="a folder with your own mappings, if the models have some")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--no-progress-bar", action="store_true")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parser().parse_args(arguments)
    _quiet()
    with errors_in_a_line():
        analyze(args, command=shlex.join(["multimax-analyze", *(arguments or sys.argv[1:])]))


def _quiet() -> None:
    """Log only warnings and errors; importing fairseq sets the root logger to DEBUG."""
    for name in (None, "fairseq", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)


def analyze(args: argparse.Namespace, command: str) -> None:
    """Check all that can be checked, then measure, then write.

    Raises:
        UserError: something that the user can fix; raised before long work.
    """
    try:
        from .report import is_report, write_report
    except ImportError as error:
        raise UserError(f"figures are drawn with matplotlib: pip install matplotlib ({error})") from error
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out} is a file; --out takes a folder")
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.force and is_report(args.out)):
        hint = "--force replaces it" if is_report(args.out) else "choose another, or empty it"
        raise UserError(f"the folder {args.out} is not empty: {hint}")
    check_output_folder(args.out)
    labels = args.labels or labels_of(args.checkpoints)
    if len(set(labels)) != len(args.checkpoints):
        raise UserError(f"{len(args.checkpoints)} checkpoints need as many different --labels")
    for label in labels:
        if not label.strip() or not label.isprintable():
            raise UserError(f"--labels: {label!r} cannot be printed")
    gold = _gold(args.alignments)
    import_user_dir(args.user_dir)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    models = [
        load(path, label, args.data, args.split, args.max_sentences, device)
        for path, label in zip(args.checkpoints, labels)
    ]
    measurements = [_prepare(loaded, args, gold) for loaded in models]
    with_output = any(measurement.with_output for measurement in measurements)
    for measurement in measurements:
        measurement.compared, measurement.with_output = measurements, with_output
        _measure(measurement, args, device)
    write_report(args.out, measurements, command, replace=args.force, progress=not args.no_progress_bar)
    print(f"{args.out / 'report.html'}")


def _gold(path: Optional[Path]) -> Optional[List[GoldAlignment]]:
    if path is None:
        return None
    try:
        return read_alignments(path)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: alignments are lines such as 0-0 1-2") from None
    except ValueError as error:
        raise UserError(str(error)) from error


def _prepare(loaded: LoadedModel, args: argparse.Namespace, gold: Optional[List[GoldAlignment]]) -> Measurement:
    """Set up a measurement and check that its options fit the model and the data."""
    shown = args.show if args.show is not None else _middling(loaded)
    absent = [index for index in shown if index not in range(len(loaded.indices))]
    if absent:
        raise UserError(f"--show {absent[0]}: sentences 0 to {len(loaded.indices) - 1} are analysed")
    subwords = args.subwords or guess_subwords(loaded.target_dictionary.symbols)
    measurement = Measurement(loaded, shown, gold, subwords)
    if gold is not None:
        measurement.check_gold()
    return measurement


def _middling(loaded: LoadedModel) -> List[int]:
    """The sentence whose length is nearest to 12 tokens: long enough to be interesting, short enough to read."""
    return [min(loaded.indices, key=lambda index: abs(loaded.dataset.num_tokens(index) - min(12, MOST_TOKENS)))]


def _measure(measurement: Measurement, args: argparse.Namespace, device: torch.device) -> None:
    loaded = measurement.loaded
    with tqdm.tqdm(
        total=len(loaded.indices), desc=loaded.label, unit="sentence", disable=args.no_progress_bar
    ) as bar:
        for sample in batches(loaded, args.max_tokens, device):
            measurement.update(sample)
            bar.update(len(sample["id"]))


if __name__ == "__main__":
    main()
