"""Search and scores of sparse models: fairseq's own generator, all its strategies, beside other models."""

import logging
import math
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import TINY_LM, parse
from fairseq import tasks
from fairseq.sequence_scorer import SequenceScorer
from fairseq.token_generation_constraints import pack_constraints

from multimax_fairseq.models.sparse_search import IMPOSSIBLE, SparseSearch

SPARSE = ["sparsemax", "entmax15", "entmax"]


def sharpened(built, factor):
    """The model with the logits of a trained one: so far apart that a few words have all of the probability."""
    with torch.no_grad():
        built.model.decoder.output_projection.weight *= factor
    return built


def generate(built, sample, models=None, builds=(), **options):
    """A generator of these options (``builds``: what only Python gives it), and its hypotheses of each sentence."""
    models = models or [built.model]
    args = Namespace(**{"beam": 5, "max_len_b": 5, **options})
    generator = built.task.build_generator(models, args, **dict(builds))
    given = {"prefix_tokens": sample["target"][:, : options["prefix_size"]]} if "prefix_size" in options else {}
    if "constraints" in options:
        given["constraints"] = pack_constraints([[torch.tensor([9 + row])] for row in range(len(sample["target"]))])
    return generator, built.task.inference_step(generator, models, sample, **given)


def check(hypotheses, beam):
    for hypos in hypotheses:
        assert 1 <= len(hypos) <= beam
        for hypo in hypos:
            assert torch.isfinite(hypo["positional_scores"]).all() and torch.isfinite(hypo["score"])
            assert hypo["positional_scores"].max() < 1e-4
            assert hypo["tokens"][-1] == 2 and not {1, 2} & set(hypo["tokens"][:-1].tolist())


STRATEGIES = [
    {"sampling": True}, {"sampling": True, "sampling_topk": 4}, {"sampling": True, "sampling_topp": 0.8},
    {"diverse_beam_groups": 2, "beam": 4}, {"diversity_rate": 0.5}, {"prefix_size": 2}, {"min_len": 3},
    {"match_source_len": True}, {"print_alignment": "hard"}, {"no_repeat_ngram_size": 1}, {"temperature": 3.0},
    {"unkpen": 2.0}, {"constraints": "ordered"},
]  # fmt: skip


@pytest.mark.parametrize("factor, mapping, options", [
    *((factor, mapping, {"beam": beam}) for factor in (1, 50) for mapping in SPARSE for beam in (1, 200)),
    *((50, "entmax15", options) for options in STRATEGIES),
], ids=str)  # fmt: skip
def test_every_strategy_finds_hypotheses(factor, mapping, options, build, batch):
    """Of a model after 0 updates, and of one with very few words above 0; within five tokens."""
    built = sharpened(build("multimax_transformer", "--output-mapping", mapping), factor)
    sample = batch(built, size=3)
    _, hypotheses = generate(built, sample, **options)
    if not {"diverse_beam_groups", "diversity_rate", "match_source_len"} & set(options):
        check(hypotheses, options.get("beam", 5))
        assert all(len(hypo["tokens"]) <= 6 for hypos in hypotheses for hypo in hypos)
    for hypos in hypotheses:  # those with a word of probability 0 only where there are no others
        assert len({(hypo["positional_scores"].min() > IMPOSSIBLE).item() for hypo in hypos}) == 1
    assert all(hypos and not torch.cat([h["positional_scores"] for h in hypos]).isnan().any() for hypos in hypotheses)
    if "prefix_size" in options:
        for hypos, target in zip(hypotheses, sample["target"]):
            assert all(hypo["tokens"][:2].equal(target[:2]) for hypo in hypos)
    if "constraints" in options:
        assert all(9 + row in hypos[0]["tokens"].tolist() for row, hypos in enumerate(hypotheses))
    if "print_alignment" in options:
        assert all("alignment" in hypo for hypos in hypotheses for hypo in hypos)


def log_probability(models, sample, row, tokens):
    """Of a translation of a sentence, by teacher forcing: the logarithm of the mean of the models' probabilities."""
    tokens = torch.tensor([tokens])
    net_input = {"src_tokens": sample["net_input"]["src_tokens"][[row]],
                 "src_lengths": sample["net_input"]["src_lengths"][[row]],
                 "prev_output_tokens": torch.cat([tokens.new_full((1, 1), 2), tokens[:, :-1]], 1)}  # fmt: skip
    with torch.no_grad():
        probabilities = [model.get_normalized_probs(model(**net_input), log_probs=False) for model in models]
    steps = torch.stack(probabilities).mean(0)[0].gather(1, tokens[0].unsqueeze(1)).squeeze(1)
    return steps.log()


