"""Measures what the attention of models does over many sentences: sums, not attention; then a plain dictionary.

The dictionary is what ``results.json`` holds, and all that figures and the page are made of. Layers and heads count
from 0 in it.
"""

import os
from argparse import Namespace
from statistics import geometric_mean, mean
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple
from unittest.mock import patch

import torch
import tqdm
from torch import Tensor, nn

from ..mappings import MAPPINGS, MultiMax, build_mapping, modulate, multimax, softmax
from ..tools import UserError
from .alignment import (
    AlignmentError,
    GoldAlignment,
    guess_subwords,
    hard_alignment,
    read_alignments,
    word_attention,
    words_of_tokens,
)
from .checkpoint import LoadedModel, batches, fitting, load
from .hooks import Collected, attention_modules, collect, output_mapping
from .metrics import (
    TOP_K,
    MeanMetrics,
    ScoreHistogram,
    attention_rollout,
    mean_average_distance,
    translation_rollout,
)

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
    gold = read_alignments(args.alignments) if args.alignments else None
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    split = args.data, args.split, args.max_sentences
    loaded = [load(path, label, *split, device) for path, label in zip(args.checkpoints, labels)]
    first, show, where = loaded[0], args.show, f"the split {args.split!r}"
    there = range(min(len(model.dataset) for model in loaded))[: args.max_sentences]
    indices = fitting(first.task, first.dataset, there, [model.model for model in loaded], where)
    if show is None:  # long enough to be interesting, short enough to read
        show = [min(indices, key=lambda index: abs(first.dataset.num_tokens(index) - 12))]
    absent = [index for index in show if index not in indices]
    if absent:
        why = "is too long for a model" if absent[0] in there else f"sentences 0 to {there[-1]} are analysed"
        raise UserError(f"--show {absent[0]}: {why}")
    _check_seeds(loaded)
    measurements = [Measurement(model, gold) for model in loaded]
    for measurement in measurements if gold is not None else ():
        measurement.check_gold(indices)
    with_output = any(not model.is_translation or output_mapping(model.model) is not None for model in loaded)
    for measurement in measurements:
        measurement.run(indices, args.max_tokens, device, with_output, not args.no_progress_bar)
    tails: Dict[str, List[Optional[float]]] = {}
    for row in (row for measurement in measurements for row in measurement.sites({})):
        tails.setdefault(row["site"], []).append(row["tail"])
    references = {site: common_reference(of_models) for site, of_models in tails.items()}
    models: Dict[str, List[Dict[str, Any]]] = {}
    for model, measurement in zip(loaded, measurements):
        examples = [_example(model, index, device) for index in show]
        models.setdefault(model.label, []).append({**measurement.results(references), "examples": examples})
    skipped = len(there) - len(indices)
    return {"top_k": TOP_K, "skipped": skipped, "models": models, "simplex": _simplex()}


def common_reference(tails: Iterable[Optional[float]]) -> Optional[float]:
    """One s for the sparsity of all compared models: the geometric mean of their tails, without those of 0 or None.

    None if no tail counts: S is then 1 for any s.
    """
    counted = [tail for tail in tails if tail]
    return geometric_mean(counted) if counted else None


def _check_seeds(loaded: Sequence[LoadedModel]) -> None:
    """Models of one label are to have the same attention: their numbers are averaged."""
    kinds: Dict[str, List] = {}
    for model in loaded:
        kind = [
            (site, layer, attention.num_heads, type(getattr(attention, "mapping", None)))
            for site, layer, attention in attention_modules(model.model)
        ]
        if kinds.setdefault(model.label, kind) != kind:
            raise UserError(f"models called {model.label!r} differ in more than the seed: give them other --labels")


