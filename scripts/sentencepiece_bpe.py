#!/usr/bin/env python
"""Learn a SentencePiece BPE vocabulary, and turn text into its pieces.

    python scripts/sentencepiece_bpe.py train --model FILE --vocab-size 8000 TEXT [TEXT ...]
    python scripts/sentencepiece_bpe.py encode --model FILE < text > pieces

`encode` works line by line. A decoded line equals the encoded line up to white space and Unicode
compatibility forms (SentencePiece's default normalisation, nmt_nfkc).
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from texts import read_lines

from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line, positive


def normalise_space(line: str) -> str:
    """Turn all white space into single blanks.

    fairseq splits a line into tokens at everything that Python treats as white space. SentencePiece's normalisation
    misses some of it (U+0085, U+001C); inside a piece it would be lost.
    """
    return " ".join(line.split())


def train(texts: list[Path], model: Path, vocab_size: int) -> None:
    """Learn one vocabulary of `vocab_size` pieces from all `texts`: the same bytes on any number of cores.

    Raises:
        UserError: `vocab_size` does not fit the texts; the message says which sizes do.
    """
    serialised = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(normalise_space(line) for text in texts for line in read_lines(text)),
            model_writer=serialised,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,  # alphabets this small need no unknown characters
            minloglevel=1,
        )
    except RuntimeError as error:
        # "INTERNAL: src/trainer_interface.cc(744) [condition] The sentence for the user."
        reason = str(error).rpartition("] ")[2]
        raise UserError(f"cannot learn {vocab_size} pieces from this text: {reason}") from error
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
    parser = ArgumentParser(__doc__)
    parser.add_argument("command", choices=["train", "encode"])
    parser.add_argument("texts", type=Path, nargs="*", metavar="TEXT", help="to learn from, one sentence a line")
    parser.add_argument("--model", type=Path, required=True, help="the file to write or to read")
    parser.add_argument("--vocab-size", type=positive, default=8000, help="default: %(default)s pieces")
    args = parser.parse_intermixed_args()
    with errors_in_a_line():
        try:
            if args.command == "train":
                train(args.texts, args.model, args.vocab_size)
                return
            encode = encoder(args.model)
            sys.stdout.reconfigure(encoding="utf-8", newline="\n", line_buffering=True)
            for line in sys.stdin.buffer:
                print(encode(line.decode("utf-8")))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{args.command}: no model, or not UTF-8: {error}") from error


if __name__ == "__main__":
    main()
