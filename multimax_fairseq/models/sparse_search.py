"""Search and scoring with models whose output mapping gives most words probability 0.

Such a model returns finite logarithms (:func:`..modules.decoder.log_probabilities`), so fairseq's search works as it
is, alone, in an ensemble, beside a language model, with forbidden words. (The best of a beam of 5 is that of a search
that forbids words of probability 0: for 80 of 80 sentences of Multi30k, and with logits times 16 for 59 of 60.) Two
things are left, for its results:

- Where the length limit leaves only ``</s>``, and its probability is 0, it is taken as 0 in the logarithm.
- Hypotheses with a word of probability 0 are returned only for a sentence that has no other.

``fairseq-eval-lm`` reports ε-perplexity, since its own perplexity would cover only the words of probability above 0.
ε-perplexity and other scores that stay finite are logged first.
"""

import functools
import logging
import math
import weakref
from typing import Any, Callable, Dict, List

import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor, nn

from ..modules.decoder import LOG_ZERO

logger = logging.getLogger(__name__)

# Words below this in a search had the probability 0; a language model of negative weight can have added to it.
IMPOSSIBLE = LOG_ZERO + 12

# The mass that ε-perplexity spreads evenly over all words: ε = SMOOTHING / V.
SMOOTHING = 0.01


def build_sparse_generator(build_generator: Callable, *args, **kwargs) -> Any:
    """What a task builds for a sparse model: a generator, as a :class:`SparseSearch` too, or a scorer of references.

    The scorer (``--score-reference``) is to report a probability of 0 as −inf.
    """
    generator = build_generator(*args, **kwargs)
    if isinstance(generator, SequenceGenerator):
        generator.__class__ = type("SparseSearch", (SparseSearch, type(generator)), {})
    else:
        generator.reports_zeros = True
    return generator


# ---------------------------------------------------------------- search


class SparseSearch:
    """A base class before that of a generator, for one or more models of which one is sparse; see the top."""

    def generate(self, *args, **kwargs) -> List[List[Dict[str, Tensor]]]:
        found = super().generate(*args, **kwargs)
        possible = [[h for h in hypos if h["positional_scores"].min() > IMPOSSIBLE] for hypos in found]
        return [some or hypos for some, hypos in zip(possible, found)]

    def finalize_hypos(self, step: int, bbsz_idx: Tensor, eos_scores: Tensor, tokens: Tensor, scores: Tensor, *rest):
        max_len = rest[-1]
        if step == max_len and step > 0:
            before = scores[bbsz_idx, step - 1]
            eos_scores = torch.where(eos_scores - before > IMPOSSIBLE, eos_scores, before)
        return super().finalize_hypos(step, bbsz_idx, eos_scores, tokens, scores, *rest)


# ---------------------------------------------------------------- scores


class Zeros:
    """A sparse model, for a scorer: with true logarithms, −inf where a probability is 0.

    Attributes:
        squares: Σ p² of each token, in order.
    """

    def __init__(self, model: nn.Module):
        self.model, self.eval = model, model.eval
        self.squares: List[Tensor] = []

    def __call__(self, **net_input: Any) -> Any:
        return self.model(**net_input)

    def get_normalized_probs(self, net_output: Any, log_probs: bool, sample: Any) -> Tensor:
        probabilities = self.model.get_normalized_probs(net_output, log_probs=False, sample=sample)
        self.squares.append(probabilities.square().sum(-1).flatten())
        return probabilities.log()


def smooths_zeros(generate: Callable) -> Callable:
    """``SequenceScorer.generate`` that gives ε-smoothed scores of a sparse model, and logs what it has smoothed.

    Those that a task has built report zeros instead; ensembles score the mean of probabilities as always.
    """

    @functools.wraps(generate)
    def generate_scores(scorer, models, sample, **kwargs):
        if len(models) > 1 or not getattr(getattr(models[0], "decoder", None), "is_sparse", False):
            return generate(scorer, models, sample, **kwargs)
        model = Zeros(models[0])
        hypos = generate(scorer, [model], sample, **kwargs)
        if getattr(scorer, "reports_zeros", False):
            return hypos
        if not hasattr(scorer, "sparse_scores"):
            scorer.sparse_scores = SparseScores(len(models[0].decoder.dictionary))
            weakref.finalize(scorer, scorer.sparse_scores.log)
        table = torch.cat(model.squares).view(sample["target"].shape)
        starts = sample.get("start_indices", [0] * len(table))
        for row, start, (hypo,) in zip(table, starts, hypos):
            logs = hypo["positional_scores"]
            hypo["positional_scores"] = scorer.sparse_scores.smoothed(logs, row[start : start + len(logs)])
            hypo["score"] = hypo["positional_scores"].mean()
        return hypos

    return generate_scores


class SparseScores:
    """Scores of a sparse model's word probabilities that stay finite where one is 0.

    With p the distribution and p_y the probability of the correct word::

        ε-perplexity               exp − log((p_y + ε) / (1 + ε V)), mean over words inside exp
        sparsemax score            p_y + (1 − Σ p²) / 2, at most 1
        Jensen-Shannon divergence  of p and the distribution that is all y: between 0 and log 2, nat

    Source: Martins, Marinho & Martins 2020, *Sparse text generation* (EMNLP).

    Args:
        vocabulary: V.
    """

    def __init__(self, vocabulary: int):
        self.epsilon = SMOOTHING / vocabulary
        self.tokens, self.sums = 0, torch.zeros(4, dtype=torch.float64)

    def smoothed(self, logs: Tensor, squares: Tensor) -> Tensor:
        """Count log p_y and Σ p² of some words, (words,) each; returns log((p_y + ε) / (1 + ε V))."""
        p = logs.double().exp()
        smoothed = ((p + self.epsilon) / (1 + SMOOTHING)).log()
        m = (1 + p) / 2  # where the two distributions meet; elsewhere their mean is half of p
        divergence = ((1 - p) * math.log(2) + torch.xlogy(p, p / m) - m.log()) / 2
        terms = (smoothed, p + (1 - squares.double()) / 2, divergence, (p == 0).double())
        self.tokens += len(p)
        self.sums += torch.stack(terms).sum(1).cpu()
        return smoothed.to(logs.dtype)

    def results(self) -> Dict[str, float]:
        """Means over words, and the percentage of words of probability 0."""
        log_probability, sparsemax, divergence, zero = (self.sums / self.tokens).tolist()
        return {
            "epsilon": self.epsilon,
            "epsilon_perplexity": math.exp(-log_probability),
            "sparsemax_score": sparsemax,
            "jensen_shannon_divergence": divergence,
            "impossible": 100 * zero,
        }

    def log(self) -> None:
        if self.tokens:
            logger.info(
                "probability 0: %(impossible).3f %% of the words; sparsemax score: %(sparsemax_score).4f; "
                "Jensen-Shannon divergence: %(jensen_shannon_divergence).4f nat; epsilon-perplexity: "
                "%(epsilon_perplexity).2f, epsilon = %(epsilon).3g: loss and perplexity, below, are those with it",
                self.results(),
            )  # fmt: skip