class Measurement:
    """What one model does, summed batch by batch; with gold alignments, the errors of its cross-attention."""

    def __init__(self, loaded: LoadedModel, gold: Optional[Sequence[GoldAlignment]] = None):
        self.loaded, self.gold, self.sentences, self.tokens = loaded, gold, 0, 0
        self._subwords = guess_subwords(loaded.task.target_dictionary.symbols) if gold else "none"
        self.heads: Dict[Site, MeanMetrics] = {}
        self.histograms: Dict[Site, ScoreHistogram] = {}
        self.mappings: Dict[Site, Optional[nn.Module]] = {}
        # (side, layer) → sum of MADs, sentences with a MAD, all sentences
        self._distances: Dict[Site, List[float]] = {}
        self._errors: Dict[Tuple[int, str, str], AlignmentError] = {}

    def run(
        self, indices: Sequence[int], max_tokens: int, device: torch.device, with_output: bool, progress: bool
    ) -> None:
        """Measure these sentences."""
        with tqdm.tqdm(total=len(indices), desc=self.loaded.label, unit="sentence", disable=not progress) as bar:
            for sample in batches(self.loaded.dataset, indices, max_tokens, device):
                self._add_batch(sample, collect(self.loaded.model, sample, with_output))
                bar.update(len(sample["id"]))

    def _add_batch(self, sample: Dict[str, Any], collected: Collected) -> None:
        self.sentences += len(sample["id"])
        self.tokens += sample["ntokens"]
        masks = collected.masks
        for site, layer, scores, probabilities, mapping in collected.attention:
            # (num_heads, rows, src_len), without padding rows
            rows = (each.transpose(1, 2)[masks[site]].transpose(0, 1) for each in (scores, probabilities))
            self.add_rows((site, layer), f"{site} layer {layer + 1}", mapping, *rows)
        if collected.output:
            rows = (each[masks["decoder"]].unsqueeze(0) for each in collected.output)
            self.add_rows(("output", 0), "the output layer", output_mapping(self.loaded.model), *rows)
        for side, layer, hidden in collected.layers:
            distance = mean_average_distance(hidden, masks[side]).double()
            new = distance.nansum().item(), int((~distance.isnan()).sum()), len(distance)
            before = self._distances.get((side, layer), (0, 0, 0))
            self._distances[side, layer] = [old + added for old, added in zip(before, new)]
        if self.gold is not None:
            self._add_alignments(sample, collected)

    def add_rows(
        self, site: Site, name: str, mapping: Optional[nn.Module], scores: Tensor, probabilities: Tensor
    ) -> None:
        """Add rows of a site, (num_heads, rows, K) each."""
        are_there = (scores.abs() < LARGEST_SCORE) | (scores == float("-inf"))
        if not (are_there.all() and probabilities.isfinite().all()):
            raise UserError(
                f"{self.loaded.path}: scores of {name} are NaN, infinite or beyond {LARGEST_SCORE:g} on these data: "
                "its parameters are too large, so its training has diverged; take an earlier checkpoint"
            )
        if site not in self.heads:
            self.mappings[site], self.histograms[site] = mapping, ScoreHistogram()
            self.heads[site] = MeanMetrics(len(scores))
        self.heads[site].update(scores, probabilities)
        self.histograms[site].update(scores)

    def _add_alignments(self, sample: Dict[str, Any], collected: Collected) -> None:
        """Link words by each cross-attention head, by each layer's mean, and by the rollout."""
        cross, source = collected.at("cross"), sample["net_input"]["src_tokens"]
        maps = {(of.layer, str(head)): of.probabilities[:, head] for of in cross for head in range(of.scores.size(1))}
        maps |= {(of.layer, "mean"): of.probabilities.mean(1) for of in cross}
        rollouts = _rollouts(collected)
        if "cross" in rollouts:
            maps[len(cross) - 1, "rollout"] = rollouts["cross"]
        stacked = torch.stack(list(maps.values()), dim=1).float().cpu()  # (bsz, maps, tgt_len, src_len)
        are_words = (collected.masks["encoder"] & (source != self.loaded.task.source_dictionary.eos())).cpu()
        are_queries = collected.masks["cross"].cpu()
        for row, index in enumerate(sample["id"].tolist()):
            src_words, tgt_words = self._words_of(index)
            if not src_words or not tgt_words:
                continue
            of_words = stacked[row][:, are_queries[row]][:, :, are_words[row]]
            for shift, name in enumerate(ROWS):
                rows = word_attention(of_words[:, shift : shift + len(tgt_words)], tgt_words, src_words)
                for place, attention in zip(maps, rows):
                    error = self._errors.setdefault((*place, name), AlignmentError())
                    error.update(hard_alignment(attention), self.gold[index])

    def _words_of(self, index: int) -> List[List[int]]:
        """The word of each token of a sentence, source and target, without ``</s>``."""
        pair, task = self.loaded.dataset[index], self.loaded.task
        sides = (pair["source"], task.source_dictionary), (pair["target"], task.target_dictionary)
        symbols = ([words[token] for token in tokens.tolist() if token != words.eos()] for tokens, words in sides)
        return [words_of_tokens(tokens, self._subwords) for tokens in symbols]

    def check_gold(self, indices: Sequence[int]) -> None:
        """Check that the gold alignments fit these sentences.

        Raises:
            UserError: the number of sentences differs, or a link is to a word that its sentence does not have.
        """
        if not any(site == "cross" for site, _, _ in attention_modules(self.loaded.model)):
            raise UserError(f"{self.loaded.path} has no cross-attention: it has nothing to align")
        if len(self.gold) != len(self.loaded.dataset):
            there = f"there are {len(self.gold)} gold alignments for the {len(self.loaded.dataset)} sentence pairs"
            raise UserError(f"{there} of the split: give those of the same split, a line a pair")
        for index in indices:
            numbers = [words[-1] + 1 if words else 0 for words in self._words_of(index)]
            if any(link[side] >= numbers[side] for link in self.gold[index].possible for side in (0, 1)):
                raise UserError(
                    f"a gold alignment in line {index + 1} is outside of its sentences, which have {numbers[0]} and "
                    f"{numbers[1]} words (from 0): it is of other text, or of pieces of words"
                )

    def results(self, references: Dict[str, Optional[float]]) -> Dict[str, Any]:
        """All numbers; ``references``: the common s of each site."""
        return {
            "checkpoint": str(self.loaded.path),
            "architecture": self.loaded.architecture,
            "is_translation": self.loaded.is_translation,
            "parameters": sum(parameter.numel() for parameter in self.loaded.model.parameters()),
            "sentences": self.sentences,
            "target_tokens": self.tokens,
            "heads": [row for row in self._heads(references) if row["site"] != "output"],
            "sites": self.sites(references),
            "modules": [self._module(site) for site in self.heads],
            "layers": self._layers(),
            "alignment": [
                {"layer": layer, "head": head, "rows": rows, "aer": error.rate()}
                for (layer, head, rows), error in self._errors.items()
            ],
        }

    def sites(self, references: Dict[str, Optional[float]]) -> List[Dict[str, Any]]:
        """Means over each site's heads, and how many rows they leave out."""
        sites: Dict[str, List[Dict[str, Any]]] = {}
        for row in self._heads(references):
            sites.setdefault(row["site"], []).append(row)
        return [{"site": site, "heads": len(rows), **_mean_of_rows(rows)} for site, rows in sites.items()]

    def _heads(self, references: Dict[str, Optional[float]]) -> List[Dict[str, Any]]:
        rows = []
        for (site, layer), means in self.heads.items():
            s = references.get(site)
            for head, (numbers, sparsity) in enumerate(zip(means.result(), means.sparsity_at(s or 1.0))):
                place = {"site": site, "layer": layer, "head": head}
                rows.append({**place, **numbers, "common_sparsity": sparsity, "common_reference": s})
        return rows

    def _module(self, site: Site) -> Dict[str, Any]:
        """An attention module (or the output layer): its mapping, the scores it saw, and what it has learned."""
        mapping, histogram = self.mappings[site], self.histograms[site]
        edges, counts = histogram.bins(OUTERMOST)
        module = {
            "site": site[0],
            "layer": site[1],
            "mapping": next((name for name, kind in MAPPINGS.items() if type(mapping) is kind), "softmax"),
            "lowest_score": histogram.low,
            "highest_score": histogram.high,
            "learned": {},
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }
        if isinstance(mapping, MultiMax):
            # as σ uses them: the gains of fixed terms are 0
            thresholds, gains = (tensor.detach().double().cpu() for tensor in mapping.coefficients())
            with patch.dict(os.environ, MULTIMAX_BACKEND="eager"):  # a few numbers are not worth compiling for
                sigma = modulate(edges, thresholds, gains)
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

    def _layers(self) -> List[Dict[str, Any]]:
        """MAD and mean cosine similarity of each layer's output; layer 0 is the first layer's input."""
        rows = []
        for (side, layer), (total, count, sentences) in self._distances.items():
            mad = total / count if count else None
            row = {"side": side, "layer": layer, "mad": mad, "cosine_similarity": 1 - mad if count else None}
            rows.append({**row, "sentences": sentences, "undefined": sentences - count})
        return rows


