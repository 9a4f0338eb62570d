"""What both losses share: how much is computed at a time, half precision where trained models end up, and who takes
part in what PyTorch computes. Oracle: the whole logits in float64."""

import inspect

import pytest
import test_kernels_loss_cross_entropy
import test_kernels_loss_entmax
import torch
from test_kernels_loss_entmax import PADDING
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from multimax_fairseq.kernels.loss import check_options, chunked_cross_entropy, chunked_entmax_loss, chunks
from multimax_fairseq.mappings import entmax

ALPHA = 1.2


@pytest.mark.parametrize("vocabulary, tokens", [(267_744, 256), (10_000, 6_720), (1, 2**26), (2**30, 32)])
def test_default_chunk(vocabulary, tokens):
    assert chunks.default_chunk_tokens(vocabulary) == tokens


@pytest.mark.parametrize("width", [1, 41, 50_265, 267_744, 2**25])
def test_blocks_of_a_gpu_start_at_multiples_of_16_bytes(width):
    rows = chunks.block_rows("cuda", width)
    assert rows > 0 and rows * width * torch.finfo(torch.float16).bits // 8 % 16 == 0
    if width < 2**18:
        assert chunks.GPU_BLOCK // 2 <= rows * width <= chunks.GPU_BLOCK


@pytest.mark.parametrize("options, message", [
    ((1.0, 0), r"--label-smoothing takes a number in \[0, 1\); got 1.0"),
    ((-0.1, 0), "--label-smoothing"),
    ((0.0, -1), "--chunk-tokens takes a number of tokens, or 0"),
])  # fmt: skip
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(*options)


def whole_cross_entropy(features, weight, targets, thresholds=None, gains=None, bias=None, smoothing=0.0):
    tensors = dict(features=features, weight=weight, bias=bias)
    if gains is not None:
        tensors.update(thresholds=thresholds, gains=gains)
    return test_kernels_loss_cross_entropy.whole(tensors, targets, smoothing)[0].sum()


def whole_entmax_loss(features, weight, targets, alpha=ALPHA, bias=None, smoothing=0.0):
    tensors = dict(features=features, weight=weight, bias=bias)
    return test_kernels_loss_entmax.whole(tensors, targets, alpha, smoothing).sum()


def cross_entropy(features, weight, targets, thresholds=None, gains=None, bias=None, smoothing=0.0, **options):
    return chunked_cross_entropy(features, weight, targets, bias, thresholds, gains, smoothing, **options).loss


def entmax_loss(features, weight, targets, alpha=ALPHA, bias=None, smoothing=0.0, **options):
    return chunked_entmax_loss(features, weight, targets, lambda x: entmax(x, alpha), alpha, bias, smoothing,
                               padding=PADDING, **options).loss  # fmt: skip


LOSSES = {"cross-entropy": (cross_entropy, whole_cross_entropy), "entmax": (entmax_loss, whole_entmax_loss)}
NUMBERS = {"cross-entropy": [torch.zeros(2, 2), torch.full((2, 2), 0.1)], "entmax": [torch.tensor(ALPHA)]}


def gradients(loss, tensors, *arguments, scale=1.0, **options):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    (scale * loss(*tensors[:2], *arguments, *tensors[2:], **options)).backward()
    return [tensor.grad.double() for tensor in tensors]


def errors(loss, whole, tensors, targets, **options):
    """Of each gradient against float64, (ours, plain PyTorch's), relative norms."""
    smoothing = options.get("smoothing", 0.0)
    exact = gradients(whole, [tensor.double() for tensor in tensors], targets, smoothing=smoothing)
    plain = gradients(whole, tensors, targets, smoothing=smoothing)
    ours = gradients(loss, tensors, targets, **options)
    return [tuple(((a - e).norm() / e.norm()).item() for a in pair) for *pair, e in zip(ours, plain, exact)]


