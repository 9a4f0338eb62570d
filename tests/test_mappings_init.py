"""What every mapping promises, and ``build_mapping``, which makes one from its name."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from mapping_cases import (
    CASES,
    DTYPES,
    INF,
    assert_matches_oracle,
    assert_on_simplex,
    case_params,
    dtype_params,
    masked_scores,
    random_scores,
    score_matrices,
)
from torch.autograd import gradcheck, gradgradcheck

from multimax_fairseq import mappings
from multimax_fairseq.mappings import MAPPINGS, build_mapping, register_mapping


def test_every_mapping_is_under_test():
    assert set(MAPPINGS) == set(CASES) - {"evsoftmax_training"}


@case_params()
@dtype_params
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_agrees_with_oracle(case, dtype, scale):
    for shape in [(6, 40), (5,), (2, 1, 3, 4), (3, 1)]:
        assert_matches_oracle(case, random_scores(*shape, scale=scale, dtype=dtype).clamp(-20, 20))
    assert_matches_oracle(case, masked_scores(6, 7, scale=scale, dtype=dtype).clamp(min=-INF, max=20))
    for shape in [(0, 3), (2, 0)]:
        assert case.function(torch.zeros(shape, dtype=dtype)).shape == shape


VIEWS = {
    "contiguous": lambda scores: scores,
    "transposed": lambda scores: scores.transpose(0, 1),
    "strided": lambda scores: scores[:, ::2, 1::3],
    "slice": lambda scores: scores.flip(0)[:, 1:4].transpose(1, 2),
    "expanded": lambda scores: scores[:1].expand(4, -1, -1),
}


@case_params()
@pytest.mark.parametrize("view", VIEWS)
def test_any_dimension_of_any_memory_layout_can_hold_the_distribution(case, view):
    scores = VIEWS[view](masked_scores(3, 4, 7, scale=2.0))
    before = scores.clone()
    for dim in (0, 1, 2, -1, -2, -3):
        torch.testing.assert_close(case.function(scores, dim=dim), case.expected(scores, dim), atol=1e-12, rtol=0)
    assert torch.equal(scores, before)


# Several scores in the support and some out of it, none near its edge, a threshold of MultiMax or the row's mean.
POINTS = torch.tensor(
    [[0.3, -0.2, -INF, 0.1, -9.0], [-INF] * 5, [0.6, 0.1, 0.4, -INF, -INF], [-INF, 2.0, -8.0, -7.0, -INF]],
    dtype=torch.float64,
)


@case_params()
def test_gradients_and_their_gradients(case):
    scores = POINTS.clone().requires_grad_()
    assert gradcheck(case.function, scores)
    assert gradcheck(partial(case.function, dim=-2), POINTS.T.contiguous().requires_grad_())
    assert gradgradcheck(case.function, scores)


@case_params()
@pytest.mark.parametrize(("dtype", "large"), [*((dtype, 1e4) for dtype in DTYPES), (torch.float16, 65504.0)])
def test_large_scores_stay_on_the_simplex(case, dtype, large):
    rows = [[large, -large, 0.0, 1.0], [large] * 4, [-large] * 4, [-large, -large, -INF, -INF],
            [large, large, -INF, -large]]  # fmt: skip
    scores = torch.tensor(rows, dtype=dtype, requires_grad=True)
    probabilities = case.function(scores)
    assert_on_simplex(case, probabilities, scores)
    probabilities[:, 0].sum().backward()
    assert scores.grad.isfinite().all()
    even = torch.full((4,), 0.25, dtype=torch.float64)
    for row in (1, 2):
        torch.testing.assert_close(probabilities[row].double(), even, **case.tolerance(dtype))


@case_params()
@settings(max_examples=50, deadline=None, derandomize=True)
@given(scores=score_matrices(limit=20), large=score_matrices(limit=10_000))
def test_property_agrees_with_oracle_and_is_on_the_simplex(case, scores, large):
    assert_matches_oracle(case, scores)
    assert_on_simplex(case, case.function(large), large)


@case_params("evsoftmax", "evsoftmax_training")
@dtype_params
@pytest.mark.parametrize("length", [3, 7, 49, 1000])
def test_equal_scores_are_all_kept_by_a_mean(case, dtype, length):
    """0.1 is no binary number: in single precision the mean of some 0.1s is more than 0.1."""
    scores = torch.full((length,), 0.1, dtype=dtype)
    even = torch.full((length,), 1 / length, dtype=torch.float64)
    torch.testing.assert_close(case.function(scores).double(), even, **case.tolerance(dtype))


@pytest.mark.parametrize("name", MAPPINGS)
def test_build_mapping_makes_the_module_of_a_name(name):
    module = build_mapping(name)
    assert type(module) is MAPPINGS[name]
    function = mappings.entmax15 if name == "entmax" else CASES[name].function
    if name == "multimax":  # whose parameters are drawn
        function = partial(mappings.multimax, **module.state_dict())
    for dtype in DTYPES:
        scores = masked_scores(2, 3, 4, dtype=dtype)
        assert torch.equal(module.eval()(scores), function(scores))
        training = CASES["evsoftmax_training"].function if name == "evsoftmax" else function
        assert torch.equal(module.train()(scores), training(scores))


@pytest.mark.parametrize(("name", "options", "words"), [
    *((name, {}, [repr(name), *MAPPINGS]) for name in ("sofmax", "", "MultiMax")),
    *((name, {"temperature": 2.0}, [f"{name} has no option temperature"]) for name in MAPPINGS),
    *(("multimax", {"order": order}, ["orders 1, 2", repr(order)]) for order in (0, 3)),
    ("multimax", {"init": "zeros"}, ["normal", "identity", "shaped", "'zeros'"]),
    *(("multimax", {"terms": terms}, ["below, above", str(list(terms))]) for terms in (("below", "middle"), ())),
    *(("multimax", {"lr_scale": scale}, ["a finite number above 0", repr(scale)])
      for scale in (0, INF, float("nan"), "ten")),
    *(("entmax", {"alpha": alpha}, ["(1, 2] or 'learned'", repr(alpha)])
      for alpha in (1, 0.5, 2.1, -1.5, float("nan"), INF, "x", "", None, "2.5")),
], ids=str)  # fmt: skip
def test_a_wrong_name_or_option_is_told_the_choices(name, options, words):
    with pytest.raises((TypeError, ValueError)) as error:
        build_mapping(name, **options)
    assert all(word in str(error.value) for word in words)


# ---------------------------------------------------------------- mappings of one's own


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(mappings.registry, "MAPPINGS", dict(MAPPINGS))
    return mappings.registry


class Sharp(torch.nn.Module):
    def __init__(
        self, temperature: float = 0.5, rounds: int = 1, cold: bool = False, kind: "str" = "x", num_heads=None
    ):
        super().__init__()
        self.options = temperature, kind, num_heads


def test_a_registered_mapping_is_built_by_its_name_and_options(registry):
    assert register_mapping("sharp")(Sharp) is Sharp and register_mapping("sharp")(Sharp) is Sharp
    assert registry.build_mapping("sharp", temperature=0.25, num_heads=4).options == (0.25, "x", 4)
    options = registry.parse_options("sharp", "temperature=0.25, rounds=3,cold=true,kind=y")
    assert options == {"temperature": 0.25, "rounds": 3, "cold": True, "kind": "y"}


@pytest.mark.parametrize(("name", "text", "message"), [
    ("multimax", "order=1", "multimax has options of its own"),
    ("sharp", "heat=1", "sharp has no 'heat'; it takes: temperature, rounds, cold, kind"),
    ("sharp", "num_heads=4", "sharp has no 'num_heads'"),
    ("sharp", "rounds=1.5", "rounds of sharp is of type int; got '1.5'"),
    ("sharp", "cold=yes", "cold of sharp is of type bool; got 'yes'"),
    ("sharp", "temperature", "temperature of sharp is of type float; got ''"),
])  # fmt: skip
def test_options_that_a_mapping_cannot_take(name, text, message, registry):
    register_mapping("sharp")(Sharp)
    with pytest.raises(ValueError, match=message):
        registry.parse_options(name, text)


def test_what_cannot_be_registered(registry):
    class Untyped(torch.nn.Module):
        def __init__(self, k=8):
            super().__init__()

    class Needy(torch.nn.Module):
        def __init__(self, k: int):
            super().__init__()

    for name, module, message in [
        ("multimax", Sharp, "there is a mapping 'multimax' already"),
        ("top-k", Sharp, "letters, digits and _ only; got 'top-k'"),
        ("function", mappings.softmax, "register a class of nn.Module"),
        ("untyped", Untyped, "its argument 'k' needs a default, and one of the types int, float, str, bool"),
        ("needy", Needy, "its argument 'k' needs a default"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            register_mapping(name)(module)
    assert set(registry.MAPPINGS) == set(MAPPINGS)