@pytest.mark.parametrize("outputs", [["softmax"], ["entmax15"], ["entmax15", "entmax15"], ["softmax", "entmax15"]])
def test_scores_are_the_logarithms_of_the_mean_of_the_models_probabilities(outputs, build, batch):
    builts = [sharpened(build("multimax_transformer", "--output-mapping", output, seed=seed), 4)
              for seed, output in enumerate(outputs)]  # fmt: skip
    sample, models = batch(builts[0], size=2), [built.model for built in builts]
    generator, hypotheses = generate(builts[-1], sample, models)
    assert isinstance(generator, SparseSearch) == ("entmax15" in outputs)
    check(hypotheses, 5)
    for row, hypos in enumerate(hypotheses):
        for hypo in hypos:
            expected = log_probability(models, sample, row, hypo["tokens"].tolist())
            if expected[-1] <= IMPOSSIBLE and len(expected) == 6:  # at the limit it is taken as 0
                expected[-1] = 0.0
            torch.testing.assert_close(hypo["positional_scores"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("output, weight, how", [
    ("softmax", 0.3, {}), ("softmax", -0.3, {"sampling": True}), ("softmax", 0.0, {}),
    ("sparsemax", 0.3, {"sampling": True}), ("sparsemax", -0.3, {}), ("sparsemax", 0.0, {"sampling": True}),
], ids=str)  # fmt: skip
def test_a_sparse_language_model_beside_another_model(output, weight, how, build, batch, corpus, tmp_path):
    shutil.copy(corpus / "data-bin" / "dict.en.txt", tmp_path / "dict.txt")
    _, cfg = parse([tmp_path, "--task", "language_modeling", "--arch", "multimax_transformer_lm", *TINY_LM,
                    "--output-mapping", "sparsemax"])  # fmt: skip
    lm = sharpened(Namespace(model=tasks.setup_task(cfg.task).build_model(cfg.model).eval()), 30).model
    built = sharpened(build("multimax_transformer", "--output-mapping", output), 3)
    sample = batch(built, size=3)
    results = []
    for extra in ({"lm_model": lm, "lm_weight": weight}, {}):
        torch.manual_seed(0)
        options = {"beam": 3, "max_len_b": 10, **how}
        results.append(generate(built, sample, builds={"extra_gen_cls_kwargs": extra}, **options)[1])
    for hypos in results[0]:
        assert hypos and all(hypo["positional_scores"].isfinite().all() for hypo in hypos)
    tokens = [[hypo["tokens"].tolist() for hypos in found for hypo in hypos] for found in results]
    assert tokens[0] == tokens[1] if weight == 0 else tokens[0] != tokens[1] or "sampling" in how


@pytest.mark.parametrize("output", ["softmax", *SPARSE])
def test_a_search_that_may_only_find_the_reference_finds_it(output, build, batch):
    built = sharpened(build("multimax_transformer", "--output-mapping", output), 50)
    sample = batch(built, size=20)
    references = [[token for token in row if token != 1] for row in sample["target"].tolist()]
    number = {int(identity): row for row, identity in enumerate(sample["id"])}

    def allowed(identity, tokens):
        return [(references[number[int(identity)]] + 100 * [2])[len(tokens) - 1]]

    _, found = generate(built, sample, builds={"prefix_allowed_tokens_fn": allowed}, beam=1, max_len_b=200)
    for hypos, reference in zip(found, references):
        assert hypos[0]["tokens"].tolist() == reference and hypos[0]["score"].isfinite()


@pytest.mark.parametrize("output, factor, number", [("softmax", 1, 1), ("sparsemax", 50, 1), ("sparsemax", 50, 2)])
def test_a_reference_of_probability_0_is_said_to_have_it(output, factor, number, build, batch):
    builts = [sharpened(build("multimax_transformer", "--output-mapping", output, seed=seed), factor)
              for seed in range(number)]  # fmt: skip
    sample, models = batch(builts[0], size=3), [built.model for built in builts]
    _, hypotheses = generate(builts[0], sample, models, score_reference=True)
    scorer = SequenceScorer(builts[0].task.target_dictionary)  # as fairseq-eval-lm has it
    for row, hypos in enumerate(hypotheses + (scorer.generate(models, sample) if output == "softmax" else [])):
        expected = log_probability(models, sample, row % 3, hypos[0]["tokens"].tolist())
        torch.testing.assert_close(hypos[0]["positional_scores"], expected, atol=1e-4, rtol=1e-4)
        assert (hypos[0]["score"] == -math.inf) == (output == "sparsemax")


def test_scores_of_a_language_model_are_those_of_the_paper(build, batch, caplog):
    """From the whole distributions, by their definitions."""
    built = sharpened(build("multimax_transformer_lm", "--output-mapping", "entmax15"), 8)
    sample, vocabulary = batch(built, size=4), len(built.task.target_dictionary)
    sample["start_indices"] = [0, 3, 0, 5]
    with torch.no_grad():
        p = built.model.get_normalized_probs(built.model(**sample["net_input"]), log_probs=False).double()
    scorer = SequenceScorer(built.task.target_dictionary, softmax_batch=50)
    hypos = scorer.generate([built.model], sample)
    words = [
        (p[row, step], int(token))
        for row, start in enumerate(sample["start_indices"])
        for step, token in enumerate(sample["target"][row])
        if step >= start and token != built.task.target_dictionary.pad()
    ]
    one = torch.stack([torch.nn.functional.one_hot(torch.tensor(token), vocabulary).double() for _, token in words])
    p = torch.stack([row for row, _ in words])
    epsilon = 0.01 / vocabulary
    smoothed = ((p * one).sum(1) + epsilon) / (1 + epsilon * vocabulary)
    middle = (p + one) / 2
    divergence = sum((torch.xlogy(q, q) - torch.xlogy(q, middle)).sum(1) / 2 for q in (p, one))
    results = scorer.sparse_scores.results()
    assert results["epsilon_perplexity"] == pytest.approx(smoothed.log().mean().neg().exp().item(), rel=1e-4)
    assert results["sparsemax_score"] == pytest.approx((1 - (p - one).square().sum(1) / 2).mean().item(), abs=1e-5)
    assert results["jensen_shannon_divergence"] == pytest.approx(divergence.mean().item(), abs=1e-5)
    zeros = ((p * one).sum(1) == 0).double().mean().item()
    assert results["impossible"] == pytest.approx(100 * zeros) and 0 < zeros < 1
    total = sum(hypo[0]["positional_scores"].sum().item() for hypo in hypos)
    assert total == pytest.approx(smoothed.log().sum().item(), rel=1e-4)
    with caplog.at_level(logging.INFO):
        del scorer
    assert "epsilon-perplexity" in caplog.text
