"""Measures a model's attention over many sentences in one pass, keeping sums, not attention."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..mappings import MAPPINGS, MultiMax
from .alignment import AlignmentError, GoldAlignment, hard_alignment, word_attention, words_of_tokens
from .checkpoint import LoadedModel, UserError
from .collect import Attention, LayerOutput, attention_modules, output_mapping, run, token_masks
from .metrics import MeanMetrics, ScoreHistogram, common_reference
from .modulator import ModulatorParameters, falling_share, is_monotone, parameters_of
from .rollout import attention_rollout, translation_rollout
from .smoothing import mean_cosine_similarity

# Trained models have no score this large: attention would be on one key, and means would lose their digits.
LARGEST_SCORE = 1e6

# Tokens of a sentence in a heat map: more cannot be read at the width of a page.
MOST_TOKENS = 32

# The cross-attention rows of a target word: those that predict its pieces, or those that read them (one step later;
# Chen, Sun & Liu 2020 find the latter better).
ROWS = ("predicting", "reading")

Site = Tuple[str, int]  # site, layer


@dataclass
class Example:
    """The attention of one sentence, to be drawn.

    Attributes:
        index: of the sentence in the split.
        tokens: by site, the tokens of the rows and of the columns.
        attention: by site and layer, (num_heads, rows, columns).
        rollout: by its subject, (title of rows, title of columns, row tokens, column tokens, matrix).
        is_cut: whether there were more than ``MOST_TOKENS`` tokens.
    """

    index: int
    tokens: Dict[str, Tuple[List[str], List[str]]] = field(default_factory=dict)
    attention: Dict[Site, Tensor] = field(default_factory=dict)
    rollout: Dict[str, Tensor] = field(default_factory=dict)
    is_cut: bool = False


@dataclass
class ModuleReport:
    """One attention module (or the output layer): its mapping, and the scores that it saw.

    Attributes:
        mapping: its name, such as ``"multimax"``.
        parameters: those of a MultiMax modulator, else None.
        alpha: α of entmax, one for each head or one for all, else None.
    """

    site: str
    layer: int
    mapping: str
    histogram: ScoreHistogram
    parameters: Optional[ModulatorParameters] = None
    alpha: Optional[List[float]] = None

    def numbers(self) -> Dict[str, Any]:
        """Everything as plain numbers, for JSON; ``b1`` … ``g_d2`` are the modulator's."""
        histogram = self.histogram
        result = {
            "site": self.site,
            "layer": self.layer,
            "mapping": self.mapping,
            "lowest_score": histogram.low,
            "highest_score": histogram.high,
        }
        if self.alpha is not None:
            result["alpha"] = self.alpha
        if self.parameters is not None:
            thresholds, gains = self.parameters
            for n, ((b, d), (gain_b, gain_d)) in enumerate(zip(thresholds.tolist(), gains.tolist()), start=1):
                result.update({f"b{n}": b, f"d{n}": d, f"g_b{n}": gain_b, f"g_d{n}": gain_d})
            result["is_monotone"] = is_monotone(thresholds, gains, histogram.low, histogram.high)
            result["falling_share"] = falling_share(thresholds, gains, histogram.edges, histogram.counts)
        return result


