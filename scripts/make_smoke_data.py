#!/usr/bin/env python
"""Makes small artificial data in the files that the prepare_*.sh recipes expect, so a whole recipe runs in minutes.

    python scripts/make_smoke_data.py iwslt14 de-en.tgz                     # for prepare_iwslt14.sh --archive
    python scripts/make_smoke_data.py wikitext103 wikitext-103-v1.zip       # for prepare_wikitext103.sh --archive
    python scripts/make_smoke_data.py multi30k multi30k                     # for prepare_multi30k.sh --from

Names, folders, compression and markup are those of the published data. The sentences come from the grammar of
make_demo_corpus.py, in normal spelling: capitals, no blank before punctuation. Every 97 pairs, IWSLT's training text
has an extra pair that tests the cleaning: tags, quotes, abbreviations, numbers, an empty side, lengths that do not
match. The same --sentences and --seed give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import random
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from make_demo_corpus import Grammar, distinct_sentences

LANGUAGES = ("de", "en")
PAIRS_IN_A_TEST_SET = 40
PAIRS_IN_A_TALK = 50
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")

# Text as in talks that the grammar does not make. The cleaning removes the last four (1 to 175 tokens on each side,
# one side at most 1.5 times as long as the other).
ODD_PAIRS = (
    ("Das kostet 1.000,50 Euro & mehr – „wirklich“.", "That costs 1,000.50 euros & more -- \"really.\""),
    ("(Gelächter) [Musik] <b>Danke!</b>", "(Laughter) [Music] <b>Thanks!</b>"),
    ("Dr. Müller kam z.B. am 3. Mai um 10:30 Uhr…", "Dr. Miller came e.g. on May 3rd, at 10:30 a.m. ..."),
    ("Ich hab's gesehen: wie geht's dir?", "I've seen it: how's it going? It's the 1990's."),
    ("a|b ist 50% von ‚c‘, oder 2/3.", "a|b is 50% of 'c', or 2/3."),
    ("", "Nobody has translated this."),
    ("Niemand hat das übersetzt.", ""),
    ("Ja.", "Yes, and this goes on much longer than what it is meant to be a translation of."),
    ("Ha " * 176, "Ha " * 176),
)

WORDS_SEEN_LESS_ARE_UNKNOWN = 3  # WikiText's own rule


# ---------------------------------------------------------------------- sentences


def sentence_pairs(seed: int) -> Iterator[tuple[str, str]]:
    """German and English tokens, separated by blanks; no sentence twice."""
    for german, english, _ in distinct_sentences(Grammar(random.Random(seed)).sentence):
        yield german, english


def written(tokens: str) -> str:
    """In normal spelling: a capital first, no blank before punctuation."""
    text = re.sub(r" ([.,?!])", r"\1", tokens)
    return text[0].upper() + text[1:]


def written_pairs(pairs: Iterator[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    return [(written(german), written(english)) for german, english in islice(pairs, number)]


# ---------------------------------------------------------------------- IWSLT'14


def talk_header(number: int) -> list[str]:
    """The lines before a talk's sentences; <url>, <keywords> and <talkid> are not part of the text."""
    return [
        f"<url>http://www.ted.com/talks/{number}</url>",
        "<keywords>talks, attention</keywords>",
        f"<talkid>{number}</talkid>",
        f"<title>Talk {number}: Attention</title>",
        f"<description>TED Talk {number}: where to look, and how hard.</description>",
    ]


