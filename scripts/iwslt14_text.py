#!/usr/bin/env python
"""IWSLT'14 German-English: makes subword units of the published files, line for line as fairseq's recipe does.

    python scripts/iwslt14_text.py --from de-en --out DIR

writes DIR/raw (the sentences as published), DIR/text (the same in subwords) and DIR/bpe.codes. Its steps:
remove markup; tokenise as Moses does, with its escapes (&apos; and the like); keep training pairs of 1 to 175 tokens
whose sides differ in length by a factor of 1.5 at most; lower case; take every 23rd of these pairs for validation;
learn joint BPE on the others, both languages together.

`encoder` and `decoder` are for scripts/translate.py. A decoded sentence is in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import regex
import sacremoses
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe
from texts import read_lines
from tqdm import tqdm

from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line, positive

LANGUAGES = ("de", "en")
SPLITS = ("train", "valid", "test")
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")  # in this order

LINES_WITHOUT_TEXT = ("<url>", "<talkid>", "<keywords>")
TAGS_AROUND_TEXT = re.compile("</?(?:title|description)>")
SEGMENT_TAGS = re.compile(r'<seg id="[0-9]*">\s*|\s*</seg>\s*')

MOST_TOKENS = 175
GREATEST_RATIO = 1.5
LONGEST_TOKEN = 1000  # characters
EVERY_NTH_IS_VALID = 23
BPE_SEPARATOR = "@@"  # ends a subword unit that does not end its word


# ---------------------------------------------------------------------- tokens


class MosesTokenizer(sacremoses.MosesTokenizer):
    """Moses' tokenizer.perl, to the letter.

    sacremoses differs from the Perl script (of 2019 and later) in three points, which this corrects:

    - A full stop at the end of the line is a token of its own, even after an abbreviation ("usw .").
    - Letters and digits are Unicode's. sacremoses lists those of an older version, without Chinese and Korean, and
      splits such words.
    - The control characters U+001C to U+001F are dropped. Python's regular expressions treat them as white space.
    """

    def __init__(self, language: str) -> None:
        super().__init__(language)
        for name in ("PAD_NOT_ISALNUM", "COMMA_SEPARATE_1", "COMMA_SEPARATE_2", "COMMA_SEPARATE_3"):
            setattr(self, name, with_unicode_classes(getattr(self, name)))
        self.ENGLISH_SPECIFIC_APOSTROPHE = list(map(with_unicode_classes, self.ENGLISH_SPECIFIC_APOSTROPHE))

    def islower(self, text: str) -> bool:
        return text.islower()

    def isanyalpha(self, text: str) -> bool:
        return bool(regex.search(r"\p{Alphabetic}", text))

    def handles_nonbreaking_prefixes(self, text: str) -> str:
        return re.sub(r"(?<=\S)\.$", " .", super().handles_nonbreaking_prefixes(text))

    def __call__(self, line: str) -> str:
        return self.tokenize(re.sub("[\x1c-\x1f]", "", line), return_str=True)


def with_unicode_classes(rule: tuple[re.Pattern, str]) -> tuple[regex.Pattern, str]:
    """A rule of sacremoses with Unicode's classes in place of its character lists."""
    pattern, replacement = rule
    source = pattern.pattern
    classes = {"IsAlnum": r"\p{Alphabetic}\p{Nd}", "IsAlpha": r"\p{Alphabetic}", "IsN": r"\p{N}"}
    for name, unicode_class in classes.items():
        source = source.replace(getattr(sacremoses.MosesTokenizer, name), unicode_class)
    return regex.compile(source), replacement


def lower_case(text: str) -> str:
    """As in Perl: Σ always becomes σ; Python writes ς at the end of a word."""
    return text.replace("Σ", "σ").lower()


def is_clean(german: str, english: str) -> bool:
    """Would Moses' clean-corpus-n keep this pair of tokenised sentences?"""
    sides = german.split(" "), english.split(" ")
    shorter, longer = sorted(map(len, sides))
    return (bool(german and english) and longer <= min(MOST_TOKENS, GREATEST_RATIO * shorter)
            and max(map(len, chain(*sides))) <= LONGEST_TOKEN)


# ---------------------------------------------------------------------- the published files


def training_sentences(lines: Iterable[str]) -> Iterator[str]:
    """The text of train.tags.de-en.*: sentences, titles and descriptions."""
    return (TAGS_AROUND_TEXT.sub("", line) for line in lines if not any(tag in line for tag in LINES_WITHOUT_TEXT))