class Measurement:
    """What one model does, gathered batch by batch with :meth:`update`.

    Args:
        loaded: the model and its data.
        examples: indices of the sentences to keep for heat maps.
        gold: gold alignments, one for each sentence of the split.
        subwords: how dictionaries mark pieces of words, for the gold alignments.

    Attributes:
        compared: all measurements of the report, including this one; they share one s for each site.
        with_output: whether to measure the output layer too.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        examples: Sequence[int] = (),
        gold: Optional[Sequence[GoldAlignment]] = None,
        subwords: str = "none",
    ):
        self.loaded = loaded
        self.compared: Sequence[Measurement] = [self]
        self.sentences = self.tokens = 0
        self.gold, self.subwords = gold, subwords
        self.examples = {index: Example(index) for index in examples}
        self.heads: Dict[Site, MeanMetrics] = {}
        self.modules: Dict[Site, ModuleReport] = {}
        for attention in attention_modules(loaded.model):
            self._expect((attention.site, attention.layer), attention.module.num_heads, attention.mapping)
        # (side, layer) → sum of similarities, sentences with a similarity, all sentences
        self._similarity: Dict[Site, List[float]] = {}
        self._errors: Dict[Tuple[str, int, str], AlignmentError] = {}
        # decoder layers that attend to source and target together
        self._cross_self = bool(getattr(getattr(loaded.model, "decoder", None), "cross_self_attention", False))
        self.with_output = not loaded.is_translation or output_mapping(loaded.model) is not None

    def _expect(self, site: Site, num_heads: int, mapping: Optional[torch.nn.Module]) -> None:
        self.heads[site] = MeanMetrics(num_heads)
        self.modules[site] = ModuleReport(*site, **_describe(mapping), histogram=ScoreHistogram())

    # ------------------------------------------------------------------------------ gathering

    def update(self, sample: Dict[str, Any]) -> None:
        """Run a fairseq batch through the model and add its measurements."""
        self._masks = token_masks(self.loaded.model, sample)
        self._sample = sample
        self._means: Dict[str, List[Tensor]] = {}  # by site, each layer's attention averaged over heads
        self._shown = {
            row: self.examples[index] for row, index in enumerate(sample["id"].tolist()) if index in self.examples
        }
        for row, example in self._shown.items():
            example.tokens, example.is_cut = self._tokens_of(row)
        output = run(self.loaded.model, sample, self._on_attention, self._on_layer, self.with_output)
        if output is not None:
            if ("output", 0) not in self.heads:
                self._expect(("output", 0), 1, output_mapping(self.loaded.model))
            scores, probabilities = (tensor[self._masks["decoder"]].unsqueeze(0) for tensor in output)
            self._add(("output", 0), "the output layer", scores, probabilities)
        self._on_rollout()
        self.sentences += len(sample["id"])
        self.tokens += sample["ntokens"]

    def _on_attention(self, attention: Attention) -> None:
        site = attention.site, attention.layer
        mask = self._masks[attention.site]
        scores, probabilities = (  # (num_heads, rows, src_len), without padding rows
            tensor.transpose(1, 2)[mask].transpose(0, 1) for tensor in (attention.scores, attention.probabilities)
        )
        self._add(site, f"{attention.site} layer {attention.layer + 1}", scores, probabilities)
        if self._shown or self.gold is not None:
            self._means.setdefault(attention.site, []).append(attention.probabilities.mean(1))
        for row, example in self._shown.items():
            rows, columns = self._positions(attention.site, row)
            cut = attention.probabilities[row][:, rows][:, :, columns]
            example.attention[site] = cut[:, :MOST_TOKENS, :MOST_TOKENS].float().cpu()
        if self.gold is not None and attention.site == "cross":
            for row in range(len(mask)):
                heads = {f"head {head}": attention.probabilities[row, head] for head in range(scores.size(0))}
                self._align(row, attention.layer, {**heads, "mean": attention.probabilities[row].mean(0)})

    def _add(self, site: Site, name: str, scores: Tensor, probabilities: Tensor) -> None:
        """Add rows of a site, (num_heads, rows, K) each."""
        are_there = (scores.abs() < LARGEST_SCORE) | (scores == float("-inf"))
        if not (are_there.all() and probabilities.isfinite().all()):
            raise UserError(
                f"{self.loaded.path}: scores of {name} are NaN, infinite or beyond {LARGEST_SCORE:g} on these data: "
                "its parameters are too large, so its training has diverged; take an earlier checkpoint"
            )
        self.heads[site].update(scores, probabilities)
        self.modules[site].histogram.update(scores)

    def _on_layer(self, output: LayerOutput) -> None:
        similarity = mean_cosine_similarity(output.hidden, self._masks[output.side]).double()
        is_defined = ~similarity.isnan()
        total = self._similarity.setdefault((output.side, output.layer), [0.0, 0, 0])
        total[0] += similarity[is_defined].sum().item()
        total[1] += int(is_defined.sum())
        total[2] += len(similarity)

    def _on_rollout(self) -> None:
        """Compute rollouts of the sentences to draw, and their alignment error."""
        if not self._means:
            return
        matrices = {}
        if self.loaded.is_translation:
            decoder, cross, encoder = (self._means.get(site, []) for site in ("decoder", "cross", "encoder"))
            over_source, _ = translation_rollout(decoder, cross, encoder)
            matrices = {"encoder": attention_rollout(self._means["encoder"]), "cross": over_source}
        else:
            (side,) = self._means
            matrices = {side: attention_rollout(self._means[side])}
        for row, example in self._shown.items():
            for site, matrix in matrices.items():
                rows, columns = self._positions(site, row)
                example.rollout[site] = matrix[row][rows][:, columns][:MOST_TOKENS, :MOST_TOKENS].cpu()
        if self.gold is not None:
            for row in range(len(self._sample["id"])):
                self._align(row, len(self._means["cross"]) - 1, {"rollout": matrices["cross"][row]})

    # ------------------------------------------------------------------------------ tokens

    def _positions(self, site: str, row: int) -> Tuple[Tensor, Tensor]:
        """The positions of a sentence's queries and keys, without padding."""
        sides = {"cross": ["encoder"], "decoder": ["encoder", "decoder"][not self._cross_self :]}.get(site, [site])
        keys = torch.cat([self._masks[side][row] for side in sides])
        return self._masks[site][row].nonzero().flatten(), keys.nonzero().flatten()

    def _tokens_of(self, row: int) -> Tuple[Dict[str, Tuple[List[str], List[str]]], bool]:
        """The tokens along each site's axes; a cross-attention row is named by the token that it predicts."""
        net_input = self._sample["net_input"]

        def symbols(tokens: Tensor, dictionary) -> List[str]:
            return [dictionary[token] for token in tokens[row].tolist() if token != dictionary.pad()]

        source, target = self.loaded.source_dictionary, self.loaded.target_dictionary
        read = symbols(net_input["src_tokens"], source)
        tokens = {"encoder" if self.loaded.is_translation else next(iter(self._masks)): (read, read)}
        if self.loaded.is_translation:
            written = symbols(net_input["prev_output_tokens"], target)
            tokens["decoder"] = (written, [*read, *written] if self._cross_self else written)
            tokens["cross"] = (symbols(self._sample["target"], target), read)
        is_cut = any(len(axis) > MOST_TOKENS for axes in tokens.values() for axis in axes)
        return {site: (rows[:MOST_TOKENS], columns[:MOST_TOKENS]) for site, (rows, columns) in tokens.items()}, is_cut

    # ------------------------------------------------------------------------------ alignment

    def words_of(self, index: int) -> Tuple[List[int], List[int]]:
        """The word of each token of a sentence, source and target, without ``</s>``."""
        pair = self.loaded.dataset[index]
        sides = (
            (pair["source"], self.loaded.source_dictionary),
            (pair["target"], self.loaded.target_dictionary),
        )
        return tuple(
            words_of_tokens([d[token] for token in tokens.tolist() if token != d.eos()], self.subwords)
            for tokens, d in sides
        )

    def check_gold(self) -> None:
        """Check that the gold alignments fit this split.

        Raises:
            UserError: the number of sentences differs, or a link is to a word that its sentence does not have.
        """
        if not self.loaded.is_translation:
            raise UserError(f"{self.loaded.path} is no translation model: it has nothing to align")
        if not any(site == "cross" for site, _ in self.heads):
            raise UserError(f"{self.loaded.path} has no cross-attention: it has nothing to align")
        if len(self.gold) != len(self.loaded.dataset):
            raise UserError(
                f"there are {len(self.gold)} gold alignments for the {len(self.loaded.dataset)} sentence pairs of "
                "the split: give those of the same split, a line a pair"
            )
        for index in self.loaded.indices:
            counts = [words[-1] + 1 if words else 0 for words in self.words_of(index)]
            for link in self.gold[index].possible:
                if link[0] >= counts[0] or link[1] >= counts[1]:
                    raise UserError(
                        f"gold alignment {link[0]}-{link[1]} in line {index + 1} is outside of its sentences, which "
                        f"have {counts[0]} and {counts[1]} words (from 0): other text, or another marking of "
                        f"subwords than --subwords {self.subwords}"
                    )

    def _align(self, row: int, layer: int, attentions: Dict[str, Tensor]) -> None:
        """Compare each attention, (tgt_len, src_len), of a sentence with its gold alignment."""
        index = int(self._sample["id"][row])
        src_words, tgt_words = self.words_of(index)
        if not src_words or not tgt_words:
            return
        _, source = self._positions("cross", row)
        is_word = self._sample["net_input"]["src_tokens"][row][source] != self.loaded.source_dictionary.eos()
        rows = self._positions("cross", row)[0]
        stacked = torch.stack(list(attentions.values()))[:, :, source[is_word]]
        for shift, name in enumerate(ROWS):
            taken = rows[shift : shift + len(tgt_words)]
            words = word_attention(stacked[:, taken].float().cpu(), tgt_words, src_words)
            for head, attention in zip(attentions, words):
                error = self._errors.setdefault((head, layer, name), AlignmentError())
                error.update(hard_alignment(attention), self.gold[index])

    # ------------------------------------------------------------------------------ results

    def tail(self, site: str) -> float:
        """The mean probability of an irrelevant entry at a site; NaN if there is none."""
        tails = [means.sums["tail"] / means.defined["tail"] for at, means in self.heads.items() if at[0] == site]
        return torch.cat(tails).nanmean().item() if tails else float("nan")

    def head_rows(self) -> List[Dict[str, Any]]:
        """A row of numbers for each head; last, if measured, the output layer's."""
        references = {site: common_reference(m.tail(site) for m in self.compared) for site, _ in self.heads}
        rows = []
        for (site, layer), means in self.heads.items():
            common, s = means.sparsity_at(references[site] or 1.0), references[site]
            for head, (numbers, sparsity) in enumerate(zip(means.result(), common)):
                place = {"site": site, "layer": layer, "head": head}
                rows.append({**place, **numbers, "common_sparsity": sparsity, "common_reference": s})
        return rows

    def site_rows(self) -> List[Dict[str, Any]]:
        """A row of numbers for each site: means over its heads, and how many rows they leave out."""
        heads, rows = self.head_rows(), []
        for site in dict.fromkeys(row["site"] for row in heads):
            at_site = [row for row in heads if row["site"] == site]
            row = {"site": site, "heads": len(at_site)}
            for name in list(at_site[0])[3:]:  # after site, layer and head
                values = [head[name] for head in at_site]
                row[name] = sum(values) if name == "rows" or name.endswith("_undefined") else mean(values)
            rows.append(row)
        return rows

    def layer_rows(self) -> List[Dict[str, Any]]:
        """MAD and mean cosine similarity of each layer's output; layer 0 is the first layer's input."""
        rows = []
        for (side, layer), (total, count, sentences) in self._similarity.items():
            similarity = total / count if count else None
            rows.append({
                "side": side,
                "layer": layer,
                "mad": None if similarity is None else 1 - similarity,
                "cosine_similarity": similarity,
                "sentences": sentences,
                "undefined": sentences - count,
            })  # fmt: skip
        return rows

    def alignment_rows(self) -> List[Dict[str, Any]]:
        """AER of each cross-attention head, of each layer's mean, and of the rollout."""
        return [
            {"layer": layer, "head": head.replace("head ", ""), "rows": rows, "aer": error.rate()}
            for (head, layer, rows), error in self._errors.items()
        ]

    def results(self) -> Dict[str, Any]:
        """All numbers, ready for JSON."""
        sites = self.site_rows()
        return {
            "label": self.loaded.label,
            "checkpoint": str(self.loaded.path),
            "architecture": self.loaded.architecture,
            "parameters": sum(parameter.numel() for parameter in self.loaded.model.parameters()),
            "sentences": self.sentences,
            "target_tokens": self.tokens,
            "heads": [row for row in self.head_rows() if row["site"] != "output"],
            "sites": sites,
            "modules": [{**module.numbers(), "histogram": module.histogram.bins} for module in self.modules.values()],
            "layers": self.layer_rows(),
            "alignment": self.alignment_rows(),
            "output": next((row for row in sites if row["site"] == "output"), None),
        }


def _describe(mapping: Optional[torch.nn.Module]) -> Dict[str, Any]:
    """Name and learned numbers of a mapping; None is fairseq's own softmax."""
    name = next((name for name, kind in MAPPINGS.items() if isinstance(mapping, kind)), "softmax")
    description: Dict[str, Any] = {"mapping": name}
    if isinstance(mapping, MultiMax):
        description["parameters"] = parameters_of(mapping)
    elif name == "entmax":
        alpha = mapping.alpha
        description["alpha"] = alpha.detach().tolist() if isinstance(alpha, Tensor) else [float(alpha)]
    return description


def mean(values: Sequence[Optional[float]]) -> Optional[float]:
    """The mean of the values that are not None; None if there are none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
