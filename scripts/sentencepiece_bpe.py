#!/usr/bin/env python
"""Learn a SentencePiece BPE vocabulary, and turn text into its pieces.

    python scripts/sentencepiece_bpe.py train --model FILE --vocab-size 8000 TEXT [TEXT ...]
    python scripts/sentencepiece_bpe.py encode --model FILE < text > pieces

`encode` works line by line. A decoded line equals the encoded line up to white space and Unicode
compatibility forms (SentencePiece's default normalisation, nmt_nfkc).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece


def normalise_space(line: str) -> str:
    """Turn all white space into single blanks.

    fairseq splits a line into tokens at everything that Python treats as white space. SentencePiece's normalisation
    misses some of it (U+0085, U+001C); inside a piece it would be lost.
    """
    return " ".join(line.split())


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, which end only at "\\n", so that two languages stay aligned line by line."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield normalise_space(line)


def train(texts: list[Path], model: Path, vocab_size: int) -> None:
    """Learn one vocabulary of `vocab_size` pieces from all `texts`: the same bytes on any number of cores.

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["train", "encode"])
    parser.add_argument("texts", type=Path, nargs="*", metavar="TEXT", help="to learn from, one sentence a line")
    parser.add_argument("--model", type=Path, required=True, help="the file to write or to read")
    parser.add_argument("--vocab-size", type=int, default=8000, help="default: %(default)s pieces")
    args = parser.parse_intermixed_args()
    try:
        if args.command == "train":
            train(args.texts, args.model, args.vocab_size)
            return
        encode = encoder(args.model)
        sys.stdout.reconfigure(encoding="utf-8", newline="\n", line_buffering=True)
        for line in sys.stdin.buffer:
            print(encode(line.decode("utf-8")))
    except (OSError, RuntimeError, ValueError) as error:  # no file; no model; not UTF-8, bad size
        sys.exit(f"ERROR: sentencepiece_bpe.py {args.command}: {error}")


if __name__ == "__main__":
    main()
