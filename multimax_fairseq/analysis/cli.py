"""``multimax-analyze``: reports what the attention of one or more checkpoints does on a split of the data.

    multimax-analyze softmax/checkpoint_best.pt multimax/checkpoint_best.pt --data DATA_BIN --split valid --out FOLDER
    multimax-analyze --redraw FOLDER --figures 'sentence*-cross-layer2' --width 8.4

FOLDER gets report.html (one file, opens offline), figures/ (PNG, SVG, PDF, and a CSV file of what is drawn),
results.json with everything, and a CSV file for each table. --redraw makes figures and page of that results.json.

Checkpoints with the same label are seeds of one model: --labels softmax softmax multimax multimax
"""

import argparse
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from .. import tools
from ..tools import ArgumentParser, UserError, check_output_folder, positive

PAGE = "report.html"
TABLES = ("heads", "sites", "modules", "layers", "alignment")


def parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__, prog="multimax-analyze")
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="of this plugin or of fairseq")
    add("--data", type=Path, help="the folder that fairseq-preprocess made")
    add("--split", default="valid", help="of the data (default: valid)")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="folder for the report")
    where.add_argument("--redraw", type=Path, metavar="FOLDER", help="of a report: draw it again, without its models")
    add("--force", action="store_true", help="replace a report that is in the folder")
    add("--labels", nargs="+", metavar="NAME", help="names of the models (default: their folders')")
    add("--figures", metavar="NAMES", help="only these, a comma list; * stands for anything (default: the usual)")
    add("--width", type=_width, metavar="CM", help="of the figures (default: 8.4 to 17.8, columns of a paper)")
    add("--max-sentences", type=positive, default=1000, metavar="N", help="the first N of the split (default: 1000)")
    text = "tokens in a batch; fewer take less memory (default: 1024)"
    add("--max-tokens", type=positive, default=1024, metavar="N", help=text)
    add("--show", nargs="*", type=int, metavar="I", help="sentences (from 0) to draw (default: one; no number: none)")
    add("--alignments", type=Path, metavar="FILE", help="gold word alignments (Pharaoh: i-j), for their error rate")
    add("--user-dir", type=Path, metavar="DIR", help="a folder with your own mappings, if the models have some")
    add("--cpu", action="store_true", help="do not use a GPU")
    add("--no-progress-bar", action="store_true")
    return parser


def _width(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text) and 4 <= float(text) <= 60:
        return float(text) / 2.54
    raise argparse.ArgumentTypeError(f"{text!r} is not a width of 4 to 60 cm")


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parser().parse_args(arguments)
    with tools.errors_in_a_line():
        analyze(args, command=shlex.join(["multimax-analyze", *(arguments or sys.argv[1:])]))


def analyze(args: argparse.Namespace, command: str) -> None:
    """Measure (or read what was measured), draw, write the page: beside the folder, which is then replaced.

    Raises:
        UserError: something that the user can fix; raised before long work.
    """
    from . import figures  # here, as --help needs no matplotlib
    from .page import render_page

    out = args.redraw or args.out
    check_output_folder(out)
    results = _read(args) if args.redraw else {"command": command, **_measure(args)}
    plans = figures.plans_of(results)
    drawn, unknown = figures.chosen(plans, args.figures)
    if unknown:
        text = f"--figures: there is no {', '.join(unknown)}; choose from: {', '.join(plan.name for plan in plans)}"
        if args.redraw:
            raise UserError(text)
        print(f"WARNING: {text}", file=sys.stderr)  # what was measured is worth more
    with tools.replacing_path(out, replace=args.redraw or args.force) as build:
        if args.redraw:
            shutil.copytree(out, build)
        else:
            (build / "figures").mkdir(parents=True)
            _write_numbers(build, results)
        figures.draw_all(drawn, build / "figures", args.width)
        pictures = [(plan.part, plan.caption, build / "figures" / f"{plan.name}.png") for plan in plans]
        page = render_page(results, [picture for picture in pictures if picture[-1].exists()])
        (build / PAGE).write_text(page, encoding="utf-8")
    print(out / PAGE)


def _measure(args: argparse.Namespace) -> Dict[str, Any]:
    if not args.checkpoints or not args.data:
        raise UserError("give checkpoints and --data, or --redraw with the folder of a report")
    there = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    is_report = PAGE in there and there <= {PAGE, "figures", "results.json", *(f"{name}.csv" for name in TABLES)}
    if there and not (args.force and is_report):
        hint = "--force replaces it" if is_report else "choose another, or empty it"
        raise UserError(f"the folder {args.out} is not empty: {hint}")
    labels = args.labels or [path.absolute().parent.name for path in args.checkpoints]
    if not args.labels and len(set(labels)) < len(labels):
        labels = list(map(str, args.checkpoints))
    if len(labels) != len(args.checkpoints):
        raise UserError(f"{len(args.checkpoints)} checkpoints need as many --labels")
    tools.import_user_dir(args.user_dir)
    from .measure import measure  # here, since it imports fairseq, which takes seconds

    return measure(args, labels)


def _read(args: argparse.Namespace) -> Dict[str, Any]:
    """The results of the report to draw again."""
    path = args.redraw / "results.json"
    if args.checkpoints:
        raise UserError("--redraw needs no checkpoints: it draws what is in results.json")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results["models"], dict):
            raise TypeError
    except FileNotFoundError:
        raise UserError(f"{args.redraw} is no report: there is no results.json in it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, or of an earlier version: measure again with --out") from None
    return results


def _write_numbers(folder: Path, results: Dict[str, Any]) -> None:
    """Write results.json, a list of numbers a line, and a CSV file for each table."""
    text = json.dumps(results, indent=1, ensure_ascii=False)
    text = re.sub(r"\[[^][{}]*\]", lambda numbers: re.sub(r"\n\s*", " ", numbers[0]), text)
    (folder / "results.json").write_text(text, encoding="utf-8")
    for table in TABLES:
        rows = [
            {"model": label, "checkpoint": model["checkpoint"], **row, **row.get("learned", {})}
            for label, models in results["models"].items()
            for model in models
            for row in model[table]
        ]
        if rows:
            tools.write_table(folder / f"{table}.csv", rows, without=("histogram", "sigma", "learned"))
