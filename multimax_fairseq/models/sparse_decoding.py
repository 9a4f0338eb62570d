"""Search and scoring with models whose output mapping gives most words probability 0.

fairseq's search reads a log-probability of −inf as "not allowed", and assumes that every hypothesis can end. Neither
holds here. So for models with a sparse output mapping, and only for them,

- a hypothesis continues only with words of probability above 0, as long as one of them is allowed. If none is (the
  length limit allows only ``</s>``, a prefix only its next word), the allowed words get the softmax of their scores
  as probabilities; the logarithm for a single word is then 0.
- a sentence is finished when none of its hypotheses can continue, however few have ended.
- if the beam held every continuation of probability above 0, the result is provably the best; how often that
  happened is logged at the end.
- ``fairseq-eval-lm`` reports ε-perplexity, since its own perplexity would cover only the words of probability above
  0. ε-perplexity and other scores that stay finite are logged first.

All generators come from ``FairseqTask.build_generator``, all scores from ``SequenceScorer``.
"""

import functools
import logging
import math
import weakref
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, Tuple

import torch
from fairseq.search import BeamSearch, LengthConstrainedBeamSearch
from fairseq.sequence_generator import SequenceGenerator, SequenceGeneratorWithAlignment
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ..modules.transformer import LOWEST_LOG

logger = logging.getLogger(__name__)

# How far rounding can move the sum of a row of probabilities from 1.
ROUNDING = 1e-5

# The mass that ε-perplexity spreads evenly over all words: ε = SMOOTHING / V.
SMOOTHING = 0.01


def is_sparse(model: Any) -> bool:
    """Whether a model's output mapping gives most words probability 0."""
    return getattr(getattr(model, "decoder", None), "is_sparse", False)


def install() -> None:
    """Make fairseq search and score with sparse models as described above; does nothing the second time."""
    if not hasattr(FairseqTask.build_generator, "__wrapped__"):
        FairseqTask.build_generator = _with_sparse_generator(FairseqTask.build_generator)
        SequenceScorer.generate = _with_sparse_scores(SequenceScorer.generate)


# ---------------------------------------------------------------- search


def _with_sparse_generator(build):
    @functools.wraps(build)
    def build_generator(task, models, args, seq_gen_cls=None, extra_gen_cls_kwargs=None, **others):
        if any(map(is_sparse, models)):
            if getattr(args, "constraints", None):
                raise ValueError("--constraints: a sparse output mapping can give the words asked for probability 0")
            if seq_gen_cls is None:
                seq_gen_cls = SparseGenerator
                if getattr(args, "print_alignment", None):
                    seq_gen_cls = SparseGeneratorWithAlignment
                    extra_gen_cls_kwargs = {**(extra_gen_cls_kwargs or {}), "print_alignment": args.print_alignment}
        generator = build(
            task, models, args, seq_gen_cls=seq_gen_cls, extra_gen_cls_kwargs=extra_gen_cls_kwargs, **others
        )
        if isinstance(generator, SequenceScorer):
            generator.keeps_zeros = True  # report a reference's probability of 0 as 0
        return generator

    return build_generator


@contextmanager
def _ranked_zeros(models: Iterable[Any]) -> Iterator[None]:
    decoders = [model.decoder for model in models if is_sparse(model)]
    try:
        for decoder in decoders:
            decoder.ranks_zeros = True
        yield
    finally:
        for decoder in decoders:
            decoder.ranks_zeros = False


