"""The C++ attention against attention as a whole, in float64 by autograd, and what it does not take."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import needs_compiler
from test_kernels_blockwise_attention import HEADS, INF, check_kernels, padding, whole

from multimax_fairseq.kernels import attention, cpp, cpp_attention
from multimax_fairseq.kernels.attention import multimax_attention
from multimax_fairseq.kernels.masks import Masks
from multimax_fairseq.mappings.multimax import multimax_formula

MASKS = {
    "none": Masks(),
    "causal": Masks(causal=True),
    "keys": Masks(keys=padding(40).float()),
    "causal and keys": Masks(causal=True, keys=padding(40).float()),
    "scores": Masks(scores=torch.arange(1600.0).remainder(7).view(40, 40).neg()),
    "all": Masks(True, padding(40).float(), torch.arange(1600.0).remainder(7).view(40, 40).neg()),
}


pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")


@pytest.fixture(params=[2**18, 40 * 16, 40 * 7, 1], ids="blocks of {} scores".format)
def blocks(request, monkeypatch):
    """One block, several, some whose end is no whole one, and blocks of a single query."""
    monkeypatch.setattr(cpp_attention, "SCORES", request.param)


def case(tgt_len=40, src_len=40, head_dim=20, order=2):
    query, key, value = (torch.randn(HEADS, length, head_dim) for length in (tgt_len, src_len, src_len))
    parameters = torch.randn(order, 2), 0.1 * torch.randn(order, 2)
    return [tensor.requires_grad_() for tensor in (query, key, value, *parameters)]


def compare(inputs, masks, tgt_len=40, src_len=40, sums=5e-7):
    """fp32 loses seven digits where it begins: of the largest number, and of the sizes of what is summed up."""
    upstream = torch.randn(HEADS, tgt_len, inputs[0].size(-1))
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    mask = check_kernels.full_mask(masks, tgt_len, src_len).cpu()
    expected = whole(*doubles, mask)
    output = multimax_attention(*inputs, masks)
    assert type(output.grad_fn).__name__ == "CppMultiMaxBackward"
    torch.testing.assert_close(output.double(), expected, atol=2e-5, rtol=1e-5)
    grads = torch.autograd.grad((output * upstream).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * upstream).sum(), doubles)
    allowed = [1e-5 * grad.abs().max().clamp(min=1) for grad in expected_grads[:3]]
    allowed += 2 * [sums * size_of_terms(doubles, mask, upstream.double())]
    for grad, expected_grad, error in zip(grads, expected_grads, allowed):
        torch.testing.assert_close(grad, expected_grad, atol=error.item(), rtol=0, check_dtype=False)


def size_of_terms(inputs, mask, upstream):
    """How much is added up, with either sign, for the gradients of thresholds and gains, where most of it cancels."""
    query, key, value, thresholds, gains = (tensor.detach() for tensor in inputs)
    scores = query @ key.mT + mask
    grads = multimax_formula(scores, thresholds, gains) * (upstream @ value.mT).abs()
    distances = 1 + scores.masked_fill(scores == -INF, 0).abs()
    return (grads * distances ** len(gains)).sum()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", MASKS)
def test_output_and_gradients_are_those_of_double_precision(name, order, blocks):
    compare(case(order=order), MASKS[name])


@pytest.mark.parametrize("head_dim", [1, 16, 33])
@pytest.mark.parametrize(("tgt_len", "src_len"), [(1, 1), (1, 300), (300, 2), (129, 17), (200, 256)])
def test_any_shape(tgt_len, src_len, head_dim):
    compare(case(tgt_len, src_len, head_dim), Masks(), tgt_len, src_len)


def test_causal_rows_of_more_than_one_block():
    compare(case(300, 300), Masks(causal=True), 300, 300)


def test_sums_for_parameters_lose_no_digits_when_there_are_many_terms():
    compare(case(1_000, 1_000), Masks(), 1_000, 1_000, sums=2e-8)


def test_any_layout_in_memory():
    """As projections give them, and with head_dim first."""
    inputs = case()
    for way in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.mT.contiguous().mT):
        strided = [way(tensor.detach()).requires_grad_() for tensor in inputs[:3]]
        results = []
        for query, key, value in (inputs[:3], strided):
            output = multimax_attention(query, key, value, *inputs[3:], Masks(causal=True))
            upstream = way(torch.ones_like(output)) if query is strided[0] else torch.ones_like(output)
            results.append([output, *torch.autograd.grad(output, (query, key, value), upstream)])
        torch.testing.assert_close(*results, atol=0, rtol=0)


def test_what_is_not_a_number_stays_so():
    query, *others = case()
    query = query.detach().index_fill(1, torch.tensor([3]), float("nan"))
    output = multimax_attention(query, *others, Masks(causal=True))
    assert output[:, 3].isnan().all() and output[:, :3].isfinite().all() and output[:, 4:].isfinite().all()


@pytest.mark.parametrize(
    ("heads", "masks"),
    [*((heads, Masks(causal=causal)) for heads in (1, 3) for causal in (False, True)), (HEADS, MASKS["all"])],
)
def test_threads_that_share_heads(heads, masks, monkeypatch):
    """More of them than heads, and than blocks; the same number of them gives the same bits."""
    monkeypatch.setattr(cpp_attention, "BLOCKS_PER_THREAD", 1)
    inputs = [tensor.detach()[:heads].requires_grad_() if tensor.dim() == 3 else tensor for tensor in case()]
    results, before = {}, torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5, 64, 2, 3, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            output = multimax_attention(*inputs, masks, 0.2)
            result = [output.detach(), *torch.autograd.grad(output.pow(2).sum(), inputs)]
            torch.testing.assert_close(result, results.setdefault(threads, result), atol=0, rtol=0)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3, 5, 64):
        for result, expected in zip(results[threads], results[1]):
            torch.testing.assert_close(result, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_memory_for_threads_is_bounded(monkeypatch):
    """Of the size of a head's keys and of a block, not of all heads, nor of length²."""
    taken = []
    original = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *given, **options: taken.append(original(*given, **options)) or taken[-1]
    )
    for heads in (2, 8):
        query = torch.zeros(heads, 2_048, 16)
        multimax_attention(query, query, query, torch.zeros(1, 2), torch.zeros(1, 2), Masks(causal=True))
        threads = torch.get_num_threads()
        most = threads * (6 * 2_048 * 16 + 2 * cpp_attention.SCORES + 2 * 128 * 16 + 2 * 2_048 + 64)
        assert max(tensor.numel() for tensor in taken) <= max(most, query.numel())