def sure(vocabulary, boost, dtype, tokens=512, repeated=False, direction=0.0):
    """Features that give their gold word most of the probability; words that repeat; one feature that all have."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, 64, generator=generator) / 8
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    if repeated:
        targets[torch.rand(tokens, generator=generator) < 0.4] = 5 % vocabulary
    features = torch.randn(tokens, 64, generator=generator) * 0.3 + boost * F.normalize(weight[targets])
    features[:, 0] += direction
    return [features.to(dtype), weight.to(dtype)], targets


@pytest.fixture(params=["eager", "compiled"])
def backend(request, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", request.param)


# boosts give p of the gold word up to 0.9999
@pytest.mark.parametrize("case", [
    dict(vocabulary=8, boost=4), dict(vocabulary=100, boost=12), dict(vocabulary=1_000, boost=14),
    dict(vocabulary=2_000, boost=1), dict(vocabulary=1_000, boost=8, repeated=True, direction=8.0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype, smoothing", [(torch.bfloat16, 0.0), (torch.float16, 0.1), (torch.float32, 0.1)])
@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_has_more_than_plain_pytorchs_error(name, dtype, smoothing, case, backend, monkeypatch):
    (tensors, targets), times, floor = sure(dtype=dtype, **case), 1.02, 1e-6
    if dtype == torch.float32:  # blocks of 3 rows, which are no multiple of 16 bytes, and the loss's own numbers
        monkeypatch.setattr(chunks, "CPU_BLOCK", 3 * case["vocabulary"])
        tensors, times, floor = [*tensors, *NUMBERS[name]], 4, 1e-5  # the gradient of α may be next to nothing
    for chunk_tokens in (0, 100):
        found = errors(*LOSSES[name], tensors, targets, smoothing=smoothing, chunk_tokens=chunk_tokens)
        assert all(ours <= times * plain + floor for ours, plain in found), (chunk_tokens, found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [-0.1, -9.0])
def test_steep_modulators_in_half_precision(gain, dtype, backend):
    """Gradients of features, weight and gains; those of thresholds may cancel to nothing."""
    (features, weight), targets = sure(100, 1, dtype)
    tensors = [features * 8, weight, torch.zeros(2, 2), torch.tensor([[-0.5, 0.1], [gain, 0.0]])]
    found = errors(cross_entropy, whole_cross_entropy, tensors, targets)
    assert all(found[n][0] <= 1.02 * found[n][1] + 1e-5 for n in (0, 1, 3)), found


@pytest.mark.parametrize("vocabulary", [64, 500])
@pytest.mark.parametrize("name", LOSSES)
def test_what_fp16_holds_does_not_overflow(name, vocabulary, backend):
    """Sums of up to 65,504, over all tokens, and more where a loss scale brings them down."""
    loss, whole = LOSSES[name]
    features = torch.full((16_384 if vocabulary == 64 else 1_024, 8), 8.0).half()
    weight, targets = torch.zeros(vocabulary, 8).half(), torch.full((len(features),), 3)
    for scale in (1.0 if len(features) == 1_024 else 0.25, 2.0**-7):
        exact = gradients(whole, [features.double(), weight.double()], targets, scale=scale)[1]
        found = gradients(loss, [features, weight], targets, scale=scale)[1]
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-7)


def test_small_gradients_of_half_precision_do_not_vanish(backend):
    """p of a word that never occurs is 2e-8 here, less than half of fp16's smallest number."""
    features, weight = torch.ones(64, 8).half(), torch.zeros(30, 8).half()
    weight[1:] = -17.75 / 8
    targets = torch.zeros(64, dtype=torch.int64)
    grad = gradients(cross_entropy, [features, weight], targets, scale=1024, chunk_tokens=16)[1]
    expected = 65_536 * torch.tensor(-17.75).double().exp()
    torch.testing.assert_close(grad[1:], expected.expand(29, 8), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_products_of_a_gpu_keep_fp32(name, dtype, monkeypatch):
    """PyTorch's are on a GPU alone: here with the same numbers from a CPU."""
    monkeypatch.setattr(chunks, "has_wide_products", lambda tensor: True)
    monkeypatch.setattr(chunks, "wide_product", lambda a, b, out=None: torch.mm(a.float(), b.float(), out=out))
    monkeypatch.setattr(chunks, "PRODUCT_AT_A_TIME", 64 * 64)
    tensors, targets = sure(100, 10, dtype)
    for ours, plain in errors(*LOSSES[name], tensors, targets, chunk_tokens=100):
        assert ours < 0.5 * plain and ours < torch.finfo(dtype).eps
    tensors[0][:, 0] = 2.0**10
    assert all(gradient.isfinite().all() for gradient in gradients(LOSSES[name][0], tensors, targets, scale=2.0**-9))


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast(name, features_dtype, backend):
    (features, weight), targets = sure(500, 10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, plain in errors(*LOSSES[name], [features.to(features_dtype), weight], targets, smoothing=0.1):
            assert 1e-4 < ours <= 1.02 * plain  # products are in bf16
        whole = LOSSES[name][0](features, weight, targets, reduce=False)
        torch.testing.assert_close(whole.sum(), LOSSES[name][0](features, weight, targets))


@pytest.fixture(params=LOSSES)
def problem(request):
    """Loss of three tensors, plain or chunked, and the tensors."""
    loss, whole = LOSSES[request.param]
    (features, weight), targets = sure(11, 1, torch.float64, tokens=5)
    tensors = [t.double().requires_grad_() for t in (features[:, :3], weight[:, :3], *NUMBERS[request.param])]
    ours = lambda f, w, *n: loss(f, w, targets, *n, smoothing=0.1, chunk_tokens=2)  # noqa: E731
    # not whole_entmax_loss, which holds p fixed
    return ours, lambda f, w, *n: whole(f, w, targets, *n, smoothing=0.1), tensors


def test_gradients_are_those_of_differences(problem, backend):
    ours, _, tensors = problem
    assert torch.autograd.gradcheck(ours, tensors)


def test_second_derivatives(problem):
    """By grad() and by backward(), as of a gradient penalty."""
    ours, _, tensors = problem
    features, weight = tensors[0].detach(), tensors[1]
    assert torch.autograd.gradgradcheck(lambda f, w: ours(f, w), tensors[:2])
    torch.autograd.grad(ours(features, weight), weight, create_graph=True)[0].square().sum().backward()
    penalty = lambda w: torch.func.grad(ours, 1)(features, w).square().sum()  # noqa: E731
    torch.testing.assert_close(weight.grad, torch.func.grad(penalty)(weight.detach()), atol=1e-9, rtol=1e-7)


def test_a_second_backward(problem, backend):
    ours, _, tensors = problem
    loss = ours(*tensors)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, tensors), [3 * g for g in first], atol=1e-10, rtol=1e-10)