class SparseGenerator(SequenceGenerator):
    """fairseq's generator, for one or more sparse models (others may be among them); same arguments."""

    fills_beams = False  # whether to repeat the last hypothesis until the beam is full

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.watch = SearchWatch(self.search, self.eos, self.beam_size)
        # The generator is in no reference cycle, so this runs right after the command's last use of it.
        weakref.finalize(self, self.watch.log)

    def _generate(self, sample: Dict[str, Any], *args, **kwargs) -> List[List[Dict[str, Tensor]]]:
        with _ranked_zeros([*self.model.models, self.lm_model]):
            finalized = super()._generate(sample, *args, **kwargs)
        # A hypothesis that was added only to finish a sentence has steps of probability 0.
        found = [[hypo for hypo in hypos if hypo["positional_scores"].isfinite().all()] for hypos in finalized]
        if self.fills_beams:
            found = [hypos + (self.beam_size - len(hypos)) * [{**hypos[-1], "is_copy": True}] for hypos in found]
        return found

    def is_finished(self, step: int, unfin_idx: int, *args, **kwargs) -> bool:
        finished = super().is_finished(step, unfin_idx, *args, **kwargs) or self.watch.is_exhausted(unfin_idx)
        if finished:
            self.watch.count(unfin_idx)
        return finished


class SparseGeneratorWithAlignment(SequenceGeneratorWithAlignment, SparseGenerator):
    """The same with ``--print-alignment``, which needs a full beam of hypotheses."""

    fills_beams = True

    def generate(self, *args, **kwargs) -> List[List[Dict[str, Tensor]]]:
        return [[hypo for hypo in hypos if "is_copy" not in hypo] for hypos in super().generate(*args, **kwargs)]


class SearchWatch:
    """Stands between a generator and its search strategy: see the top of this file.

    Args:
        search: any of fairseq's strategies; its ``step`` is replaced.
        eos: its index in the target dictionary.
        beam_size: number of hypotheses that continue.

    Attributes:
        sentences, exact: those finished, and those searched exhaustively (0 unless plain beam search).
    """

    def __init__(self, search: nn.Module, eos: int, beam_size: int):
        self.eos, self.beam_size = eos, beam_size
        self.is_plain = type(search) is BeamSearch
        self.sentences = self.exact = 0
        # by sentence number: whether a continuation was lost, and how many hypotheses have ended
        self._lost: Dict[int, bool] = {}
        self._ended: Dict[int, int] = {}
        if isinstance(search, LengthConstrainedBeamSearch):  # it forbids words, and calls another for the rest
            search = search.beam
        self._inner = search.step
        search.step = self.step

    def step(self, step: int, lprobs: Tensor, scores: Tensor, *args, **kwargs) -> Tuple[Tensor, Tensor, Tensor]:
        """As fairseq's ``Search.step``, with ``lprobs``, (bsz, beam, V), from a decoder that ranks zeros."""
        alive = torch.ones_like(lprobs[..., 0], dtype=torch.bool) if step == 0 else scores[..., step - 1] > -math.inf
        positive = lprobs.masked_fill(lprobs < LOWEST_LOG, -math.inf)
        stuck = alive & (positive.amax(-1) == -math.inf) & (lprobs.amax(-1) > -math.inf)
        if stuck.any():
            positive[stuck] = lprobs[stuck].log_softmax(-1)
        if self.is_plain:
            continues = positive.masked_fill(~alive.unsqueeze(-1), -math.inf)
            before = (continues.logsumexp(-1).exp() < 1 - ROUNDING) & alive | stuck  # some words are not allowed
            continues = (continues[:, :1] if step == 0 else continues) > -math.inf  # (bsz, beam or 1, V)
        cand_scores, cand_indices, cand_beams = self._inner(step, positive, scores, *args, **kwargs)
        self._exhausted = (cand_scores == -math.inf).all(1).tolist()
        self._numbers = args[1].tolist() if len(args) > 1 else list(range(len(lprobs)))
        if self.is_plain:
            is_kept = (cand_indices == self.eos) & (cand_scores > -math.inf)
            ends = continues[..., self.eos].sum(1)
            self._going_on = (continues.sum((1, 2)) - ends).tolist()
            kept = is_kept[:, : self.beam_size].sum(1)
            self._note(step, before.any(1).tolist(), ends.tolist(), kept.tolist())
        for sentence, is_exhausted in enumerate(self._exhausted):
            if is_exhausted:  # add an ending: else fairseq does not check whether the sentence is finished
                cand_scores[sentence, 0] = torch.finfo(cand_scores.dtype).min
                cand_indices[sentence, 0] = self.eos
                cand_beams[sentence, 0] = 0
        return cand_scores, cand_indices, cand_beams

    def _note(self, step: int, forbidden: List[bool], ends: List[int], kept: List[int]) -> None:
        for sentence, number in enumerate(self._numbers):
            if step == 0:
                self._lost[number], self._ended[number] = False, 0
            self._ended[number] += ends[sentence]
            self._lost[number] |= (
                forbidden[sentence]
                or self._going_on[sentence] > self.beam_size
                or kept[sentence] < ends[sentence]
                or self._ended[number] > self.beam_size
            )

    def is_exhausted(self, sentence: int) -> bool:
        """Whether no hypothesis of this sentence of the batch could continue in the last step."""
        return self._exhausted[sentence]

    def count(self, sentence: int) -> None:
        """Count a sentence of the batch, finished after the last step."""
        self.sentences += 1
        if self.is_plain:
            number = self._numbers[sentence]
            self.exact += not self._lost.pop(number) and self._going_on[sentence] == 0
            self._ended.pop(number)

    def log(self) -> None:
        if self.is_plain and self.sentences:
            logger.info(
                "beam search was provably exact for %d of %d sentences (%.1f %%): every continuation of probability "
                "above 0 was in the beam of %d",
                self.exact, self.sentences, 100 * self.exact / self.sentences, self.beam_size,
            )  # fmt: skip


