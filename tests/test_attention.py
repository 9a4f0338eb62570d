"""``mapped_attention`` against ten lines of float64, as torch's own operators behave, and with mappings of one's own.

``ATTENTION_CASES=2000 pytest tests/test_attention.py -k random`` takes so many random cases.
"""

import itertools
import math
import os
import random
import subprocess
import sys
from functools import partial

import entmax as package
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, needs_compiler
from test_kernels_rows_cpu import ORACLES
from torch import nn
from torch.autograd import forward_ad

from multimax_fairseq.attention import attend, mapped_attention
from multimax_fairseq.kernels.attention import blocks
from multimax_fairseq.mappings import ABSENT, MAPPINGS, MultiMax, build_mapping
from multimax_fairseq.mappings.masking import probabilities_by

CASES = int(os.environ.get("ATTENTION_CASES", 60))
INF = math.inf


class Temperatures(nn.Module):
    """A mapping of one's own, written as one would: a temperature for each head."""

    def __init__(self, num_heads=1):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.linspace(-0.3, 0.5, num_heads).view(-1, 1, 1))

    def forward(self, scores):
        return torch.softmax(scores * (-self.log_temperature).exp(), dim=-1)


class Sorts(nn.Module):
    """Sparsemax of scores times a buffer, by sorting."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, scores):
        scores = scores * self.factor
        ordered = scores.sort(dim=-1, descending=True).values
        count = torch.arange(1, scores.size(-1) + 1, dtype=scores.dtype)
        totals = ordered.cumsum(-1) - 1
        size = (count * ordered > totals).sum(-1, keepdim=True)
        return (scores - totals.gather(-1, size - 1) / size).clamp(min=0)


OWN = {"temperatures": Temperatures, "sorts": Sorts}
EVERY = [*MAPPINGS, *OWN]


def make(name, num_heads=1):
    if name in OWN:
        return Temperatures(num_heads) if name == "temperatures" else Sorts()
    options = {"entmax": {"alpha": "learned", "num_heads": num_heads}}
    mapping = build_mapping(name, **options.get(name, {})).eval()
    for parameter in mapping.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mapping


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "auto")


# ---------------------------------------------------------------- the oracle


def over_present(function):
    """``function``, a mapping of whole rows in which −inf may be, with zeros for rows of nothing else."""

    def probabilities(x):
        empty = (x == -INF).all(-1, keepdim=True)
        return function(x.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)

    return probabilities


def oracle(name, mapping, query, key, value, mask, causal, scale):
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -INF)
    numbers = [number.to(scores.dtype) for number in (mapping.kernel_rows().numbers if name in MAPPINGS else ())]
    rows = {
        "temperatures": lambda x: (x.clamp(min=-1e9) * (-mapping.log_temperature).exp().to(x.dtype)).softmax(-1),
        "sorts": lambda x: package.sparsemax(x / 2, dim=-1),
    }.get(name, lambda x: ORACLES[name](x, *numbers))
    return over_present(rows)(scores) @ value


def gradients(function, inputs, upstream):
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype), allow_unused=True)]


def random_case(draw):
    torch.manual_seed(draw.getrandbits(32))
    longest = draw.choice([3, 40, 40, 200, 700])
    batch, heads = draw.randint(1, 2), draw.randint(1, 3)
    tgt_len, src_len = draw.randint(1, longest), draw.randint(1, longest)
    tgt_len = src_len if draw.random() < 0.5 else tgt_len
    head_dim, value_dim = draw.randint(1, 160), draw.randint(1, 160)
    value_dim = head_dim if draw.random() < 0.7 else value_dim
    mask = None
    if draw.random() < 0.6:
        shape = [draw.choice([1, size]) for size in (batch, heads, tgt_len, src_len)][draw.randint(0, 3) :]
        mask = torch.rand(shape) > draw.choice([0.1, 0.5, 0.9])
        if draw.random() < 0.5:
            mask = torch.randn(shape).masked_fill(~mask, draw.choice([-INF, -1e4, 0.0]))

    def laid_out(length, dim):
        if draw.random() < 0.5:
            return torch.randn(length, batch, heads, dim).permute(1, 2, 0, 3)
        return torch.randn(batch, heads, length, dim)

    tensors = laid_out(tgt_len, head_dim), laid_out(src_len, head_dim), laid_out(src_len, value_dim)
    spread = draw.choice([0.3, 1.0, 3.0])
    return [tensors[0] * spread, *tensors[1:]], laid_out(tgt_len, value_dim), mask, draw.random() < 0.5


@pytest.mark.parametrize("number", range(CASES))
def test_random_cases(number):
    """No result and no gradient has more than twice the error of the same lines in the dtype of the inputs.

    Besides, for what is a difference of large sums, or jumps where rounding moves a score over a threshold.
    """
    draw = random.Random(number)
    name, dtype = EVERY[number % len(EVERY)], draw.choice([torch.float32, torch.float32, torch.bfloat16])
    tensors, upstream, mask, causal = random_case(draw)
    mapping = make(name, tensors[0].size(1))
    numbers = list(mapping.parameters())
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    upstream, scale = upstream.to(dtype), tensors[0].size(-1) ** -0.5
    if mask is not None and mask.is_floating_point():
        mask = mask.masked_fill(mask < -9_000, -INF)

    def run(function, inputs):
        return gradients(lambda *given: function(*given[:3]), [*inputs, *numbers], upstream)

    exact = run(lambda q, k, v: oracle(name, mapping.double(), q, k, v, mask, causal, scale), wide)
    mapping.float()
    plain = run(lambda q, k, v: oracle(name, mapping, q, k, v, mask, causal, scale).to(dtype), tensors)
    ours = run(lambda q, k, v: mapped_attention(q, k, v, mapping, mask, is_causal=causal), tensors)
    floor = 2e-3 if name == "evsoftmax" else 2e-5
    for kind, a, b, right in zip(["output", "query", "key", "value", *"numbers"], ours, plain, exact):
        size = max(right.norm().item(), 1e-3 * exact[0].norm().item())
        error, usual = ((tensor.double() - right).norm().item() / (size + 1e-30) for tensor in (a, b))
        assert error <= 2 * usual + (10 * floor if kind == "n" else floor), (name, dtype, kind, error, usual)


# ---------------------------------------------------------------- as torch's own operators


class Attends(nn.Module):
    """A mapping over rows, or attention of its argument to so many keys."""

    def __init__(self, name, keys):
        super().__init__()
        self.mapping, self.keys = make(name), keys
        self.register_buffer("key", torch.randn(1, 1, keys, 4))

    def forward(self, x):
        return mapped_attention(x, self.key, self.key.cos(), self.mapping) if self.keys else self.mapping(x)

    def case(self):
        return self, torch.randn(1, 1, 3, 4)


def exact(function):
    """``function`` in backend eager: its formula, differentiated by autograd."""

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MULTIMAX_BACKEND", "eager")
            return function(*arguments)

    return run


def second(get):
    """A Hessian-vector product of Σ f², by ``get(first derivative · 1, x)``."""

    def run(f, x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        return get(first.square().sum(), x)

    return run


def backward(loss, x):
    (before,) = [None if x.grad is None else x.grad.clone()]
    loss.backward()
    return x.grad if before is None else x.grad - before


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent


def batched(f, x):
    x = x.clone().requires_grad_()
    output = f(x)
    upstreams = torch.stack([output.detach(), output.detach().cos()])
    return torch.autograd.grad(output, x, upstreams, is_grads_batched=True)


def made(f, x):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(lambda x: f(x))(x.sin())(x)


def exported(f, x):
    return torch.export.export(f, (x,), strict=True).module()(x)


def fake(f, x):
    from torch._subclasses import FakeTensorMode

    f(x)  # what is compiled before must not be given fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = f(mode.from_tensor(x))
    assert type(result).__name__ == "FakeTensor"
    return torch.empty(result.shape)  # there are no numbers to compare


TRANSFORMS = {
    "torch.func.grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "per-sample gradients": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(
        torch.stack([x, 2 * x])
    ),
    "hessian": lambda f, x: torch.func.hessian(lambda shift: f(x + shift).square().sum())(torch.zeros(x.size(-1))),
    "forward AD": forward_mode,
    "jacobian, vectorised": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "batched gradients": batched,
    "make_fx": made,
    "fake tensors": fake,
    "torch.compile": lambda f, x: torch.compile(f, fullgraph=True, backend="aot_eager")(x),
    "export": exported,
    "double backward": second(lambda loss, x: torch.autograd.grad(loss, x)),
    "double backward()": second(lambda loss, x: backward(loss, x)),
    "torch.jit.trace": lambda f, x: torch.jit.trace(f, x.sin(), check_trace=False)(x),
}


def cells():
    """Mapping, number of keys (0: rows alone), transform."""
    for name, keys, transform in itertools.product(MAPPINGS, (0, 64, 256), TRANSFORMS):
        takes_seconds = transform in ("torch.compile", "export", "torch.jit.trace")
        if takes_seconds and keys == 64 and name != "multimax":  # between rows alone and blocks
            continue
        marks = [pytest.mark.slow] if takes_seconds and keys and name != "multimax" else []
        yield pytest.param(name, keys, transform, marks=marks, id=f"{name}, {keys or 'no'} keys, {transform}")


@pytest.mark.parametrize(("name", "keys", "transform"), cells())
def test_torch_transforms_it_as_its_own_operators(name, keys, transform):
    """At no length does the answer to "does this work?" change."""
    function, x = Attends(name, keys).case()
    right = exact(partial(TRANSFORMS[transform], function))(x)
    torch._dynamo.reset()
    found = TRANSFORMS[transform](function, x)
    if transform != "fake tensors":
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


@needs_compiler
def test_dropout_refuses_gradients_of_gradients():
    query = torch.randn(1, 1, 5, 4, requires_grad=True)
    output = mapped_attention(query, query, query, "multimax", dropout_p=0.5)
    with pytest.raises(RuntimeError, match="leave out its dropout, or set MULTIMAX_BACKEND=eager"):
        torch.autograd.grad(output.square().sum(), query, create_graph=True)


@pytest.mark.parametrize("kind", ["strides", "dtype"])
@pytest.mark.parametrize("name", MAPPINGS)
def test_saved_tensors_may_come_back_with_other_strides_and_dtypes(name, kind):
    def unpack(tensor):
        if kind == "strides":
            return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
        return tensor.double()

    for keys in (0, 64):
        function, x = Attends(name, keys).case()
        x = x.requires_grad_()
        weights = torch.randn_like(function(x))
        (right,) = torch.autograd.grad((function(x) * weights).sum(), x)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            loss = (function(x) * weights).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], right, atol=1e-5, rtol=1e-5)


def test_a_number_that_is_negative_without_being_written_so():
    """PyTorch may keep the sign of a tensor beside its memory, which no kernel may then read."""
    x = torch.randn(2, 3, 5, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    mapping = make("multimax")
    torch.testing.assert_close(mapped_attention(x, x, x, mapping), mapped_attention(*[x.resolve_neg()] * 3, mapping))


# ---------------------------------------------------------------- mappings of one's own


class Cold(MultiMax):
    def forward(self, scores):
        return super().forward(scores * 4)


@pytest.mark.parametrize("length", [5, 300])
def test_a_class_derived_from_a_mapping_is_itself(length):
    mapping, calls = Cold(), []
    query, key, value = (torch.randn(1, 2, length, 4) for _ in range(3))
    expected = attend(query / 2, key, value, mapping)
    torch.testing.assert_close(mapped_attention(query, key, value, mapping), expected)
    hooked = MultiMax()
    hooked.register_forward_hook(lambda *_: calls.append(1))
    mapped_attention(query, key, value, hooked)
    assert calls


def test_what_an_own_mapping_sees():
    seen = []

    class Sees(nn.Module):
        def forward(self, scores):
            seen.append(scores)
            return torch.ones_like(scores)

    scores = torch.tensor([[0.5, -INF], [-INF, -INF]], dtype=torch.bfloat16)
    assert torch.equal(probabilities_by(Sees())(scores), torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.bfloat16))
    assert torch.equal(seen[0], torch.tensor([[0.5, ABSENT], [0.0, 0.0]]))


def test_gradients_of_half_precision_numbers_are_summed_over_blocks_in_single(monkeypatch):
    monkeypatch.setitem(blocks.WHOLE, "cpu", 0)
    monkeypatch.setitem(blocks.QUERIES, "cpu", 2)
    tensors, grads = [torch.randn(1, 32, 100, 4) for _ in range(3)], []
    for dtype in (torch.bfloat16, torch.float32):
        mapping = Temperatures(32).bfloat16().to(dtype)
        mapped_attention(*tensors, mapping).sum().backward()
        grads.append(mapping.log_temperature.grad)
    assert torch.equal(grads[0], grads[1].bfloat16())


# ---------------------------------------------------------------- the same by every way


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_are_the_whole(name, causal, monkeypatch):
    monkeypatch.setattr("multimax_fairseq.attention.kernels_for", lambda *_: None)
    mapping, results = make(name, 3).double(), []
    tensors = [torch.randn(2, 3, 11, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    added = torch.randn(2, 1, 11, 11, dtype=torch.float64).requires_grad_()
    for scores in (0, 40, 3 * 11 * 4):
        monkeypatch.setitem(blocks.WHOLE, "cpu", 0 if scores else 2**20)
        monkeypatch.setitem(blocks.SCORES, "cpu", scores)
        output = mapped_attention(*tensors, mapping, added, is_causal=causal)
        wanted = [*tensors, added, *mapping.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    for found in results[1:]:
        allowed = 2e-6 if name == "entmax" else 1e-10  # α is computed in fp32
        torch.testing.assert_close(found, results[0], atol=allowed, rtol=allowed)


@pytest.mark.parametrize("name", EVERY)
def test_long_rows_keep_nothing_of_length_squared(name):
    length, kept = 2_048, []
    tensors = [torch.randn(1, 1, length, 4, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        mapped_attention(*tensors, make(name), is_causal=True)
    assert max(kept) <= 8 * length


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("large", [False, True])
def test_dropout(name, large, monkeypatch):
    """Equal scores and values that show each probability; the backward drops what the forward has dropped."""
    monkeypatch.setitem(blocks.WHOLE, "cpu", 0 if large else 2**20)
    length, mapping = 40, make(name)
    query, value = torch.zeros(8, length, length), torch.eye(length).expand(8, -1, -1).clone().requires_grad_()
    torch.manual_seed(1)
    output = mapped_attention(query, query, value, mapping, dropout_p=0.25)
    kept = output > 0
    torch.testing.assert_close(output, kept / 30)
    assert abs(kept.double().mean() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / kept.numel())
    upstream = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, value, upstream)
    torch.testing.assert_close(grad, output.detach().mT @ upstream)
    torch.manual_seed(1)
    assert torch.equal(mapped_attention(query, query, value, mapping, dropout_p=0.25), output)


@pytest.mark.parametrize("name", EVERY)
def test_all_may_be_dropped(name):
    assert mapped_attention(*torch.randn(3, 2, 5, 4), make(name), dropout_p=1.0).eq(0).all()


@pytest.mark.parametrize("shapes", [
    ((5, 4), (7, 4), (7, 6)), ((3, 5, 4), (3, 7, 4), (3, 7, 4)), ((2, 1, 3, 5, 4), (1, 2, 3, 7, 4), (3, 7, 4)),
    ((2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 4)), ((0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 4)),
    ((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 4)),
])  # fmt: skip
@pytest.mark.parametrize("name", EVERY)
def test_shapes_broadcast_as_in_pytorchs_function(name, shapes):
    tensors = [torch.randn(shape) for shape in shapes]
    mask = torch.rand(shapes[0][-2], shapes[1][-2]) > 0.3
    expected = F.scaled_dot_product_attention(*tensors, mask).nan_to_num(0.0)
    assert mapped_attention(*tensors, make(name), mask).shape == expected.shape
    torch.testing.assert_close(mapped_attention(*tensors, "softmax", mask), expected)


def test_autocast_acts_as_on_pytorchs_function():
    tensors = [torch.randn(2, 3, 9, 4, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = mapped_attention(*tensors, "softmax"), F.scaled_dot_product_attention(*tensors)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, atol=2e-2, rtol=2e-2)
    assert torch.autograd.grad(output.sum(), tensors)[0].dtype == torch.float32


@pytest.mark.parametrize(("change", "message"), [
    ({"query": torch.zeros(4)}, "of two dimensions or more"),
    ({"key": torch.zeros(2, 7, 3)}, "queries and keys have one head_dim"),
    ({"value": torch.zeros(2, 6, 4)}, "keys and values one length"),
    ({"key": torch.zeros(2, 7, 4).double()}, "one floating-point dtype"),
    ({"key": torch.zeros(3, 7, 4)}, "does not broadcast"),
    ({"attn_mask": torch.zeros(6, 7)}, r"attn_mask has to broadcast to \(2, 5, 7\); got \(6, 7\)"),
    ({"attn_mask": torch.zeros(5, 7, dtype=torch.uint8)}, "true where a key takes part"),
    ({"dropout_p": 1.5}, "dropout_p is a probability"),
    ({"value": torch.zeros(2, 7, 4, device="meta")}, "on one device"),
    ({"mapping": torch.softmax}, "mapping is a module over the last dimension of scores, or a name; got"),
    ({"mapping": "soft"}, "there is no mapping 'soft'; choose from"),
])  # fmt: skip
def test_what_does_not_fit_is_said(change, message):
    arguments = {"query": torch.zeros(2, 5, 4), "key": torch.zeros(2, 7, 4), "value": torch.zeros(2, 7, 4)}
    with pytest.raises(ValueError, match=message):
        mapped_attention(**{**arguments, "mapping": "softmax", **change})


def test_it_needs_no_fairseq_and_imports_go_one_way():
    code = (
        "import sys\n"
        "class Without:\n"
        "    find_spec = staticmethod(lambda name, *_: 1 / 0 if name.split('.')[0] == 'fairseq' else None)\n"
        "sys.meta_path.insert(0, Without)\n"
        "import torch, multimax_fairseq.kernels.attention, multimax_fairseq.kernels.rows.mapped\n"
        "names = {name.split('.')[1] for name in sys.modules if name.startswith('multimax_fairseq.')}\n"
        "assert names == {'kernels'}, names\n"
        "from multimax_fairseq.mappings import MAPPINGS, build_mapping\n"
        "assert 'multimax_fairseq.attention' not in sys.modules\n"
        "assert all(build_mapping(name)(torch.zeros(1, 4)).sum() > 0.99 for name in MAPPINGS)\n"
        "import multimax_fairseq.tools\n"
        "from multimax_fairseq.attention import mapped_attention\n"
        "assert 'multimax_fairseq.modules' not in sys.modules\n"
        "print(mapped_attention(*[torch.randn(2, 3, 5, 4)] * 3, 'multimax').shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "torch.Size([2, 3, 5, 4])", result.stderr


def test_values_without_numbers_and_heads_without_dimensions():
    query, key = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 6, 5)
    mapped_attention(query, key, torch.randn(2, 3, 6, 0), "multimax").sum().backward()
    assert torch.equal(query.grad, torch.zeros_like(query))
    output = mapped_attention(query[..., :0], key[..., :0], key, "softmax")
    torch.testing.assert_close(output, key.mean(2, keepdim=True).expand_as(query))


def test_a_mapping_may_have_attributes_of_any_name_and_hooks_of_all_modules_run():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.factor = 3, nn.Parameter(torch.ones(()))

        def forward(self, scores):
            return (scores * self.factor).softmax(-1)

    mapping, inputs, seen = Scaled(), torch.randn(3, 2, 9, 4), []
    mapped_attention(*inputs, mapping, is_causal=True).square().sum().backward()
    assert mapping.factor.grad.isfinite()
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        mapped_attention(*inputs, build_mapping("sparsemax"))
    assert len(seen) == 1
