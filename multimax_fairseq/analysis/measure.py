"""Measures what the attention of models does over many sentences: sums, not attention; then a plain dictionary.

The dictionary is what ``results.json`` holds, and all that figures and the page are made of. Layers and heads count
from 0 in it.
"""

import math
from argparse import Namespace
from collections import defaultdict
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import tqdm
from torch import Tensor, nn

from ..mappings import MAPPINGS, MultiMax, build_mapping, multimax, softmax
from ..mappings.modulator import modulate_formula
from ..tools import UserError, grouped
from . import alignment
from .checkpoint import batches, fitting, load_model, load_split
from .hooks import Attention, Collected, attention_modules, collect
from .metrics import TOP_K, MeanMetrics, ScoreHistogram, attention_rollout, mean_average_distance, translation_rollout

# Trained models have no score this large: attention would be on one key, and means would lose their digits.
LARGEST_SCORE = 1e6

# Tokens of a sentence in a heat map: more cannot be read at the width of a page.
MOST_TOKENS = 32

# The cross-attention rows of a target word: those that predict its pieces, or those that read them (one step later;
# Chen, Sun & Liu 2020 find the latter better).
ROWS = ("predicting", "reading")

OUTERMOST = 5e-4  # the share of the lowest and of the highest scores that histograms leave out

MOST_NUMBERS = 32  # of a parameter of a registered mapping, for a table

Site = Tuple[str, int]  # site, layer


def measure(args: Namespace, labels: Sequence[str]) -> Dict[str, Any]:
    """Run models over the same sentences of a split.

    Args:
        args: of ``multimax-analyze``, whose ``--help`` says what they mean.
        labels: of the checkpoints.

    Returns:
        ``models`` has for each label a list of checkpoints, the seeds of one model.

    Raises:
        UserError: something that the user can fix; before long work, but for scores that no trained model has.
    """
    gold = alignment.read_alignments(args.alignments) if args.alignments else None
    measurements = [Measurement(path, args, gold) for path in args.checkpoints]
    first, show, where = measurements[0], args.show, f"the split {args.split!r}"
    there = range(min(len(measurement.dataset) for measurement in measurements))[: args.max_sentences]
    indices = fitting(first.task, first.dataset, there, [of.model for of in measurements], where)
    if show is None:  # long enough to be interesting, short enough to read
        show = [min(indices, key=lambda index: abs(first.dataset.num_tokens(index) - 12))]
    absent = [index for index in show if index not in indices]
    if absent:
        why = "is too long for a model" if absent[0] in there else f"sentences 0 to {there[-1]} are analysed"
        raise UserError(f"--show {absent[0]}: {why}")
    models: Dict[str, List[Measurement]] = {}
    for label, measurement in zip(labels, measurements):
        models.setdefault(label, []).append(measurement)
        if measurement.kind() != models[label][0].kind():  # their numbers are averaged
            raise UserError(f"models called {label!r} differ in more than the seed: give them other --labels")
        if gold is not None:
            measurement.check_gold(indices)
    with_output = any(
        not of.is_translation or getattr(of.model.decoder, "output_mapping", None) is not None for of in measurements
    )
    for label, measurement in zip(labels, measurements):
        measurement.run(indices, with_output, label)
    sites = grouped((row for measurement in measurements for row in means_of_sites(measurement.heads({}))), "site")
    references = {site: common_reference(row["tail"] for row in rows) for site, rows in sites.items()}
    return {
        "top_k": TOP_K,
        "skipped": len(there) - len(indices),
        "models": {label: [seed.results(references, show) for seed in seeds] for label, seeds in models.items()},
        "simplex": _simplex(),
    }


def common_reference(tails: Iterable[Optional[float]]) -> Optional[float]:
    """One s for the sparsity of all compared models: the geometric mean of their tails, without those of 0 or None.

    None if no tail counts: S is then 1 for any s.
    """
    counted = [tail for tail in tails if tail]
    return geometric_mean(counted) if counted else None