def training_text(pairs: Sequence[tuple[str, str]], side: int) -> str:
    """train.tags: header and sentences of one talk after another, one sentence per line."""
    lines = []
    for index, pair in enumerate(pairs):
        if index % PAIRS_IN_A_TALK == 0:
            lines += talk_header(index // PAIRS_IN_A_TALK + 1)
        if index % 97 == 1:
            lines.append(ODD_PAIRS[index // 97 % len(ODD_PAIRS)][side].strip())
        lines.append(pair[side])
    return "".join(f"{line}\n" for line in lines)


def test_set(pairs: Sequence[tuple[str, str]], side: int, name: str) -> str:
    """The XML of a development or test set."""
    kind = "srcset" if side == 0 else "refset"
    head = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        "<mteval>",
        f'<{kind} setid="{name}" srclang="German" trglang="English">',
        '<doc docid="1" genre="lectures">',
        *talk_header(1),
    ]
    # The real sets' English has curly apostrophes, which the recipe makes straight.
    segments = [
        f'<seg id="{number}"> {pair[side].replace("cannot", "can’t")} </seg>' for number, pair in enumerate(pairs, 1)
    ]
    return "".join(f"{line}\n" for line in [*head, *segments, "</doc>", f"</{kind}>", "</mteval>"])


def iwslt14(out: Path, sentences: int, seed: int) -> None:
    """de-en.tgz: the folder de-en with train.tags.de-en.* and IWSLT14.*.xml."""
    pairs = sentence_pairs(seed)
    sets = {name: written_pairs(pairs, PAIRS_IN_A_TEST_SET) for name in TEST_SETS}
    train = written_pairs(pairs, sentences)
    texts = {}
    for side, language in enumerate(LANGUAGES):
        texts[f"train.tags.de-en.{language}"] = training_text(train, side)
        for name, chosen in sets.items():
            texts[f"IWSLT14.{name}.de-en.{language}.xml"] = test_set(chosen, side, name)

    # gzip stores name and time, which may not change the bytes; tar stores 1970 by default
    with (
        out.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        folder = tarfile.TarInfo("de-en")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for name in sorted(texts):
            content = texts[name].encode("utf-8")
            member = tarfile.TarInfo(f"de-en/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


# ---------------------------------------------------------------------- WikiText


def articles(sentences: Sequence[str]) -> Iterator[str]:
    """Lines as in WikiText: titles between equals signs, paragraphs, empty lines, a blank at both ends."""
    for start in range(0, len(sentences), 20):
        yield " "
        yield f" = Article {start // 20 + 1} = "
        yield " "
        for paragraph in range(start, min(start + 20, len(sentences)), 5):
            yield f" {' '.join(sentences[paragraph:paragraph + 5])} "


def wikitext(out: Path, sentences: int, seed: int) -> None:
    """wikitext-103-v1.zip: the folder wikitext-103 with wiki.{train,valid,test}.tokens, rare words <unk>."""
    english = (pair[1] for pair in sentence_pairs(seed))
    held_out = max(sentences // 20, 20)
    lines = {split: list(articles(list(islice(english, held_out)))) for split in ("valid", "test")}
    lines["train"] = list(articles(list(islice(english, sentences))))
    counts = Counter(word for line in lines["train"] for word in line.split())
    known = {word for word, count in counts.items() if count >= WORDS_SEEN_LESS_ARE_UNKNOWN}

    def with_unknown(line: str) -> str:
        return " ".join(word if not word or word in known else "<unk>" for word in line.split(" "))

    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        # ZipInfo's default date, 1980, keeps the bytes the same.
        archive.writestr(zipfile.ZipInfo("wikitext-103/"), b"")
        for split in ("test", "valid", "train"):
            member = zipfile.ZipInfo(f"wikitext-103/wiki.{split}.tokens")
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, "".join(f"{with_unknown(line)}\n" for line in lines[split]))


# ---------------------------------------------------------------------- Multi30k


def multi30k(out: Path, sentences: int, seed: int) -> None:
    """The folder `out` with {train,val,test_2016_flickr}.{de,en}.gz."""
    pairs = sentence_pairs(seed)
    held_out = max(sentences // 20, 20)
    out.mkdir()
    for split, number in (("val", held_out), ("test_2016_flickr", held_out), ("train", sentences)):
        chosen = written_pairs(pairs, number)
        for side, language in enumerate(LANGUAGES):
            text = "".join(f"{pair[side]}\n" for pair in chosen)
            (out / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


# ---------------------------------------------------------------------- command line

DATASETS = {"iwslt14": iwslt14, "wikitext103": wikitext, "multi30k": multi30k}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("out", type=Path, metavar="OUT", help="the archive, or the folder of multi30k")
    parser.add_argument("--sentences", type=int, default=2000, metavar="N",
                        help="sentences or pairs in the training text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the grammar (default: %(default)s)")
    args = parser.parse_args()
    part = args.out.with_name(f"{args.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    DATASETS[args.dataset](part, args.sentences, args.seed)
    os.replace(part, args.out)


if __name__ == "__main__":
    main()
