#!/usr/bin/env python
"""Translates raw text, one sentence per line, with a model that has been trained here.

    echo "Ein Hund läuft." | bash scripts/translate.sh --run runs/a --data data/multi30k_de_en
    bash scripts/translate.sh --checkpoint model.pt --data-bin data-bin --sentencepiece my.model <text

Each sentence is translated as it comes, so this works at a terminal too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from check_model import check, explain, split_checkpoints

from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line, positive

Convert = Callable[[str], str]


def languages_of(data_bin: Path) -> tuple[str, str]:
    """Source and target of binarised data, from the names of its files.

    Raises:
        UserError: there are none.
    """
    index = next(data_bin.glob("*.*-*.*.idx"), None)  # test.de-en.de.idx
    if index is None:
        raise UserError(f"{data_bin} has no data of a pair of languages: give what fairseq-preprocess has made")
    source, _, target = index.name.split(".")[1].partition("-")
    return source, target


def units_of(args: Namespace, source: str, target: str) -> tuple[Convert, Convert]:
    """From text to the units of the data, and back.

    Raises:
        UserError: there is no model of units.
    """
    pieces = args.sentencepiece or args.data and args.data / "sentencepiece.bpe.model"
    codes = args.data and args.data / "bpe.codes"
    if pieces and pieces.is_file():
        from sentencepiece_bpe import decoder, encoder

        return encoder(pieces), decoder(pieces)
    if args.sentencepiece is None and codes and codes.is_file():
        from iwslt14_text import decoder, encoder

        return encoder(codes, source), decoder(target)
    where = args.sentencepiece or args.data or "--data"
    raise UserError(f"{where}: there is neither a SentencePiece model nor bpe.codes: give --sentencepiece FILE")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", help="holds checkpoint_best.pt")
    parser.add_argument("--checkpoint", metavar="FILE", help="instead; several, joined by ':', make an ensemble")
    parser.add_argument("--data", type=Path, metavar="DIR", help="made by a prepare script: data-bin, and the model "
                        "that cuts text into units, sentencepiece.bpe.model or bpe.codes")
    parser.add_argument("--data-bin", type=Path, metavar="DIR", help="binarised data (default: DATA/data-bin)")
    parser.add_argument("--sentencepiece", type=Path, metavar="FILE", help="any SentencePiece model, instead")
    parser.add_argument("--source-lang", metavar="NAME", help="default: that of the data; so for")
    parser.add_argument("--target-lang", metavar="NAME")
    parser.add_argument("--user-dir", default=str(Path(__file__).resolve().parent.parent / "multimax_fairseq"),
                        metavar="DIR", help="with which it was trained (default: this plugin)")
    parser.add_argument("--beam", type=positive, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--truncate", action="store_true",
                        help="cut sentences that are too long for the model; without it the first is an error")
    parser.add_argument("further", nargs="*", metavar="-- OPTION …", help="of fairseq-interactive")
    args = parser.parse_args()
    with errors_in_a_line(), tempfile.TemporaryDirectory() as folder:
        args.checkpoint = args.checkpoint or args.run and str(args.run / "checkpoint_best.pt")
        args.data_bin = args.data_bin or args.data and args.data / "data-bin"
        if not args.checkpoint or not args.data_bin:
            raise UserError("--run or --checkpoint, and --data or --data-bin, are required; see --help")
        split_checkpoints(args.checkpoint)
        source, target = languages_of(args.data_bin)
        args.source_lang, args.target_lang = args.source_lang or source, args.target_lang or target
        try:
            translate(args, Path(folder))
        except BrokenPipeError:  # the reader has stopped
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def translate(args: Namespace, folder: Path) -> None:
    """From standard input to standard output, through fairseq-interactive.

    Raises:
        UserError: a line is too long for the model, or not UTF-8; or a file does not fit.
    """
    encode, decode = units_of(args, args.source_lang, args.target_lang)
    most = check(args) - 1 if args.truncate else None  # the end of the sentence is a unit, too
    command = ["fairseq-interactive", args.data_bin, "--user-dir", args.user_dir, "--path", args.checkpoint,
               "--source-lang", args.source_lang, "--target-lang", args.target_lang, "--beam", args.beam,
               *args.further]
    problems: list[str] = []

    def feed() -> None:
        for number, line in enumerate(sys.stdin.buffer, start=1):
            try:
                units = encode(line.decode("utf-8")).split()
            except UnicodeDecodeError:
                problems.append(f"line {number} is not UTF-8")
                break
            if most and len(units) > most:
                print(f"WARNING: line {number} is cut: it has {len(units)} units, and the model takes {most}",
                      file=sys.stderr)
                units = units[:most]
            try:
                process.stdin.write(f"{' '.join(units)}\n".encode())
                process.stdin.flush()
            except OSError:  # it has ended
                return
        process.stdin.close()

    number = 0
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        threading.Thread(target=feed, daemon=True).start()
        try:
            for line in process.stdout:  # everything but H-<number> <score> <units> is for developers
                if line.startswith(b"H-"):
                    number += 1
                    print(decode(line.decode("utf-8").rstrip("\n").split("\t")[2]), flush=True)
        except BaseException:
            process.kill()
            raise
    if process.wait():
        why = explain(folder / "log", args)
        if "Size of sample" in why or "max_tokens" in why:
            raise UserError(f"line {number + 1} is longer than the model or --max-tokens takes ({why}): shorten it, "
                            "or let --truncate cut it")
        raise UserError(f"fairseq-interactive failed: {why}")
    if problems:
        raise UserError(problems[0])


if __name__ == "__main__":
    main()
