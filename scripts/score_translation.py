#!/usr/bin/env python
"""Translates the test set (or another) with beam search and prints detokenised SacreBLEU with its signature.

    bash scripts/score_translation.sh --data-bin DIR --checkpoint FILE --reference FILE --out PREFIX

writes PREFIX.generate and PREFIX.log (fairseq-generate's output), PREFIX.hypotheses and PREFIX.references (one
sentence per line, in the same order) and PREFIX.bleu: all of them, or none.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

from check_model import explain, split_checkpoints
from sacrebleu.metrics import BLEU
from texts import read_lines

from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line, positive


def count_sentences(data_bin: Path, split: str) -> int:
    """From the header of fairseq-preprocess's index.

    Raises:
        UserError: there is none.
    """
    index = next(iter(sorted(data_bin.glob(f"{split}.*.idx"))), None)
    if index is None:
        raise UserError(f"{data_bin} has no split {split!r}: make it with fairseq-preprocess, or a prepare script")
    head = index.read_bytes()[:26]
    if len(head) < 26 or head[:9] != b"MMIDIDX\0\0":
        raise UserError(f"{index} is damaged: prepare the data again")
    return struct.unpack("<Q", head[18:])[0]


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--data-bin", type=Path, required=True, metavar="DIR", help="binarised data")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="several, joined by ':', are an ensemble")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE",
                        help="the same text in the target language, as published: one sentence per line")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="of the files to write")
    parser.add_argument("--user-dir", default=str(Path(__file__).resolve().parent.parent / "multimax_fairseq"),
                        metavar="DIR", help="with which it was trained (default: this plugin)")
    parser.add_argument("--split", default="test", metavar="NAME", help="to translate (default: %(default)s)")
    units = parser.add_mutually_exclusive_group()
    units.add_argument("--sentencepiece", type=Path, metavar="FILE", help="that cut the data into pieces, or")
    units.add_argument("--moses", metavar="LANGUAGE", help="of the target; the data are BPE units of lower-case "
                       "Moses tokens, as from prepare_iwslt14.sh; the score ignores case. Without either of the two "
                       "the tokens are words and punctuation")
    parser.add_argument("--beam", type=positive, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--lenpen", type=float, default=1.0, metavar="X",
                        help="scores are divided by length to the power X (default: %(default)s)")
    args = parser.parse_args()
    with errors_in_a_line():
        split_checkpoints(args.checkpoint)
        if args.sentencepiece and not args.sentencepiece.is_file():
            raise UserError(f"{args.sentencepiece}: there is no such file")
        references, sentences = read_lines(args.reference), count_sentences(args.data_bin, args.split)
        if len(references) != sentences:
            raise UserError(f"{len(references)} lines in {args.reference} for the {sentences} sentences of "
                            f"{args.split!r} in {args.data_bin}: they have to be translations line by line")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}.") as folder:
            print(score(args, references, Path(folder)))
            for path in Path(folder).iterdir():
                os.replace(path, args.out.with_name(f"{args.out.name}.{path.name}"))


def score(args, references: list[str], folder: Path) -> str:
    """Write generate, log, hypotheses, references and bleu to `folder`; returns SacreBLEU's line."""
    # Without --required-batch-size-multiple 1 fairseq's main branch leaves out up to 7 sentences that fill no batch.
    command = ["fairseq-generate", args.data_bin, "--user-dir", args.user_dir, "--path", args.checkpoint,
               "--gen-subset", args.split, "--beam", args.beam, "--lenpen", args.lenpen, "--max-tokens", 8192,
               "--required-batch-size-multiple", 1, "--num-workers", 0]
    if args.sentencepiece:
        command += ["--bpe", "sentencepiece", "--sentencepiece-model", args.sentencepiece]
    with (folder / "generate").open("wb") as output, (folder / "log").open("wb") as log:
        status = subprocess.run([*map(str, command)], stdout=output, stderr=log).returncode
    if status:
        raise UserError(f"fairseq-generate failed: {explain(folder / 'log', args)}")
    # D-<index> <score> <sentence>, in order of length
    found = [line[2:].split("\t") for line in read_lines(folder / "generate") if line.startswith("D-")]
    text_of = str if args.sentencepiece else lambda line: re.sub(r" ([.,?!])", r"\1", line)
    if args.moses:
        from iwslt14_text import decoder  # here: it needs more than others do

        text_of = decoder(args.moses)
    hypotheses = [text_of(fields[2]) for fields in sorted(found, key=lambda fields: int(fields[0]))]
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} translations for {len(references)} references: some were lost on the way")
    metric = BLEU(lowercase=bool(args.moses))
    line = metric.corpus_score(hypotheses, [references]).format(width=2, signature=str(metric.get_signature()))
    for name, lines in (("hypotheses", hypotheses), ("references", references), ("bleu", [line])):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return line


if __name__ == "__main__":
    main()
