"""Attention block by block against all of it at once, in float64 by autograd, and as part of fairseq's module."""

import math

import pytest
import torch
from conftest import load_script
from fairseq.modules import MultiheadAttention

from multimax_fairseq.kernels import blockwise_attention
from multimax_fairseq.kernels.attention import multimax_attention
from multimax_fairseq.kernels.masks import Masks
from multimax_fairseq.mappings import build_mapping
from multimax_fairseq.mappings.multimax import multimax_formula
from multimax_fairseq.modules import MappedMultiheadAttention, attention

HEADS, HEAD_DIM = 6, 5
INF = float("inf")
check_kernels = load_script("check_kernels")  # has masks as a whole, and the random numbers of dropout


@pytest.fixture(params=["compiled", "eager"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", request.param)


@pytest.fixture(params=[(6, 40), (128, 2**20), (8, 1)], ids=lambda sizes: "{} queries, {} scores".format(*sizes))
def blocks(request, monkeypatch):
    """Small blocks, one block, and blocks of a single head."""
    queries, scores = request.param
    monkeypatch.setattr(blockwise_attention, "QUERIES", queries)
    monkeypatch.setattr(blockwise_attention, "SCORES_PER_THREAD", scores)


def case(tgt_len, src_len, order=2):
    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    query, key, value = (draw(HEADS, length, HEAD_DIM) for length in (tgt_len, src_len, src_len))
    return [query, key, value, draw(order, 2), draw(order, 2)]


def padding(src_len):
    """Some keys of the second half of the heads hidden, all of those of the last head."""
    keys = torch.zeros(HEADS, 1, src_len, dtype=torch.float64)
    keys[HEADS // 2 :, :, src_len // 2 :] = -INF
    keys[-1] = -INF
    return keys


def whole(query, key, value, thresholds, gains, mask):
    return multimax_formula(query @ key.transpose(1, 2) + mask, thresholds, gains) @ value


MASKS = {
    "none": lambda tgt, src: Masks(),
    "causal": lambda tgt, src: Masks(causal=True),
    "keys": lambda tgt, src: Masks(keys=padding(src)),
    "causal and keys": lambda tgt, src: Masks(causal=True, keys=padding(src)),
    "scores": lambda tgt, src: Masks(scores=-torch.arange(tgt * src).double().view(tgt, src).remainder(5)),
}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", MASKS)
def test_output_and_gradients_are_those_of_the_formula(name, order, blocks):
    tgt_len, src_len = (11, 11) if "causal" in name else (10, 13)
    inputs, masks = case(tgt_len, src_len, order), MASKS[name](tgt_len, src_len)
    upstream = torch.randn(HEADS, tgt_len, HEAD_DIM, dtype=torch.float64)
    expected = whole(*inputs, check_kernels.full_mask(masks, tgt_len, src_len).cpu())
    expected_grads = torch.autograd.grad((expected * upstream).sum(), inputs)
    output = multimax_attention(*inputs, masks)
    grads = torch.autograd.grad((output * upstream).sum(), inputs)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads):
        scale = expected_grad.abs().max()
        torch.testing.assert_close(grad / scale, expected_grad / scale, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_summed_over_blocks_in_single_precision(dtype, monkeypatch):
    """Those of half-precision thresholds and gains are those of single-precision ones, rounded once."""
    monkeypatch.setattr(blockwise_attention, "QUERIES", 8)
    *inputs, thresholds, gains = (tensor.detach().to(dtype) for tensor in case(200, 200))
    grads = []
    for parameters in ((thresholds, gains), (thresholds.float(), gains.float())):
        parameters = [parameter.requires_grad_() for parameter in parameters]
        output = multimax_attention(*inputs, *parameters, Masks())
        grads.append(torch.autograd.grad(output.sum(), parameters))
    for found, expected in zip(*grads):
        torch.testing.assert_close(found, expected.to(dtype), atol=0, rtol=0, equal_nan=True)
        assert expected.isfinite().all()


# ---------------------------------------------------------------- as part of fairseq's attention


def module(mapping="multimax", dropout=0.0, **options):
    torch.manual_seed(0)
    stock = MultiheadAttention(8, 2, dropout=dropout, **(options or {"self_attention": True}))
    return MappedMultiheadAttention.adopt(stock, build_mapping(mapping), "decoder").double()


def paths(monkeypatch, layer, *arguments, **options):
    """What a layer gives, with the gradients of all of its parameters, blockwise and as a whole."""
    results, taken = [], []
    original = multimax_attention
    monkeypatch.setattr(attention, "multimax_attention", lambda *args: taken.append(True) or original(*args))
    for threshold in (1, math.inf):
        monkeypatch.setattr(attention, "MIN_KEYS", threshold)
        output, weights = layer(*arguments, need_weights=False, **options)
        assert weights is None
        layer.zero_grad()
        output.pow(2).sum().backward()
        results.append([output, *(parameter.grad for parameter in layer.parameters())])
    assert len(taken) == 1
    return results


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", [None, torch.full((9, 9), -INF).triu(1), torch.full((9, 9), -1e8).triu(1),
                                  torch.ones(9, 9, dtype=torch.bool).triu(1), torch.eye(9, dtype=torch.double)],
                         ids=["none", "causal", "-1e8", "bool", "bias"])  # fmt: skip
def test_self_attention_takes_either_path_to_the_same(mask, padded, monkeypatch, blocks):
    x = torch.randn(9, 3, 8, dtype=torch.float64)
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    hidden[1, 6:] = hidden[2, :2] = True
    blockwise, plain = paths(
        monkeypatch, module(), x, x, x, attn_mask=mask, key_padding_mask=hidden if padded else None
    )
    torch.testing.assert_close(blockwise, plain, atol=1e-12, rtol=1e-10)


def test_cross_attention_takes_either_path_to_the_same(monkeypatch, blocks):
    layer = module(encoder_decoder_attention=True)
    x, memory = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(9, 3, 8, dtype=torch.float64)
    hidden = torch.arange(9).expand(3, 9) >= torch.tensor([[9], [5], [2]])
    blockwise, plain = paths(monkeypatch, layer, x, memory, memory, key_padding_mask=hidden, static_kv=True)
    torch.testing.assert_close(blockwise, plain, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        (lambda: module(), {"need_weights": True}),
        (lambda: module(), {"need_head_weights": True}),
        (lambda: module(), {"incremental_state": {}}),
        (lambda: module("sparsemax"), {}),
        (lambda: module(self_attention=True, add_zero_attn=True), {}),
        (lambda: module(), {"attn_mask": torch.zeros(9, 9, dtype=torch.float64, requires_grad=True)}),
    ],
    ids=["weights", "weights of heads", "decoding", "sparsemax", "zero_attn", "learned bias"],
)
def test_the_plain_path_where_the_other_does_not_serve(layer, call, monkeypatch):
    monkeypatch.setattr(attention, "MIN_KEYS", 1)
    monkeypatch.setattr(attention, "multimax_attention", None)  # cannot be called
    x = torch.randn(9, 3, 8, dtype=torch.float64)
    output, _ = layer()(x, x, x, **{"need_weights": False, **call})
    assert torch.isfinite(output).all()


