"""What every mapping promises, and ``build_mapping``, which makes one from its name."""

import sys

import pytest
import torch
from conftest import ROOT, run
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

from multimax_fairseq import mappings
from multimax_fairseq.mappings import MAPPINGS, build_mapping, register_mapping


def test_every_mapping_is_under_test():
    assert set(MAPPINGS) == set(CASES) - {"evsoftmax_training"}


@case_params()
@dtype_params
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_agrees_with_oracle(case, dtype, scale):
    assert_matches_oracle(case, random_scores(6, 40, scale=scale, dtype=dtype).clamp(-20, 20))
    assert_matches_oracle(case, masked_scores(6, 7, scale=scale, dtype=dtype).clamp(min=-INF, max=20))


@case_params()
@dtype_params
def test_keeps_shape_and_dtype(case, dtype):
    for shape in [(5,), (2, 3), (2, 1, 3, 4)]:
        probabilities = case.function(random_scores(*shape, dtype=dtype))
        assert probabilities.shape == shape
        assert probabilities.dtype == dtype


@case_params()
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_tensor_stays_empty(case, shape):
    assert case.function(torch.zeros(shape)).shape == shape


@case_params()
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dimension_can_hold_the_distribution(case, dim):
    scores = masked_scores(3, 4, 5, scale=2.0)
    expected = case.function(scores.movedim(dim, -1).contiguous()).movedim(-1, dim)
    torch.testing.assert_close(case.function(scores, dim=dim), expected, **case.tolerance(scores.dtype))
    torch.testing.assert_close(case.function(scores, dim=dim), case.expected(scores, dim), atol=1e-12, rtol=0)


@case_params()
@dtype_params
def test_single_score_gets_everything(case, dtype):
    scores = torch.tensor([[-20.0], [0.0], [3.0]], dtype=dtype)
    torch.testing.assert_close(case.function(scores), torch.ones(3, 1, dtype=dtype), atol=0, rtol=0)
    padded = torch.cat([torch.full_like(scores, -INF), scores], dim=1)
    assert case.function(padded).tolist() == [[0.0, 1.0]] * 3


@case_params()
@pytest.mark.parametrize(
    "view",
    [
        lambda scores: scores.transpose(0, 1),
        lambda scores: scores[::2, 1::3],
        lambda scores: scores.flip(0)[:, 2:9].t(),
        lambda scores: scores[0].expand(4, -1),
    ],
    ids=["transposed", "strided", "slice", "expanded"],
)
def test_memory_layout_does_not_matter(case, view):
    scores = view(masked_scores(8, 12))
    torch.testing.assert_close(
        case.function(scores), case.function(scores.contiguous()), **case.tolerance(scores.dtype)
    )


@case_params()
def test_input_is_left_alone(case):
    scores = masked_scores(4, 6)
    before = scores.clone()
    case.function(scores)
    assert torch.equal(scores, before)


@case_params()
@pytest.mark.parametrize(
    ("dtype", "large"),
    [
        (torch.float64, 1e4),
        (torch.float32, 1e4),
        (torch.float16, 1e4),
        (torch.float16, 65504.0),
        (torch.bfloat16, 1e4),
    ],
)
def test_large_scores_stay_on_the_simplex(case, dtype, large):
    scores = torch.tensor(
        [
            [large, -large, 0.0, 1.0],
            [large, large, large, large],
            [-large, -large, -large, -large],
            [-large, -large, -INF, -INF],
            [large, large, -INF, -large],
        ],
        dtype=dtype,
    ).requires_grad_()
    probabilities = case.function(scores)
    assert_on_simplex(case, probabilities, scores)
    probabilities[:, 0].sum().backward()
    assert scores.grad.isfinite().all()
    even = torch.full((4,), 0.25, dtype=torch.float64)
    for row in (1, 2):
        torch.testing.assert_close(probabilities[row].double(), even, **case.tolerance(dtype))


# From here on the score of a mask that is finite, −1e8 or −1e9, is an ordinary if small score.
@pytest.mark.parametrize("name", ["softmax", "sparsemax", "entmax15", "entmax", "evsoftmax"])
@pytest.mark.parametrize("size", [1e8, 1e9])
def test_huge_equal_scores_share_evenly(name, size):
    for score in (size, -size):
        scores = torch.full((1, 4), score)
        torch.testing.assert_close(CASES[name].function(scores), torch.full((1, 4), 0.25))


