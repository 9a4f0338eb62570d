#!/usr/bin/env python
"""Makes small artificial data in the files that the prepare_*.sh recipes expect, so a whole recipe runs in minutes.

    python scripts/make_smoke_data.py iwslt14 de-en.tgz                     # for prepare_iwslt14.sh --archive
    python scripts/make_smoke_data.py wikitext103 wikitext-103-v1.zip       # for prepare_wikitext103.sh --archive
    python scripts/make_smoke_data.py multi30k multi30k                     # for prepare_multi30k.sh --from

Names, folders, compression and markup are those of the published data. The sentences come from the grammar of
make_demo_corpus.py, in normal spelling.
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
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from make_demo_corpus import Grammar, distinct_sentences

LANGUAGES = ("de", "en")
PAIRS_IN_A_TEST_SET = 40
PAIRS_IN_A_TALK = 50
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
TALK = """<url>http://www.ted.com/talks/{0}</url>
<keywords>talks, attention</keywords>
<talkid>{0}</talkid>
<title>Talk {0}: Attention</title>
<description>TED Talk {0}: where to look, and how hard.</description>
"""
WORDS_SEEN_LESS_ARE_UNKNOWN = 3  # WikiText's own rule

Pairs = Iterator[tuple[str, str]]  # of tokens, German and English; no sentence twice


def written(pairs: Pairs, number: int) -> list[tuple[str, str]]:
    """In normal spelling: a capital first, no blank before punctuation."""
    texts = [[re.sub(r" ([.,?!])", r"\1", side) for side in pair] for pair in islice(pairs, number)]
    return [tuple(text[0].upper() + text[1:] for text in pair) for pair in texts]


def iwslt14(out: Path, pairs: Pairs, sentences: int) -> None:
    """de-en.tgz: the folder de-en with train.tags.de-en.* and IWSLT14.*.xml."""
    sets = {name: written(pairs, PAIRS_IN_A_TEST_SET) for name in TEST_SETS}
    train = written(pairs, sentences)
    with tarfile.open(out, "w:gz") as archive:

        def add(name: str, text: str) -> None:
            member = tarfile.TarInfo(f"de-en/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))

        for side, language in enumerate(LANGUAGES):
            text = ""
            for index, pair in enumerate(train):
                if index % PAIRS_IN_A_TALK == 0:
                    text += TALK.format(index // PAIRS_IN_A_TALK + 1)
                text += pair[side] + "\n"
            add(f"train.tags.de-en.{language}", text)
            for name, chosen in sets.items():
                # The real sets' English has curly apostrophes, which the recipe makes straight.
                segments = (f'<seg id="{number}"> {pair[side].replace("cannot", "can’t")} </seg>\n'
                            for number, pair in enumerate(chosen, 1))
                head = f'<?xml version="1.0" encoding="UTF-8"?>\n<mteval>\n<srcset setid="{name}">\n<doc docid="1">\n'
                text = f"{head}{TALK.format(1)}{''.join(segments)}</doc>\n</srcset>\n</mteval>\n"
                add(f"IWSLT14.{name}.de-en.{language}.xml", text)


def wikitext103(out: Path, pairs: Pairs, sentences: int) -> None:
    """wikitext-103-v1.zip: wiki.{train,valid,test}.tokens, with titles, paragraphs and empty lines, and <unk>."""
    held_out = max(sentences // 20, 20)
    lines: dict[str, list[str]] = {}
    for split, number in (("valid", held_out), ("test", held_out), ("train", sentences)):
        english = [pair[1] for pair in islice(pairs, number)]
        lines[split] = []
        for start in range(0, number, 20):
            lines[split] += [" ", f" = Article {start // 20 + 1} = ", " "]
            lines[split] += [f" {' '.join(english[first:first + 5])} " for first in range(start, start + 20, 5)]
    counts = Counter(word for line in lines["train"] for word in line.split())
    known = {"", *(word for word, count in counts.items() if count >= WORDS_SEEN_LESS_ARE_UNKNOWN)}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in lines:
            text = (" ".join(word if word in known else "<unk>" for word in line.split(" ")) for line in lines[split])
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", "".join(f"{line}\n" for line in text))


def multi30k(out: Path, pairs: Pairs, sentences: int) -> None:
    """A folder with {train,val,test_2016_flickr}.{de,en}.gz."""
    held_out = max(sentences // 20, 20)
    out.mkdir()
    for split, number in (("val", held_out), ("test_2016_flickr", held_out), ("train", sentences)):
        chosen = written(pairs, number)
        for side, language in enumerate(LANGUAGES):
            text = "".join(f"{pair[side]}\n" for pair in chosen)
            (out / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode("utf-8")))


DATASETS = {"iwslt14": iwslt14, "wikitext103": wikitext103, "multi30k": multi30k}


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
    sentences = distinct_sentences(Grammar(random.Random(args.seed)).sentence)
    DATASETS[args.dataset](part, (pair[:2] for pair in sentences), args.sentences)
    os.replace(part, args.out)


if __name__ == "__main__":
    main()