def test_dropout_in_evaluation_is_no_reason_for_the_plain_path(monkeypatch):
    x = torch.randn(9, 3, 8, dtype=torch.float64)
    blockwise, plain = paths(monkeypatch, module(dropout=0.5).eval(), x, x, x)
    torch.testing.assert_close(blockwise, plain, atol=1e-12, rtol=1e-10)


def test_attention_dropout_is_that_of_the_plain_path(monkeypatch):
    """Where nothing else has dropout, it is PyTorch's, of the same probabilities in the same order."""
    x, layer, results = torch.randn(9, 3, 8, dtype=torch.float64), module(dropout=0.5).train(), []
    for min_keys in (1, math.inf):
        monkeypatch.setattr(attention, "MIN_KEYS", min_keys)
        torch.manual_seed(1)
        results.append(layer(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-10)
    assert not torch.allclose(results[0], layer.eval()(x, x, x, need_weights=False)[0])


def test_who_compiles_a_whole_model_sees_one_graph(monkeypatch, backend):
    monkeypatch.setattr(attention, "MIN_KEYS", 1)
    layer, mask = module().float(), torch.full((9, 9), -INF).triu(1)
    x = torch.randn(9, 3, 8)
    expected = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
    compiled = torch.compile(
        lambda x: layer(x, x, x, attn_mask=mask, need_weights=False)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)


def test_under_autocast(monkeypatch):
    monkeypatch.setattr(attention, "MIN_KEYS", 1)
    layer, x = module().float(), torch.randn(9, 3, 8, requires_grad=True)
    expected = layer(x, x, x, need_weights=False)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x, x, x, need_weights=False)[0]
    output.float().pow(2).sum().backward()
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)
    assert torch.isfinite(x.grad).all()