@case_params()
@settings(max_examples=50, deadline=None, derandomize=True)
@given(scores=score_matrices(limit=10_000))
def test_property_probabilities_are_on_the_simplex(case, scores):
    assert_on_simplex(case, case.function(scores), scores)


@case_params()
@settings(max_examples=50, deadline=None, derandomize=True)
@given(scores=score_matrices(limit=20))
def test_property_agrees_with_oracle(case, scores):
    assert_matches_oracle(case, scores)


@pytest.mark.parametrize("name", MAPPINGS)
def test_build_mapping_makes_the_module_of_a_name(name):
    module = build_mapping(name)
    assert type(module) is MAPPINGS[name]
    assert_on_simplex(CASES[name], module(masked_scores(2, 3, 4)).detach(), masked_scores(2, 3, 4))


@pytest.mark.parametrize("name", ["softmax", "sparsemax", "entmax15", "evsoftmax"])
def test_built_mapping_is_the_function_over_the_last_dimension(name):
    for dtype in DTYPES:
        scores = masked_scores(2, 3, 4, dtype=dtype)
        assert torch.equal(build_mapping(name).eval()(scores), CASES[name].function(scores, dim=-1))


def test_build_mapping_passes_options_on():
    multimax = build_mapping("multimax", order=1, init="identity", terms=("above",))
    assert (multimax.order, multimax.init, multimax.terms) == (1, "identity", ("above",))
    assert build_mapping("entmax", alpha=1.25).alpha == 1.25
    assert build_mapping("entmax", alpha="learned", num_heads=3).alpha.shape == (3,)


@pytest.mark.parametrize("name", ["sofmax", "", "MultiMax"])
def test_unknown_name_lists_the_choices(name):
    with pytest.raises(ValueError) as error:
        build_mapping(name)
    assert repr(name) in str(error.value)
    assert all(choice in str(error.value) for choice in MAPPINGS)


@pytest.mark.parametrize("name", MAPPINGS)
def test_unknown_option_is_named(name):
    with pytest.raises(TypeError, match=rf"{name} has no option temperature"):
        build_mapping(name, temperature=2.0)


WITHOUT_FAIRSEQ = """
import importlib.util, sys

class Hiding:
    '''A finder that does not find fairseq.'''
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        return None if name.split(".")[0] == "fairseq" else self.finder.find_spec(name, *args)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert importlib.util.find_spec("fairseq") is None

import numpy, torch

numpy_before = vars(numpy).copy()
safe_globals = getattr(torch.serialization, "get_safe_globals", list)
safe_before = safe_globals()
from multimax_fairseq.mappings import MAPPINGS, build_mapping, multimax

assert vars(numpy) == numpy_before and safe_globals() == safe_before
scores = torch.tensor([[0.0, 1.0, float("-inf")]])
zeros = torch.zeros(2, 2)
assert torch.equal(multimax(scores, zeros, zeros), scores.softmax(-1))
for name in MAPPINGS:
    assert build_mapping(name)(scores).sum().isclose(torch.tensor(1.0)), name
loaded = [module for module in sys.modules if module.split(".")[0] in ("fairseq", "hydra", "omegaconf")]
assert not loaded, loaded
import multimax_fairseq.analysis.files  # of tools that need no model, and start in half the time
print("works")
"""


def test_mappings_work_without_fairseq_and_change_nothing():
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{WITHOUT_FAIRSEQ}"
    assert run(sys.executable, "-c", code).stdout == "works\n"


# ---------------------------------------------------------------- mappings of one's own


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(mappings.registry, "MAPPINGS", dict(MAPPINGS))
    return mappings.registry


class Sharp(torch.nn.Module):
    def __init__(
        self, temperature: float = 0.5, rounds: int = 1, cold: bool = False, kind: str = "x", num_heads=None
    ):
        super().__init__()
        self.options = temperature, rounds, cold, kind, num_heads

    def forward(self, scores):
        return mappings.softmax(scores / self.options[0])


def test_a_registered_mapping_is_built_by_its_name_and_options(registry):
    assert register_mapping("sharp")(Sharp) is Sharp and register_mapping("sharp")(Sharp) is Sharp
    options = {"temperature": 0.25, "rounds": 3, "cold": True, "kind": "y", "num_heads": 4}
    assert registry.build_mapping("sharp", **options).options == (0.25, 3, True, "y", 4)
    assert registry.build_mapping("sharp").options[0] == 0.5


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