def test_whoever_takes_part_gets_pytorchs_own_operators(problem):
    ours, whole, tensors = problem
    expected = torch.autograd.grad(whole(*tensors), tensors[:2])
    constants, plain = [tensor.detach() for tensor in tensors[2:]], [tensor.detach() for tensor in tensors[:2]]
    loss = lambda f, w: ours(f, w, *constants)  # noqa: E731
    gradient = lambda f, w: torch.func.grad(loss, (0, 1))(f, w)  # noqa: E731
    results = {
        "torch.func.grad": gradient(*plain),
        "jacrev": torch.func.jacrev(loss, (0, 1))(*plain),
        "jacfwd": torch.func.jacfwd(loss, (0, 1))(*plain),
        "jacobian": torch.autograd.functional.jacobian(loss, tuple(plain), vectorize=True),
        "make_fx": make_fx(gradient)(*[torch.randn_like(tensor) for tensor in plain])(*plain),
    }
    for name, result in results.items():
        for actual, right in zip(result, expected):
            assert torch.allclose(actual, right, atol=1e-7, rtol=1e-6), name
    batched = torch.func.vmap(lambda f: loss(f, plain[1]))(torch.stack([plain[0], 2 * plain[0]]))
    torch.testing.assert_close(batched, torch.stack([loss(plain[0], plain[1]), loss(2 * plain[0], plain[1])]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert loss(*[mode.from_tensor(tensor) for tensor in plain]).shape == ()


def test_memory():
    """No tensor of all logits; a profile, as who looks on gets the readable form, which has one."""
    tensors = [torch.randn(2_048, 3, requires_grad=True), torch.randn(11, 3, requires_grad=True)]
    known = inspect.signature(torch.profiler.profile.__init__).parameters
    accumulates = {"acc_events": True} if "acc_events" in known else {}  # torch 2.2 always does

    def largest(loss):
        with torch.profiler.profile(profile_memory=True, **accumulates) as profile:
            loss().backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    targets = torch.zeros(2_048, dtype=torch.int64)
    logits = 4 * 2_048 * 11
    assert largest(lambda: F.linear(*tensors).log_softmax(-1).gather(1, targets[:, None]).sum()) >= logits
    for loss in (cross_entropy, entmax_loss):
        assert largest(lambda loss=loss: loss(*tensors, targets, chunk_tokens=64)) < logits / 2


@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens_at_all(name):
    features, weight = torch.zeros(0, 7, requires_grad=True), torch.randn(41, 7, requires_grad=True)
    loss = LOSSES[name][0](features, weight, torch.zeros(0, dtype=torch.int64))
    assert loss == 0 and not any(gradient.any() for gradient in torch.autograd.grad(loss, [features, weight]))
    assert LOSSES[name][0](features, weight, torch.zeros(0, dtype=torch.int64), reduce=False).shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_logits_that_overflowed_to_minus_infinity_have_no_part(name, backend):
    loss, (tensors, targets) = LOSSES[name][0], sure(41, 1, torch.float64, tokens=23)
    bias = torch.randn(41, dtype=torch.float64)
    bias[-1] = -torch.inf
    numbers = [torch.full((2, 2), 0.1).double()] * 2 if name == "cross-entropy" else []
    results = []
    for words in (41, 40):
        leaves = [tensor.clone().requires_grad_() for tensor in (tensors[0], tensors[1][:words], bias[:words])]
        value = loss(*leaves[:2], targets % 40, *numbers, bias=leaves[2])
        results.append([value, *torch.autograd.grad(value, leaves)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found[:40] if found.dim() else found, expected[:40] if found.dim() else expected)
    assert not results[0][2][40].any()
    if name == "cross-entropy":  # smoothed, the loss is infinite
        weight = tensors[1].clone().requires_grad_()
        loss(tensors[0], weight, targets % 40, *numbers, bias=bias, smoothing=0.1).backward()
        assert not weight.grad[40].any()