class Measurement:
    """What one model does, summed batch by batch; with gold alignments, the errors of its cross-attention.

    Raises:
        UserError: a file is missing or damaged, the data does not fit the model, or that has no attention.
    """

    def __init__(self, path: Path, args: Namespace, gold: Optional[Sequence[alignment.GoldAlignment]]):
        self.path, self.args, self.gold = path, args, gold
        self.model, cfg, self.task = load_model(path, args.data)
        try:
            attention_modules(self.model)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        self.dataset = load_split(self.task, args.data, args.split, args.max_sentences)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
        self.model.to(self.device)
        self.architecture = str(getattr(cfg.model, "arch", None) or getattr(cfg.model, "_name", type(self.model)))
        self.is_translation = hasattr(self.model, "encoder") and hasattr(self.model, "decoder")
        self.sentences = self.tokens = 0
        symbols = self.task.target_dictionary.symbols
        self._is_sentencepiece = any(symbol.startswith(alignment.WORD_BEGINS) for symbol in symbols)
        self._sites: Dict[Site, Tuple[Optional[nn.Module], MeanMetrics, ScoreHistogram]] = {}
        self._distances: Dict[Site, List[float]] = defaultdict(list)  # (side, layer) → MAD of each sentence
        self._errors: Dict[Tuple[int, str, str], alignment.AlignmentError] = defaultdict(alignment.AlignmentError)

    def kind(self) -> List[Tuple]:
        """What seeds of one model have in common: their attention."""
        modules = attention_modules(self.model)
        return [(*place, module.num_heads, type(getattr(module, "mapping", None))) for *place, module in modules]

    def run(self, indices: Sequence[int], with_output: bool, label: str) -> None:
        """Measure these sentences."""
        is_silent = self.args.no_progress_bar
        with tqdm.tqdm(total=len(indices), desc=label, unit="sentence", disable=is_silent) as bar:
            for sample in batches(self.dataset, indices, self.args.max_tokens, self.device):
                collected = collect(self.model, sample, with_output, self._add)
                for side, layer, hidden in collected.layers:
                    self._distances[side, layer] += mean_average_distance(hidden, collected.masks[side]).tolist()
                if self.gold is not None:
                    self._add_alignments(sample, collected)
                self.sentences += len(sample["id"])
                self.tokens += sample["ntokens"]
                bar.update(len(sample["id"]))

    def _add(self, attention: Attention, mask: Tensor) -> bool:
        """Add the rows of a layer that are no padding; says whether its attention is needed once more."""
        site, layer, scores, probabilities, mapping = attention
        scores, probabilities = (each.transpose(1, 2)[mask].transpose(0, 1) for each in (scores, probabilities))
        are_there = (scores.abs() < LARGEST_SCORE) | (scores == float("-inf"))
        if not (are_there.all() and probabilities.isfinite().all()):
            name = "the output layer" if site == "output" else f"{site} layer {layer + 1}"
            raise UserError(
                f"{self.path}: scores of {name} are NaN, infinite or beyond {LARGEST_SCORE:g} on these data: "
                "its parameters are too large, so its training has diverged; take an earlier checkpoint"
            )
        new = mapping, MeanMetrics(len(scores)), ScoreHistogram()
        _, means, histogram = self._sites.setdefault((site, layer), new)
        means.update(scores, probabilities)  # (num_heads, rows, src_len)
        histogram.update(scores)
        return self.gold is not None and site != "output"

    def _add_alignments(self, sample: Dict[str, Any], collected: Collected) -> None:
        """Link words by each cross-attention head, by each layer's mean, and by the rollout."""
        cross, source = collected.at("cross"), sample["net_input"]["src_tokens"]
        maps = {(of.layer, str(head)): of.probabilities[:, head] for of in cross for head in range(of.scores.size(1))}
        maps |= {(of.layer, "mean"): of.probabilities.mean(1) for of in cross}
        rollouts = _rollouts(collected)
        if "cross" in rollouts:
            maps[len(cross) - 1, "rollout"] = rollouts["cross"]
        stacked = torch.stack(list(maps.values()), dim=1).float().cpu()  # (bsz, maps, tgt_len, src_len)
        are_words = (collected.masks["encoder"] & (source != self.task.source_dictionary.eos())).cpu()
        are_queries = collected.masks["cross"].cpu()
        for row, index in enumerate(sample["id"].tolist()):
            src_words, tgt_words = self._words_of(index)
            if not src_words or not tgt_words:
                continue
            of_words = stacked[row][:, are_queries[row]][:, :, are_words[row]]
            for shift, name in enumerate(ROWS):
                rows = alignment.word_attention(of_words[:, shift : shift + len(tgt_words)], tgt_words, src_words)
                for place, attention in zip(maps, rows):
                    self._errors[(*place, name)].update(alignment.hard_alignment(attention), self.gold[index])

    def _words_of(self, index: int) -> List[List[int]]:
        """The word of each token of a sentence, source and target, without ``</s>``."""
        pair, task = self.dataset[index], self.task
        sides = (pair["source"], task.source_dictionary), (pair["target"], task.target_dictionary)
        symbols = ([words[token] for token in tokens.tolist() if token != words.eos()] for tokens, words in sides)
        return [alignment.words_of_tokens(tokens, self._is_sentencepiece) for tokens in symbols]

    def check_gold(self, indices: Sequence[int]) -> None:
        """Check that the gold alignments fit these sentences.

        Raises:
            UserError: the number of sentences differs, or a link is to a word that its sentence does not have.
        """
        if not any(site == "cross" for site, _, _ in attention_modules(self.model)):
            raise UserError(f"{self.path} has no cross-attention: it has nothing to align")
        if len(self.gold) != len(self.dataset):
            there = f"there are {len(self.gold)} gold alignments for the {len(self.dataset)} sentence pairs"
            raise UserError(f"{there} of the split: give those of the same split, a line a pair")
        for index in indices:
            numbers = [words[-1] + 1 if words else 0 for words in self._words_of(index)]
            if any(link[side] >= numbers[side] for link in self.gold[index].possible for side in (0, 1)):
                raise UserError(
                    f"a gold alignment in line {index + 1} is outside of its sentences, which have {numbers[0]} and "
                    f"{numbers[1]} words (from 0): it is of other text, or of pieces of words"
                )

    def results(self, references: Dict[str, Optional[float]], show: Sequence[int]) -> Dict[str, Any]:
        """All numbers; ``references``: the common s of each site; ``show``: sentences to draw."""
        heads = self.heads(references)
        return {
            "checkpoint": str(self.path),
            "architecture": self.architecture,
            "is_translation": self.is_translation,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "sentences": self.sentences,
            "target_tokens": self.tokens,
            "heads": [row for row in heads if row["site"] != "output"],
            "sites": means_of_sites(heads),
            "modules": [
                {"site": site, "layer": layer, **numbers_of_module(mapping, histogram)}
                for (site, layer), (mapping, _, histogram) in self._sites.items()
            ],
            "layers": self._layers(),
            "alignment": [
                {"layer": layer, "head": head, "rows": rows, "aer": error.rate()}
                for (layer, head, rows), error in self._errors.items()
            ],
            "examples": [self._example(index) for index in show],
        }

    def heads(self, references: Dict[str, Optional[float]]) -> List[Dict[str, Any]]:
        """The numbers of each head, and of the output layer as one."""
        rows = []
        for (site, layer), (_, means, _) in self._sites.items():
            s = references.get(site)
            for head, (numbers, sparsity) in enumerate(zip(means.result(), means.sparsity_at(s or 1.0))):
                place = {"site": site, "layer": layer, "head": head}
                rows.append({**place, **numbers, "common_sparsity": sparsity, "common_reference": s})
        return rows

    def _layers(self) -> List[Dict[str, Any]]:
        """MAD and mean cosine similarity of each layer's output; layer 0 is the first layer's input."""
        rows = []
        for (side, layer), distances in self._distances.items():
            defined = [distance for distance in distances if not math.isnan(distance)]
            mad = fmean(defined) if defined else None
            row = {"side": side, "layer": layer, "mad": mad, "cosine_similarity": 1 - mad if defined else None}
            rows.append({**row, "sentences": len(distances), "undefined": len(distances) - len(defined)})
        return rows

    def _example(self, index: int) -> Dict[str, Any]:
        """A sentence by itself: the tokens along each site's axes, the attention of each layer and its rollouts.

        A cross-attention row is named by the token that it predicts. All is cut to what can be read.
        """
        (sample,), most = batches(self.dataset, [index], 1, self.device), slice(MOST_TOKENS)
        collected, source = collect(self.model, sample, with_output=False), self.task.source_dictionary

        def symbols(tokens: Tensor, dictionary: Any) -> List[str]:
            return [dictionary[token] for token in tokens[0].tolist()]

        read = symbols(sample["net_input"]["src_tokens"], source)
        tokens = {site: (read, read) for site in collected.masks}
        if self.is_translation:
            written = symbols(sample["net_input"]["prev_output_tokens"], self.task.target_dictionary)
            attends_to_both = collected.at("decoder")[0].probabilities.size(-1) > len(written)
            tokens["decoder"] = written, [*read, *written] if attends_to_both else written
            tokens["cross"] = symbols(sample["target"], self.task.target_dictionary), read
        maps = [(attention.site, attention.layer, attention.probabilities[0]) for attention in collected.attention]
        maps += [(site, "rollout", rollout) for site, rollout in _rollouts(collected).items()]
        return {
            "sentence": index,
            "is_cut": any(len(axis) > MOST_TOKENS for axes in tokens.values() for axis in axes),
            "tokens": {site: [axis[most] for axis in axes] for site, axes in tokens.items()},
            "maps": [
                {"site": site, "layer": layer, "heads": heads[:, most, most].double().round(decimals=5).tolist()}
                for site, layer, heads in maps
            ],
        }