def test_parameters_of_another_precision():
    *inputs, thresholds, gains = case()
    results = []
    for dtype in (torch.float32, torch.float64):
        parameters = [tensor.detach().to(dtype).requires_grad_() for tensor in (thresholds, gains)]
        output = multimax_attention(*inputs, *parameters, Masks())
        results.append(torch.autograd.grad(output.pow(2).sum(), parameters))
        assert all(grad.dtype == dtype for grad in results[-1])
    torch.testing.assert_close(*results, check_dtype=False)


@pytest.mark.parametrize("wanted", [[2], [0, 3], [3, 4]])
def test_gradients_of_some_inputs_only(wanted):
    inputs = case()
    everything = torch.autograd.grad(multimax_attention(*inputs, Masks()).pow(2).sum(), inputs)
    inputs = [tensor.detach().requires_grad_(number in wanted) for number, tensor in enumerate(inputs)]
    multimax_attention(*inputs, Masks()).pow(2).sum().backward()
    for number, (tensor, grad) in enumerate(zip(inputs, everything)):
        assert tensor.grad is None if number not in wanted else torch.equal(tensor.grad, grad)


def test_in_inference_mode():
    inputs = case()
    expected = multimax_attention(*inputs, MASKS["keys"])
    with torch.inference_mode():
        masks = Masks(keys=MASKS["keys"].keys.clone())
        assert torch.equal(multimax_attention(*inputs, masks), expected)
    assert torch.equal(multimax_attention(*inputs, masks), expected)  # with gradients, of masks made there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    inputs, results = case(), []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            output = multimax_attention(*inputs, Masks(causal=True))
            results.append([output, *torch.autograd.grad(output.pow(2).sum(), inputs)])
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(*results, atol=0, rtol=0)


def test_several_python_threads_at_once():
    inputs = [case(200, 200) for _ in range(4)]
    expected = [multimax_attention(*each, Masks(causal=True)) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda each: multimax_attention(*each, Masks(causal=True)), 5 * inputs))
    torch.testing.assert_close(outputs, 5 * expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "masks",
    [Masks(scores=torch.zeros(1, 40)), Masks(scores=torch.arange(40.0)[:, None]), Masks(keys=padding(40)[-2:-1])],
)
def test_masks_are_expanded(masks):
    compare(case(), masks)


@pytest.mark.parametrize(
    "masks",
    [Masks(scores=torch.zeros(40, 30)), Masks(scores=torch.zeros(HEADS, 40, 40)), Masks(keys=torch.zeros(2, 1, 40))],
)
def test_masks_of_a_wrong_shape(masks):
    with pytest.raises(RuntimeError, match="expand"):
        multimax_attention(*case(), masks)


def test_shapes_that_do_not_go_together():
    query, key, value, *parameters = case()
    with pytest.raises(ValueError, match=r"values like keys: \(6, 40, 20\), \(6, 40, 20\), \(6, 39, 20\)"):
        multimax_attention(query, key, value[:, 1:], *parameters, Masks())
    with pytest.raises(ValueError, match="40 queries need as many keys under a causal mask, not 39"):
        multimax_attention(query, key[:, 1:], value[:, 1:], *parameters, Masks(causal=True))


def test_autocast_chooses_no_other_precision():
    inputs = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = multimax_attention(*inputs, Masks())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, multimax_attention(*inputs, Masks()), atol=0, rtol=0)


