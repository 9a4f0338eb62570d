"""multimax_fairseq/analysis/alignment.py: Pharaoh files, error rates by hand, and words made of subwords."""

import pytest
import torch

from multimax_fairseq.analysis import alignment
from multimax_fairseq.tools import UserError


@pytest.mark.parametrize("line", [b"0:1", b"1-", b"a-b", b"0-1,", b"\xff-1"])
def test_another_format_is_an_error_that_names_the_line(line, tmp_path):
    path = tmp_path / "test.align"
    path.write_bytes(b"0-0\n" + line)
    with pytest.raises(UserError, match="test.align, line 2 is not of Pharaoh format"):
        alignment.read_alignments(path)


def test_error_rate_by_hand(tmp_path):
    (tmp_path / "gold").write_text("0-0 1-2 1?1\n\n0-0\n")
    (first, empty, last), error = alignment.read_alignments(tmp_path / "gold"), alignment.AlignmentError()
    assert first == ({(0, 0), (1, 2)}, {(0, 0), (1, 2), (1, 1)}) and empty == (set(), set())
    assert error.rate() is None
    # A = {00, 11, 22}, S = {00, 12}, P = S + {11}: 1 − (1 + 2) / (3 + 2)
    error.update({(0, 0), (1, 1), (2, 2)}, first)
    assert error.rate() == pytest.approx(1 - 3 / 5)
    # and over two sentences, sums: A = S = {00}: 1 − (3 + 2) / (5 + 2)
    error.update({(0, 0)}, last)
    assert error.rate() == pytest.approx(1 - 5 / 7)


def test_words_of_tokens():
    assert alignment.words_of_tokens("die Kar@@ tof@@ fel .".split()) == [0, 1, 1, 1, 2]
    assert alignment.words_of_tokens("▁die ▁Kar tof fel ▁. x".split(), is_sentencepiece=True) == [0, 1, 1, 1, 2, 2]
    assert alignment.words_of_tokens([]) == []


def test_attention_of_words_and_their_links():
    """Sums over a source word's pieces, means over a target word's; a row of zeros has no link."""
    attention = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.1, 0.4], [0.7, 0.1, 0.2], [0, 0, 0]])
    words = alignment.word_attention(attention, tgt_words=[0, 0, 1, 2], src_words=[0, 1, 1])
    torch.testing.assert_close(words, torch.tensor([[0.3, 0.7], [0.7, 0.3], [0, 0]]))
    heads = alignment.word_attention(attention.expand(2, 5, 4, 3), [0, 0, 1, 2], [0, 1, 1])
    torch.testing.assert_close(heads, words.expand(2, 5, 3, 2))
    assert alignment.hard_alignment(words) == {(1, 0), (0, 1)}
