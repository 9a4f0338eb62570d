#!/usr/bin/env python
"""Learn a SentencePiece BPE vocabulary, and turn text into its pieces and back.

    python scripts/sentencepiece_bpe.py train --model FILE --vocab-size 8000 TEXT [TEXT ...]
    python scripts/sentencepiece_bpe.py encode --model FILE < text > pieces
    python scripts/sentencepiece_bpe.py decode --model FILE < pieces > text

`encode` and `decode` work line by line and flush every line, so they can stand before and after
fairseq-interactive in a pipe. A decoded line equals the encoded line up to white space and Unicode
compatibility forms (SentencePiece's default normalisation, nmt_nfkc).
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import sentencepiece


def normalise_space(line: str) -> str:
    """Turn all white space into single blanks.

    fairseq splits a line into tokens at everything that Python treats as white space. SentencePiece's
    normalisation misses some of it (U+0085, U+001C); inside a piece it would be lost.
    """
    return " ".join(line.split())


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, which end only at "\\n", so that two languages stay aligned line by line."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield normalise_space(line)


def train(texts: Sequence[Path], model: Path, vocab_size: int) -> None:
    """Learn one vocabulary of `vocab_size` pieces from all `texts` and write it to `model`.

    The same texts give the same bytes, whatever the paths and the number of cores.

    Raises:
        ValueError: `vocab_size` does not fit the texts; the message says which sizes do.
    """
    serialised = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in read_lines(text)),
            model_writer=serialised,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,  # alphabets this small need no unknown characters
            minloglevel=1,
        )
    except RuntimeError as error:
        # "INTERNAL: src/trainer_interface.cc(744) [condition] The sentence for the user."
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"cannot learn {vocab_size} pieces from this text: {reason}") from error
    model.write_bytes(serialised.getvalue())


def encoder(model: Path) -> Callable[[str], str]:
    """A function from a line of text to pieces between blanks."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    return lambda line: " ".join(processor.encode(normalise_space(line), out_type=str))


def decoder(model: Path) -> Callable[[str], str]:
    """A function from pieces to text."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
    return lambda line: processor.decode(line.split())


def filter_lines(convert: Callable[[str], str]) -> None:
    """Apply `convert` to every line of standard input and write the result to standard output."""
    sys.stdout.reconfigure(encoding="utf-8", newline="\n", line_buffering=True)
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"line {number} is not UTF-8") from None
        print(convert(text))


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="learn a vocabulary from text files")
    command.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="one sentence a line")
    command.add_argument("--model", type=Path, required=True, help="the file to write")
    command.add_argument("--vocab-size", type=int, default=8000, help="default: %(default)s pieces")

    for name, help_text in (("encode", "text to pieces"), ("decode", "pieces to text")):
        command = commands.add_parser(name, help=f"{help_text}, standard input to standard output")
        command.add_argument("--model", type=Path, required=True, help="a model made by `train`")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    try:
        if args.command == "train":
            train(args.texts, args.model, args.vocab_size)
        else:
            filter_lines((encoder if args.command == "encode" else decoder)(args.model))
    except (OSError, RuntimeError, ValueError) as error:  # no file; no model; not UTF-8, bad size
        sys.exit(f"ERROR: sentencepiece_bpe.py {args.command}: {error}")


if __name__ == "__main__":
    # Like any filter, end quietly on Ctrl-C and when the reader of the output ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
