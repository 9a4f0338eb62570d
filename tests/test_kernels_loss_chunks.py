"""How much is computed at a time; what chunks compute is tested with the losses that they serve."""

import pytest
import torch

from multimax_fairseq.kernels.loss import chunks
from multimax_fairseq.kernels.loss.chunks import (
    blocks_of_rows,
    check_options,
    default_chunk_tokens,
    product_dtype,
)


@pytest.mark.parametrize("vocabulary, tokens", [(267_744, 256), (10_000, 6_720), (1, 2**26), (2**30, 32)])
def test_default_chunk(vocabulary, tokens):
    assert default_chunk_tokens(vocabulary) == tokens


@pytest.mark.parametrize("width", [1, 41, 50_265, 267_744, 2**25])
def test_blocks_of_a_gpu_start_at_multiples_of_16_bytes(width, monkeypatch):
    rows = chunks.block_rows("cuda", width)
    assert rows > 0 and rows * width * torch.finfo(torch.float16).bits // 8 % 16 == 0
    if width < 2**18:
        assert chunks.GPU_BLOCK // 2 <= rows * width <= chunks.GPU_BLOCK


def test_blocks_are_all_rows_in_their_order(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_BLOCK", 3 * 41)
    logits, targets = torch.randn(10, 41), torch.arange(10)
    blocks = list(blocks_of_rows(logits, targets))
    assert len(blocks) > 1
    for part, whole in zip(zip(*blocks), (logits, targets)):
        assert torch.cat(part).equal(whole)
        assert all(block.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for block in part)


@pytest.mark.parametrize("options, message", [
    ((1.0, 0), r"--label-smoothing takes a number in \[0, 1\); got 1.0"),
    ((-0.1, 0), "--label-smoothing"),
    ((0.0, -1), "--chunk-tokens takes a number of tokens, or 0"),
])  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(*options)


def test_products_are_in_the_dtype_of_autocast():
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert product_dtype(single) == torch.float32 and product_dtype(double) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(single) == torch.bfloat16 and product_dtype(double) == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert product_dtype(single) == torch.float32
