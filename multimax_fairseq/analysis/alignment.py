"""Word alignments read from attention and compared with gold ones.

Sources: alignment error rate, Och & Ney 2003; word attention from subword attention (sum over a source word's pieces,
mean over a target word's pieces), Zenkel, Wuebker & DeNero 2019.
"""

import re
from itertools import accumulate
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor

from ..tools import UserError

Links = Set[Tuple[int, int]]  # (source word, target word), from 0

WORD_BEGINS = "\u2581"  # in SentencePiece's pieces


class GoldAlignment(NamedTuple):
    """The links of one sentence pair: the sure ones, and all possible ones (including the sure)."""

    sure: Links
    possible: Links


def read_alignments(path: Union[str, Path]) -> List[GoldAlignment]:
    """Read a file of Pharaoh format, a sentence pair a line, words counted from 0: ``0-1`` is a sure link, ``0?1`` a
    possible one.

    Raises:
        UserError: a line is not of this format; gives its number.
    """
    alignments = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        links = [re.fullmatch(r"(\d+)([-?])(\d+)", link) for link in line.split()]
        if not all(links):
            raise UserError(f"{path}, line {number} is not of Pharaoh format, such as 3-4 (sure) 3?5 (possible)")
        possible = {(int(link[1]), int(link[3])) for link in links}
        sure = {(int(link[1]), int(link[3])) for link in links if link[2] == "-"}
        alignments.append(GoldAlignment(sure, possible))
    return alignments


class AlignmentError:
    """The alignment error rate of a corpus: AER = 1 − (Σ |A ∩ S| + Σ |A ∩ P|) / (Σ |A| + Σ |S|), 0 to 1.

    A are the predicted links, S the sure and P ⊇ S the possible gold links; sums are over sentence pairs.
    """

    def __init__(self):
        self._agreed = self._all = 0

    def update(self, predicted: Links, gold: GoldAlignment) -> None:
        self._agreed += len(predicted & gold.sure) + len(predicted & gold.possible)
        self._all += len(predicted) + len(gold.sure)

    def rate(self) -> Optional[float]:
        """AER; None before there is a link."""
        return 1 - self._agreed / self._all if self._all else None


def words_of_tokens(tokens: Sequence[str], is_sentencepiece: bool = False) -> List[int]:
    """The number of the word, from 0, that each token belongs to.

    Args:
        tokens: of one sentence, without ``</s>``: words, or pieces of them as subword-nmt marks them
            (``Kar@@ toffel``).
        is_sentencepiece: they are SentencePiece's (``▁Kar toffel``).
    """
    pairs = zip(tokens, tokens[1:])
    begins = (new.startswith(WORD_BEGINS) if is_sentencepiece else not old.endswith("@@") for old, new in pairs)
    return list(accumulate(begins, initial=0))[: len(tokens)]


def word_attention(attention: Tensor, tgt_words: Sequence[int], src_words: Sequence[int]) -> Tensor:
    """Attention between words: the sum over a source word's pieces, the mean over a target word's pieces.

    Args:
        attention: (…, tgt_len, src_len), without the rows and columns of ``</s>`` and padding.
        tgt_words, src_words: from :func:`words_of_tokens`.

    Returns:
        (…, number of target words, number of source words).
    """
    rows = torch.nn.functional.one_hot(torch.tensor(tgt_words)).to(attention)  # (tgt_len, words)
    columns = torch.nn.functional.one_hot(torch.tensor(src_words)).to(attention)
    return (rows / rows.sum(0)).t() @ attention @ columns


def hard_alignment(attention: Tensor) -> Links:
    """Link each target word to the source word that it attends to most.

    Args:
        attention: (target words, source words). A row of zeros has no link.
    """
    shares, sources = (each.tolist() for each in attention.max(-1))
    return {(source, target) for target, source in enumerate(sources) if shares[target] > 0}