# ---------------------------------------------------------------- scores


def _with_sparse_scores(generate):
    @functools.wraps(generate)
    def generate_with_scores(scorer, models, sample, **kwargs):
        if len(models) > 1 or not is_sparse(models[0]) or getattr(scorer, "keeps_zeros", False):
            return generate(scorer, models, sample, **kwargs)
        (model,) = models
        if not hasattr(scorer, "sparse_scores"):
            scorer.sparse_scores = SparseScores(len(model.decoder.dictionary))
            weakref.finalize(scorer, scorer.sparse_scores.log)
        squares: List[Tensor] = []  # Σ p² of each token, in order
        normalized = model.get_normalized_probs

        def noting_squares(*args, **kwargs):
            log_probabilities = normalized(*args, **kwargs)
            squares.append((2 * log_probabilities).exp().sum(-1).flatten())
            return log_probabilities

        model.get_normalized_probs = noting_squares
        try:
            hypos = generate(scorer, models, sample, **kwargs)
        finally:
            del model.get_normalized_probs
        table = torch.cat(squares).view(sample["target"].shape)
        starts = sample.get("start_indices", [0] * len(table))
        for row, start, (hypo,) in zip(table, starts, hypos):
            logs = hypo["positional_scores"]
            scorer.sparse_scores.update(logs, row[start : start + len(logs)])
            hypo["positional_scores"] = scorer.sparse_scores.smoothed(logs)
            hypo["score"] = hypo["positional_scores"].sum() / len(logs)
        return hypos

    return generate_with_scores


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
        self.vocabulary, self.epsilon = vocabulary, SMOOTHING / vocabulary
        self.tokens, self.sums = 0, torch.zeros(4, dtype=torch.float64)

    def smoothed(self, logs: Tensor) -> Tensor:
        """log((p_y + ε) / (1 + ε V)), from log p_y."""
        return ((logs.exp() + self.epsilon) / (1 + SMOOTHING)).log()

    def update(self, logs: Tensor, squares: Tensor) -> None:
        """Add log p_y and Σ p² of some words, (words,) each."""
        p = logs.double().exp()
        m = (1 + p) / 2  # where the two distributions meet; elsewhere their mean is half of p
        divergence = ((1 - p) * math.log(2) + torch.xlogy(p, p / m) - m.log()) / 2
        terms = (self.smoothed(logs).double(), p + (1 - squares.double()) / 2, divergence, (p == 0).double())
        self.tokens += len(p)
        self.sums += torch.stack(terms).sum(1).cpu()

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