def segments(lines: Iterable[str]) -> Iterator[str]:
    """The sentences of a test set's XML, with straight apostrophes for curly ones."""
    return (SEGMENT_TAGS.sub("", line).replace("’", "'") for line in lines if "<seg id" in line)


def published_pairs(source: Path, name: str, sentences: Callable) -> Iterator[tuple[str, str]]:
    """German and English of what ``sentences`` finds in the lines of a pair of files.

    Raises:
        UserError: one language has more of them.
    """
    paths = [source / name.format(language) for language in LANGUAGES]
    german, english = (list(sentences(read_lines(path))) for path in paths)
    if len(german) != len(english):
        raise UserError(f"{name.format('*')}: {len(german)} sentences of German and {len(english)} of English")
    return zip(german, english)


# ---------------------------------------------------------------------- prepare


def all_pairs(source: Path) -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
    """The split, the two sentences as published, and their tokens, of each pair that is kept."""
    german, english = (MosesTokenizer(language) for language in LANGUAGES)
    kept = 0
    for raw in published_pairs(source, "train.tags.de-en.{}", training_sentences):
        tokens = german(raw[0]).strip(), english(raw[1]).strip()
        if is_clean(*tokens):
            kept += 1
            yield "train" if kept % EVERY_NTH_IS_VALID else "valid", raw, tokens
    for name in TEST_SETS:
        for raw in published_pairs(source, f"IWSLT14.{name}.de-en.{{}}.xml", segments):
            yield "test", raw, (german(raw[0]), english(raw[1]))


def learn_codes(lines: Iterable[str], codes: Path, merges: int) -> BPE:
    """Learn joint BPE, at most `merges` merges, and write it to `codes`.

    Raises:
        UserError: there is nothing to merge.
    """
    with codes.open("w", encoding="utf-8", newline="\n") as file:
        try:
            learn_bpe(lines, file, merges)
        except ValueError as error:  # the maximum of an empty sequence
            raise UserError(f"no training text is left to learn subword units from ({error})") from error
    return load_codes(codes)


def load_codes(codes: Path) -> BPE:
    with codes.open(encoding="utf-8") as file:
        return BPE(file, separator=BPE_SEPARATOR)


def prepare(source: Path, out: Path, merges: int) -> None:
    """The whole recipe; see the top of this file. `out` is there already."""
    raw, tokens = ({f"{split}.{language}": [] for split in SPLITS for language in LANGUAGES} for _ in range(2))
    for split, *pair in tqdm(all_pairs(source), unit=" pairs", desc="tokenising", disable=None):
        for language, text, units in zip(LANGUAGES, *pair):
            raw[f"{split}.{language}"].append(text)
            tokens[f"{split}.{language}"].append(lower_case(units))
    training = chain.from_iterable(tokens[f"train.{language}"] for language in LANGUAGES)
    bpe = learn_codes(training, out / "bpe.codes", merges)
    for folder, files, convert in (("raw", raw, str), ("text", tokens, bpe.process_line)):
        (out / folder).mkdir()
        for name, lines in files.items():
            with (out / folder / name).open("w", encoding="utf-8", newline="\n") as file:
                for line in tqdm(lines, unit=" lines", desc=f"{folder}/{name}", disable=None):
                    file.write(f"{convert(line)}\n")


# ---------------------------------------------------------------------- one sentence


def encoder(codes: Path, language: str) -> Callable[[str], str]:
    """A function from a sentence to subwords of lower-case tokens."""
    bpe, tokenise = load_codes(codes), MosesTokenizer(language)
    return lambda line: bpe.process_line(lower_case(tokenise(line)).strip())


def decoder(language: str) -> Callable[[str], str]:
    """A function from subwords to a sentence."""
    detokeniser = sacremoses.MosesDetokenizer(language)
    return lambda line: detokeniser.detokenize(f"{line.strip()} ".replace(f"{BPE_SEPARATOR} ", "").split())


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="folder with the published files")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is there already")
    parser.add_argument("--merges", type=positive, default=10000, help="of BPE (default: %(default)s)")
    args = parser.parse_args()
    with errors_in_a_line():
        prepare(args.source, args.out, args.merges)


if __name__ == "__main__":
    main()