@pytest.mark.parametrize("missing", ["compiler", "product", "double precision", "wish"])
def test_where_it_does_not_serve_the_blocks_are_pytorchs(missing, monkeypatch):
    inputs = case()
    expected = multimax_attention(*inputs, Masks(causal=True))
    if missing == "compiler":
        library = cpp.Library(cpp_attention.LIBRARY.source, cpp_attention.LIBRARY.signatures)
        library.functions = None
        monkeypatch.setattr(cpp_attention, "LIBRARY", library)
    elif missing == "product":
        monkeypatch.setattr(cpp_attention, "sgemm", lambda: None)
    elif missing == "double precision":
        inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    else:
        monkeypatch.setenv("MULTIMAX_BACKEND", "eager")
    monkeypatch.setattr(cpp_attention, "attend", None)  # cannot be called
    output = multimax_attention(*inputs, Masks(causal=True))
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5, check_dtype=False)


# ---------------------------------------------------------------- dropout


def kept(seed, heads, tgt_len, src_len, dropout):
    """Which probabilities are kept, (heads, tgt_len, src_len): of a key j the counter is (16 ⌊j / 64⌋ + j mod 16,
    query, head, 0), and of its four numbers that of number ⌊j / 16⌋ mod 4 decides."""
    head, query, key = (axis.ravel() for axis in np.mgrid[:heads, :tgt_len, :src_len])
    counters = 16 * (key // 64) + key % 16, query, head, 0 * head
    numbers = np.stack(check_kernels.philox(counters, (seed % 2**32, seed >> 32), 10))
    decides = numbers[key // 16 % 4, np.arange(key.size)]
    return torch.from_numpy(decides >= int(dropout * 2**32)).view(heads, tgt_len, src_len)


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), [
    (7, [0] * 4, (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (10, [0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, [2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0),
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
])  # fmt: skip
def test_the_generator_of_the_tests_is_philox(rounds, counter, key, expected):
    """Known answers of Random123, its authors' library (kat_vectors)."""
    assert " ".join(f"{int(word):08x}" for word in check_kernels.philox(counter, key, rounds)) == expected


@pytest.mark.parametrize("masks", ["none", "all"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_dropout_forward_and_backward_by_the_same_mask_in_double_precision(order, masks, blocks, monkeypatch):
    seed, dropout, inputs = 0x0123_4567_89AB_CDEF, 0.3, case(order=order or 1)
    monkeypatch.setattr(attention, "_seed", lambda: seed)
    mask = kept(seed, HEADS, 40, 40, dropout) / (1 - dropout)
    upstream, added = torch.randn(HEADS, 40, 20), check_kernels.full_mask(MASKS[masks], 40, 40).cpu()
    inputs[3:] = [parameter.detach()[:order].requires_grad_() for parameter in inputs[3:]]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    query, key, value, *parameters = doubles
    expected = (multimax_formula(query @ key.mT + added, *parameters) * mask) @ value
    output = multimax_attention(*inputs, MASKS[masks], dropout)
    torch.testing.assert_close(output.double(), expected, atol=2e-5, rtol=1e-5)
    wanted = 5 if order else 3
    grads = torch.autograd.grad(output, inputs[:wanted], upstream)
    expected_grads = torch.autograd.grad(expected, doubles[:wanted], upstream.double())
    for grad, expected_grad in zip(grads, expected_grads):
        scale = expected_grad.abs().max().clamp(min=1)
        torch.testing.assert_close(grad / scale, (expected_grad / scale).float(), atol=1e-4, rtol=0)


def test_the_mask_has_the_rate_and_is_independent_of_place_and_seed():
    """Equal scores, and values that show the probabilities one by one."""
    heads, length, dropout, masks = 4, 256, 0.1, []
    scores, value = torch.zeros(heads, length, length), torch.eye(length).expand(heads, -1, -1)
    for seed in (1, 2, 2**40):
        parameters = torch.zeros(1, 2), torch.zeros(1, 2)
        masks.append(cpp_attention.attend(scores, scores, value, *parameters, Masks(), dropout, seed) > 0)
        assert torch.equal(masks[-1], kept(seed, heads, length, length, dropout))
    dropped = torch.stack(masks).logical_not().double()  # (seeds, heads, queries, keys)
    assert abs(dropped.mean() - dropout) < 4 * (dropout * (1 - dropout) / dropped.numel()) ** 0.5
    for each in (dropped.mean((1, 2, 3)), dropped.mean((0, 2, 3)), dropped.mean((0, 1, 3)), dropped.mean((0, 1, 2))):
        deviation = (dropout * (1 - dropout) * len(each) / dropped.numel()) ** 0.5
        assert (each - dropout).abs().max() < 5 * deviation
    deviations = (dropped - dropout) / (dropout * (1 - dropout)) ** 0.5
    for dim in range(4):
        for distance in (1, 2, 16, 64):
            if distance < dropped.size(dim):
                first = deviations.narrow(dim, 0, dropped.size(dim) - distance)
                second = deviations.narrow(dim, distance, dropped.size(dim) - distance)
                assert abs((first * second).mean()) < 4.5 / first.numel() ** 0.5
