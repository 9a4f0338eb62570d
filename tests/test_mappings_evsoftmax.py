"""EvSoftMax: what is dropped, and the training form."""

import pytest
import torch
from mapping_cases import INF, case_params, dtype_params, masked_scores, random_scores, weighted_gradient
from torch.autograd import gradcheck

from multimax_fairseq.mappings import EvSoftmax, evsoftmax


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        # Mean 3.3. With a 0 for the masked score it would be 2.475 and keep 2.9, with −inf it would keep all.
        ([1.0, 2.9, -INF, 6.0], [False, False, False, True]),
        # Mean −3.3. With a 0 for the masked score it would be −2.475 and drop −2.9.
        ([-1.0, -2.9, -INF, -6.0], [True, True, False, False]),
        # Mean exactly 2: a score at the mean is kept.
        ([1.0, 2.0, 3.0, -INF], [False, True, True, False]),
    ],
)
@dtype_params
def test_mean_leaves_masked_scores_out(scores, kept, dtype):
    assert (evsoftmax(torch.tensor(scores, dtype=dtype)) > 0).tolist() == kept


@case_params("evsoftmax", "evsoftmax_training")
@dtype_params
@pytest.mark.parametrize("length", [3, 7, 49, 1000])
def test_equal_scores_are_all_kept(case, dtype, length):
    """0.1 is no binary number: in single precision the mean of some 0.1s is more than 0.1."""
    scores = torch.full((length,), 0.1, dtype=dtype)
    even = torch.full((length,), 1 / length, dtype=torch.float64)
    torch.testing.assert_close(case.function(scores).double(), even, **case.tolerance(dtype))


def test_kept_scores_share_as_in_softmax():
    scores = random_scores(5, 9)
    probabilities = evsoftmax(scores)
    softmax_of_kept = scores.softmax(-1) * (scores >= scores.mean(-1, keepdim=True))
    expected = softmax_of_kept / softmax_of_kept.sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities, expected, atol=1e-15, rtol=0)


# fp32 adds log ε = −13.8 to a score: what is lost there, up to 1e-6, is the relative error of the result.
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_training_form_gives_epsilon_to_what_is_dropped(dtype, rtol):
    scores = torch.tensor([2.0, 1.0, -1.0, -INF, -3.0], dtype=dtype)  # mean −0.25
    probabilities = evsoftmax(scores, training=True)
    kept_scale = probabilities[:2].double() / scores[:2].double().exp()
    torch.testing.assert_close(kept_scale[0], kept_scale[1], atol=0, rtol=rtol)
    dropped_scale = probabilities[[2, 4]].double() / scores[[2, 4]].double().exp()
    torch.testing.assert_close(dropped_scale, 1e-6 * kept_scale, atol=0, rtol=rtol)
    assert probabilities[3] == 0


def test_training_form_gives_dropped_scores_a_gradient_and_a_finite_likelihood():
    scores = torch.tensor([2.0, 1.0, -1.0, -3.0], requires_grad=True)
    log_likelihood = evsoftmax(scores, training=True)[3].log()
    log_likelihood.backward()
    assert log_likelihood.isfinite()
    assert scores.grad[3] > 0.99  # 1 − p
    assert evsoftmax(scores)[3] == 0


def test_module_uses_the_training_form_only_while_training():
    scores = masked_scores(4, 9)
    module = EvSoftmax()
    assert torch.equal(module.train()(scores), evsoftmax(scores, training=True))
    assert torch.equal(module.eval()(scores), evsoftmax(scores))
    assert not torch.equal(module.train()(scores), module.eval()(scores))
    assert not module.state_dict()


def test_choice_of_what_is_kept_has_no_gradient():
    """What is dropped influences the mean, but not the probabilities of the rest."""
    gradient = weighted_gradient(evsoftmax, torch.tensor([2.0, 1.0, -1.0, -3.0]))
    assert gradient[:2].all() and not gradient[2:].any()


@case_params("evsoftmax", "evsoftmax_training")
def test_gradients(case):
    # No score within 0.1 of its row's mean, −0.3 and 0.5.
    scores = [[1.0, -2.0, -INF, 0.7, -0.9], [-INF] * 5, [0.2, -INF, -INF, 0.8, -INF]]
    assert gradcheck(case.function, torch.tensor(scores, dtype=torch.float64, requires_grad=True))
