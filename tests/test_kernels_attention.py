"""Attention by any backend: who computes, and what all of them owe: precision, numbers that are none, dropout."""

import math
import weakref

import pytest
import torch
from conftest import needs_compiler
from torch.nn import functional

from multimax_fairseq.kernels import blockwise_attention, cpp_attention
from multimax_fairseq.kernels.attention import multimax_attention
from multimax_fairseq.kernels.masks import Masks
from multimax_fairseq.mappings.multimax import multimax_formula

INF = float("inf")
GRAD_FNS = {"C++": "CppMultiMaxBackward", "blocks": "CatBackward0", "whole": "BmmBackward0"}
# No score in half precision is one of these: there is no slope there, and either side's may be taken for it.
THRESHOLDS = torch.tensor([[-0.51234, 0.47651], [0.01357, 1.02468]], dtype=torch.float64)
GAINS = torch.tensor([[0.1, -0.2], [-0.05, 0.05]], dtype=torch.float64)


@pytest.fixture(params=[pytest.param("C++", marks=needs_compiler), "blocks", "whole"])
def path(request, monkeypatch):
    """Each way to compute fp32 on a CPU."""
    choose(request.param, monkeypatch)
    return request.param


def choose(path, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled" if path == "C++" else "eager")
    if path == "whole":
        monkeypatch.setattr(blockwise_attention, "fits_as_a_whole", lambda query, key: True)
    # several blocks, of several heads, in what are small problems here
    monkeypatch.setattr(blockwise_attention, "QUERIES", 32)


def draw(heads, tgt_len, src_len, head_dim=8, order=2, dtype=torch.float32, mean=0.0, seed=0):
    """Query, key, value (of this mean), thresholds and gains; and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key = normal(heads, tgt_len, head_dim), normal(heads, src_len, head_dim)
    scale = (2 / math.sqrt(head_dim)) ** 0.5  # scores of standard deviation 2
    inputs = [x.to(dtype) for x in (query * scale, key * scale, normal(heads, src_len, head_dim) + mean)]
    inputs += [x[:order].to(torch.promote_types(dtype, torch.float32)) for x in (THRESHOLDS, GAINS)]
    return [x.requires_grad_() for x in inputs], normal(heads, tgt_len, head_dim).to(dtype)


def plain(query, key, value, thresholds, gains, masks):
    """The formula, by autograd, in any precision."""
    scores = torch.bmm(query, key.transpose(1, 2))
    if masks.causal:
        scores = scores + torch.full_like(scores[0], -INF).triu(1)
    if masks.keys is not None:
        scores = scores + masks.keys.to(scores.dtype)
    return torch.bmm(multimax_formula(scores, thresholds, gains), value)


def results(attend, inputs, masks, upstream):
    """Output and gradients."""
    output = attend(*inputs, masks)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


# ---------------------------------------------------------------- who computes


@needs_compiler
@pytest.mark.parametrize(
    ("backend", "dtype", "dropout", "taken"),
    [
        ("compiled", torch.float32, 0.0, "C++"),
        ("compiled", torch.float32, 0.1, "C++"),
        ("eager", torch.float32, 0.0, "blocks"),
        ("eager", torch.bfloat16, 0.1, "blocks"),
    ],
)
def test_who_computes(backend, dtype, dropout, taken, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", backend)
    inputs, _ = draw(2, 5, 7, dtype=dtype)
    output = multimax_attention(*inputs, Masks(), dropout)
    assert type(output.grad_fn).__name__ == GRAD_FNS[taken] and output.dtype == dtype


def test_a_gpu_has_the_whole_matrix_up_to_a_bound_and_then_blocks_of_many_queries():
    """By tensors without memory: there is no GPU here, and no number is asked for."""
    short, long = (torch.empty(32, length, 64, device="meta", dtype=torch.float16) for length in (512, 4_096))
    fits = blockwise_attention.fits_as_a_whole
    assert fits(short, short) and not fits(long, long)
    heads, queries = blockwise_attention.block_size(long, long)
    assert queries == 512 and heads * 512 * 4_096 == blockwise_attention.SCORES_ON_GPU


def test_a_cpu_never_has_the_whole_matrix_of_long_rows():
    assert not blockwise_attention.fits_as_a_whole(torch.empty(1, 1, 1), torch.empty(1, 1, 1))


@pytest.mark.parametrize("masks", [Masks(), Masks(causal=True), Masks(True, torch.zeros(3, 1, 40))])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_every_path_gives_the_formula(order, masks, path):
    inputs, upstream = draw(3, 40, 40, order=order)
    inputs[3:] = [parameter.detach().requires_grad_(order > 0) for parameter in inputs[3:]]
    output = multimax_attention(*inputs, masks)
    assert type(output.grad_fn).__name__ == GRAD_FNS[path]
    inputs = inputs[: 5 if order else 3]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    parameters = [] if order else [THRESHOLDS[:0], GAINS[:0]]
    expected = plain(*doubles, *parameters, masks)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    grads, expected_grads = (
        torch.autograd.grad(result, wanted, upstream.to(result.dtype))
        for result, wanted in ((output, inputs), (expected, doubles))
    )
    for grad, expected_grad in zip(grads, expected_grads):
        scale = expected_grad.abs().max().clamp(min=1)
        torch.testing.assert_close(grad / scale, (expected_grad / scale).float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("order", [0, 1])
def test_order_0_is_torchs_softmax(order, path):
    (query, key, value, _, _), _ = draw(2, 30, 30)
    expected = functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    output = multimax_attention(query, key, value, torch.zeros(order, 2), torch.zeros(order, 2), Masks())
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(32, 2**20), (6, 40), (8, 1)], ids="{0[0]} queries, {0[1]} scores".format)
def test_a_query_that_sees_no_key_gets_zeros_and_gives_none(sizes, path, monkeypatch):
    """In one block, in several, and in blocks of a single head or query."""
    monkeypatch.setattr(blockwise_attention, "QUERIES", sizes[0])
    monkeypatch.setattr(blockwise_attention, "SCORES_PER_THREAD", sizes[1])
    monkeypatch.setattr(cpp_attention, "SCORES", sizes[1])
    inputs, _ = draw(6, 40, 40)
    keys = torch.zeros(6, 1, 40)
    keys[3:, :, 20:] = keys[-1] = -INF
    output = multimax_attention(*inputs, Masks(keys=keys))
    assert output[-1].eq(0).all() and output[:-1].ne(0).all()
    grads = torch.autograd.grad(output.pow(2).sum(), inputs)
    assert all(grad[-1].eq(0).all() for grad in grads[:3]) and all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("path", [pytest.param("C++", marks=needs_compiler), "blocks"])
def test_gradients_of_gradients_are_refused(path, monkeypatch):
    choose(path, monkeypatch)
    inputs, _ = draw(2, 4, 4)
    with pytest.raises(RuntimeError, match="differentiable once|once_differentiable"):
        grads = torch.autograd.grad(multimax_attention(*inputs, Masks()).pow(2).sum(), inputs, create_graph=True)
        grads[0].sum().backward()


@needs_compiler
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_in_cpp_nothing_of_length_squared_is_kept(dropout, monkeypatch):
    choose("C++", monkeypatch)
    inputs, _ = draw(6, 400, 400)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda _: _):
        multimax_attention(*inputs, Masks(causal=True), dropout)
    assert sum(tensor.numel() for tensor in kept) == 6 * 400 * (3 * 8 + 2) + 8


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_in_blocks_no_scores_are_kept(dropout, monkeypatch):
    choose("blocks", monkeypatch)
    inputs, _ = draw(6, 400, 400)
    made, bmm = [], torch.bmm

    def noted_bmm(*arguments):
        made.append(bmm(*arguments))
        return made[-1]

    monkeypatch.setattr(torch, "bmm", noted_bmm)
    output = multimax_attention(*inputs, Masks(causal=True), dropout)
    scores = [weakref.ref(tensor) for tensor in made[::2]]  # every other product is a block's output
    assert sum(tensor().numel() for tensor in scores) >= 6 * 400 * 400 / 2
    made.clear()
    assert not any(tensor() is not None for tensor in scores) and output.requires_grad


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("heads", "tgt_len", "src_len", "head_dim"), [(0, 4, 4, 3), (2, 0, 4, 3), (2, 4, 0, 3), (2, 4, 4, 0)]
)
def test_nothing_to_attend_to_or_nobody_to_attend(heads, tgt_len, src_len, head_dim, dropout, path):
    shapes = (heads, tgt_len, head_dim), (heads, src_len, head_dim), (heads, src_len, head_dim), (2, 2), (2, 2)
    inputs = [torch.ones(shape, requires_grad=True) for shape in shapes]
    output = multimax_attention(*inputs, Masks(causal=src_len > 0), dropout)
    assert output.shape == (heads, tgt_len, head_dim) and output.eq(0).all()
    grads = torch.autograd.grad(output.sum(), inputs)
    assert all(grad.shape == tensor.shape and grad.eq(0).all() for grad, tensor in zip(grads, inputs))


# ---------------------------------------------------------------- numbers that are none


def test_of_scores_that_are_no_numbers_all_paths_make_what_the_formula_makes(path):
    (_, _, value, _, _), _ = draw(1, 7, 40)
    rows = torch.randn(7, 40)
    rows[1, 3] = float("nan")
    rows[2, 3] = INF
    rows[3] = -INF
    rows[4] = 1e25  # σ of all overflows to −inf
    rows[5, :20] = -INF
    rows[6, ::2], rows[6, 1::2] = -INF, 1e25
    thresholds, gains = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.1, -0.1]])
    query = torch.zeros(1, 7, 8, requires_grad=True)
    output = multimax_attention(query, torch.zeros(1, 40, 8), value, thresholds, gains, Masks(scores=rows))
    expected = torch.bmm(multimax_formula(rows[None], thresholds, gains), value)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert output.isnan().all(-1)[0].tolist() == [False, True, True, False, True, False, True]
    assert output[0, 3].eq(0).all()
    (grad,) = torch.autograd.grad(output.sum(), query)  # keys are zeros: NaN · 0 is NaN, what is finite gives 0
    assert grad.isnan().all(-1)[0].tolist() == [False, True, True, False, True, False, True]


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("path", ["blocks", "whole"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_equal_scores_and_large_values_do_not_overflow(dtype, path, monkeypatch):
    """4,096 · 20 is beyond fp16, and so is the sum of 70,000 / 4,096."""
    choose(path, monkeypatch)
    query, key, value = torch.zeros(1, 2, 8), torch.zeros(1, 4_096, 8), torch.full((1, 4_096, 8), 20.0)
    output = multimax_attention(*(x.to(dtype) for x in (query, key, value)), THRESHOLDS, GAINS, Masks())
    torch.testing.assert_close(output, torch.full_like(output, 20.0), atol=0, rtol=1e-2)


def errors(case, dtype, seeds):
    """Errors of (plain, blocks) against float64, relative to the size of the result, of output and each gradient.

    Root mean squares over seeds: a gradient of thresholds and gains is four numbers, and in one seed their error may
    be next to nothing by luck, here or there; thresholds and gains are the same in all, so that no seed outweighs
    the rest.
    """
    length, causal, mean = case
    masks, squares = Masks(causal=causal), torch.zeros(3, 6, dtype=torch.float64)
    for seed in range(seeds):
        inputs, upstream = draw(2, length, length, 64, dtype=dtype, mean=mean, seed=seed)
        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
        expected = results(plain, doubles, masks, upstream.double())
        for row, attend in enumerate((plain, multimax_attention)):
            found = results(attend, inputs, masks, upstream)
            squares[row] += torch.stack([(a.double() - b).square().sum() for a, b in zip(found, expected)])
        squares[2] += torch.stack([b.square().sum() for b in expected])
    return (squares[:2] / squares[2]).sqrt()


LONG = [(512, True, 4.0), (512, False, 1.0), (1_100, True, 4.0)]


@pytest.mark.parametrize("case", [(256, True, 4.0), (256, False, 1.0),
                                  *(pytest.param(case, marks=pytest.mark.slow) for case in LONG)])  # fmt: skip
@pytest.mark.parametrize(("path", "dtype"), [
    pytest.param("C++", torch.float32, marks=needs_compiler),
    *(("blocks", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
])  # fmt: skip
def test_no_result_or_gradient_has_twice_the_error_of_plain_pytorch(path, dtype, case, monkeypatch):
    """``pytest -s`` prints the table."""
    choose(path, monkeypatch)
    if case[0] > 256:
        monkeypatch.setattr(blockwise_attention, "QUERIES", 128)
    found = errors(case, dtype, seeds=8 if dtype == torch.float32 else 3)
    names = "output", "query", "key", "value", "thresholds", "gains"
    for name, plain_error, error in zip(names, *found.tolist()):
        print(f"{path} {dtype} {case} {name:10} {plain_error:.1e} / {error:.1e}: {error / plain_error:.2f}")
    assert (found[1] <= 2 * found[0]).all(), found


# ---------------------------------------------------------------- dropout


def test_dropout_drops_and_scales(path):
    """Equal scores, and values that show each probability: each is 0 or 1 / 40 / (1 − 0.25)."""
    query, key = torch.zeros(8, 40, 1), torch.zeros(8, 40, 1)
    value = torch.eye(40).expand(8, 40, 40)[..., :40]
    inputs = query.expand(8, 40, 40).clone(), key.expand(8, 40, 40).clone(), value
    output = multimax_attention(*inputs, THRESHOLDS, GAINS, Masks(), 0.25)
    kept = output > 0
    torch.testing.assert_close(output[kept], torch.full((int(kept.sum()),), 1 / 30))
    assert abs(kept.double().mean() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / kept.numel())


def test_dropout_follows_from_the_seed(path):
    inputs, upstream = draw(2, 40, 40)
    found = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(results(lambda *given: multimax_attention(*given, 0.3), inputs, Masks(), upstream))
        found.append(results(lambda *given: multimax_attention(*given, 0.3), inputs, Masks(), upstream))
    torch.testing.assert_close(found[4:], found[:2], atol=0, rtol=0)
    assert not any(torch.allclose(found[0][0], other[0]) for other in found[1:4])  # other calls, other seeds


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_of_checkpointed_activations(use_reentrant, path):
    """Computed again, they are the same: torch puts back the state of the generator from which the seed is drawn."""
    inputs, upstream = draw(2, 40, 40)

    def attend(*tensors):
        return multimax_attention(*tensors, Masks(causal=True), 0.3)

    def checkpointed(*tensors):
        return torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=use_reentrant)

    found = []
    for function in (attend, checkpointed):
        torch.manual_seed(5)
        output = function(*inputs)
        for tensor in inputs:
            tensor.grad = None
        torch.rand(3)  # in between, numbers are drawn for something else
        output.backward(upstream)
        found.append([output.detach(), *(tensor.grad for tensor in inputs)])
    torch.testing.assert_close(*found, atol=0, rtol=0)


@pytest.mark.parametrize("dropout", [1.0, 1 - 1e-9])
def test_all_dropped(dropout, path):
    inputs, upstream = draw(2, 20, 20)
    for result in results(lambda *given: multimax_attention(*given, dropout), inputs, Masks(), upstream):
        assert result.eq(0).all()