def _mean_of_rows(rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    means: Dict[str, Any] = {}
    for name in list(rows[0])[3:]:  # after site, layer and head
        values = [row[name] for row in rows if row[name] is not None]
        is_count = name == "rows" or name.endswith("_undefined")
        means[name] = sum(values) if is_count else mean(values) if values else None
    return means


# ---------------------------------------------------------------------- single sentences


def _example(loaded: LoadedModel, index: int, device: torch.device) -> Dict[str, Any]:
    """A sentence by itself: the tokens along each site's axes, the attention of each layer and rollouts over them.

    A cross-attention row is named by the token that it predicts. All is cut to what can be read.
    """
    (sample,), task = batches(loaded.dataset, [index], 1, device), loaded.task
    collected = collect(loaded.model, sample)

    def symbols(tokens: Tensor, dictionary: Any) -> List[str]:
        return [dictionary[token] for token in tokens[0].tolist()]

    read = symbols(sample["net_input"]["src_tokens"], task.source_dictionary)
    tokens = {site: (read, read) for site in collected.masks}
    if loaded.is_translation:
        written = symbols(sample["net_input"]["prev_output_tokens"], task.target_dictionary)
        attends_to_both = collected.at("decoder")[0].probabilities.size(-1) > len(written)
        tokens["decoder"] = written, [*read, *written] if attends_to_both else written
        tokens["cross"] = symbols(sample["target"], task.target_dictionary), read
    maps = [(attention.site, attention.layer, attention.probabilities[0]) for attention in collected.attention]
    maps += [(site, "rollout", rollout) for site, rollout in _rollouts(collected).items()]
    cut = [(site, layer, heads[:, :MOST_TOKENS, :MOST_TOKENS].double()) for site, layer, heads in maps]
    return {
        "sentence": index,
        "is_cut": any(len(axis) > MOST_TOKENS for axes in tokens.values() for axis in axes),
        "tokens": {site: [axis[:MOST_TOKENS] for axis in axes] for site, axes in tokens.items()},
        "maps": [
            {"site": site, "layer": layer, "heads": heads.round(decimals=5).tolist()} for site, layer, heads in cut
        ],
    }


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
    example = multimax(scores, *(torch.tensor(numbers, dtype=torch.float64) for numbers in ILLUSTRATION))
    paths.append(("mappings of (1.5, t, 0)", "MultiMax, for example", "multimax", example))
    return [
        {"panel": panel, "name": name, "mapping": mapping, "probabilities": probabilities.tolist()}
        for panel, name, mapping, probabilities in paths
    ]