def means_of_sites(heads: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Means over each site's heads, and how many rows they leave out."""
    means = []
    for site, rows in grouped(heads, "site").items():
        means.append({"site": site, "heads": len(rows)})
        for name in list(rows[0])[3:]:  # after site, layer and head
            values = [row[name] for row in rows if row[name] is not None]
            is_count = name == "rows" or name.endswith("_undefined")
            means[-1][name] = sum(values) if is_count else fmean(values) if values else None
    return means


def numbers_of_module(mapping: Optional[nn.Module], histogram: ScoreHistogram) -> Dict[str, Any]:
    """The mapping of an attention module or the output layer, the scores it saw, and what it has learned."""
    edges, counts = histogram.bins(OUTERMOST)
    module = {
        "mapping": next((name for name, kind in MAPPINGS.items() if type(mapping) is kind), "softmax"),
        "lowest_score": histogram.low,
        "highest_score": histogram.high,
        "learned": {},
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }
    if isinstance(mapping, MultiMax):
        # as σ uses them: the gains of fixed terms are 0
        thresholds, gains = (tensor.detach().double().cpu() for tensor in mapping.coefficients())
        sigma = modulate_formula(edges, thresholds, gains)
        for n, ((b, d), (gain_b, gain_d)) in enumerate(zip(thresholds.tolist(), gains.tolist()), start=1):
            module["learned"] |= {f"b{n}": b, f"d{n}": d, f"g_b{n}": gain_b, f"g_d{n}": gain_d}
        falling = counts[sigma.diff() < 0].sum() / counts.sum()  # the share of scores over which σ falls
        module |= {"sigma": sigma.tolist(), "falling_share": falling.item()}
    elif module["mapping"] == "entmax":
        module["learned"]["alpha"] = torch.as_tensor(mapping.alpha, dtype=torch.float64).flatten().tolist()
    elif mapping is not None:  # one's own
        few = {name: p for name, p in mapping.named_parameters() if p.numel() <= MOST_NUMBERS}
        module["learned"] = {name: p.detach().double().flatten().tolist() for name, p in few.items()}
    return module


def _rollouts(collected: Collected) -> Dict[str, Tensor]:
    """The rollout of each site, (bsz, queries, keys): of the encoder or a language model, and over the source.

    Decoders whose self-attention sees the source, too, have none.
    """
    attention = {site: [of.probabilities for of in collected.at(site)] for site in collected.masks}
    first = collected.attention[0].site
    rollouts = {first: attention_rollout(attention[first])}
    if attention.get("cross") and attention["decoder"][0].size(2) == attention["decoder"][0].size(3):
        rollouts["cross"], _ = translation_rollout(attention["decoder"], attention["cross"], attention["encoder"])
    return rollouts


# ---------------------------------------------------------------------- mappings by themselves

ILLUSTRATION = [[0.7, 0.8], [0.7, 0.8]], [[-2.0, -0.6], [-1.0, -0.2]]  # thresholds and gains


def _simplex() -> List[Dict[str, Any]]:
    """Paths of mappings on the simplex for the scores (1.5, t, 0), as t rises from 0 to 1.5.

    At the start one score stands out; at the end two are equal. A sparse and multi-modal mapping follows the lower
    edge, where the smallest score gets nothing, to its middle.
    """
    t = torch.linspace(0, 1.5, 101, dtype=torch.float64)
    scores = torch.stack([torch.full_like(t, 1.5), t, torch.zeros_like(t)], dim=1)
    paths = [("softmax of (1.5, t, 0) / T", f"T = {T:g}", "softmax", softmax(scores / T)) for T in (0.25, 0.5, 1, 2)]
    for name in ("softmax", "entmax15", "sparsemax", "evsoftmax"):
        paths.append(("mappings of (1.5, t, 0)", name, name, build_mapping(name).eval()(scores)))
    example = multimax(scores, *torch.tensor(ILLUSTRATION, dtype=torch.float64))
    paths.append(("mappings of (1.5, t, 0)", "MultiMax, for example", "multimax", example))
    return [
        {"panel": panel, "name": name, "mapping": mapping, "probabilities": probabilities.tolist()}
        for panel, name, mapping, probabilities in paths
    ]
