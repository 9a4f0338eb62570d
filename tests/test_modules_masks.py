"""Which masks are causal, and that an answer is not kept for another mask."""

import pytest
import torch

from multimax_fairseq.modules import masks
from multimax_fairseq.modules.masks import is_causal

INF = float("inf")


def future(length, dtype=torch.float32, hidden=-INF):
    return torch.full((length, length), hidden, dtype=dtype).triu(1)


@pytest.fixture(params=[2, 1_024], ids="{} rows at a time".format, autouse=True)
def rows(request, monkeypatch):
    monkeypatch.setattr(masks, "ROWS", request.param)


@pytest.mark.parametrize(
    "mask",
    [future(7), future(7, torch.float16), future(7, hidden=-1e8), future(7) < 0, (future(7) < 0).byte()],
    ids=["fp32", "fp16", "-1e8", "bool", "uint8"],
)
def test_causal_in_every_convention(mask):
    assert is_causal(mask)


def changed(row, column, value):
    mask = future(7)
    mask[row, column] = value
    return mask


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(7, 7), changed(2, 3, 0.0), changed(6, 0, -INF), changed(5, 1, -0.5), future(7).T, future(7)[:5],
     torch.full((7, 7), -INF), future(7).expand(2, 7, 7)],
    ids=["all seen", "one seen", "one hidden", "a bias", "the past", "not square", "all hidden", "3 dimensions"],
)  # fmt: skip
def test_not_causal(mask):
    assert not is_causal(mask)


def test_a_mask_that_is_changed_is_looked_at_again():
    mask = future(7)
    assert is_causal(mask)
    mask[0, 3] = 0.0
    assert not is_causal(mask)


def test_another_mask_at_the_same_address_is_looked_at_again():
    storage = future(8)
    assert is_causal(storage[:7, :7])
    assert not is_causal(storage[:7, 1:])
    assert is_causal(storage[1:, 1:])
    mask = future(7)
    assert is_causal(mask)
    del mask
    for _ in range(10):  # the allocator gives the same memory again where it can
        assert not is_causal(torch.zeros(7, 7))


def test_a_mask_made_in_inference_mode():
    with torch.inference_mode():
        mask = future(7)
        assert is_causal(mask)
        mask[0, 3] = 0.0
        assert not is_causal(mask)
