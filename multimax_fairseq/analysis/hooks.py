"""Collects a model's attention on a batch: scores and probabilities of every site, layer and head.

Works for this plugin's and fairseq's own translation and language models. It replaces nothing in a model: temporary
hooks ask each attention module for its scores once more, and its mapping for their probabilities.
"""

import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple
from unittest.mock import patch

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from ..mappings import Softmax, additive_mask
from ..mappings.masking import probabilities_by
from ..models.attach import attention_sites


class Attention(NamedTuple):
    """What an attention module, or the output layer, did on a batch.

    Attributes:
        site: ``"encoder"``, ``"decoder"`` (self-attention), ``"cross"`` or ``"output"``, whose keys are the words.
        layer: from 0, within its site.
        scores: (bsz, num_heads, tgt_len, src_len), scaled and masked (−inf), before the mapping (and so before σ).
        probabilities: (bsz, num_heads, tgt_len, src_len), fp32, without dropout.
        mapping: the module between the two; None for fairseq's own softmax.
    """

    site: str
    layer: int
    scores: Tensor
    probabilities: Tensor
    mapping: Optional[nn.Module]


class LayerOutput(NamedTuple):
    """The output of a layer on a batch.

    Attributes:
        side: ``"encoder"`` or ``"decoder"``.
        layer: from 1; 0 is the first layer's input.
        hidden: (bsz, length, dim).
    """

    side: str
    layer: int
    hidden: Tensor


@dataclass
class Collected:
    """Everything collected on one batch, in model order.

    Attributes:
        masks: bool (bsz, length) by site, true where a query is a token, false at padding.
    """

    masks: Dict[str, Tensor]
    attention: List[Attention] = field(default_factory=list)
    layers: List[LayerOutput] = field(default_factory=list)

    def at(self, site: str) -> List[Attention]:
        """The attention of each layer of a site."""
        return [attention for attention in self.attention if attention.site == site]


def attention_modules(model: nn.Module) -> List[Tuple[str, int, MultiheadAttention]]:
    """The attention modules of a model as (site, layer, module), in model order.

    Raises:
        ValueError: it has no fairseq ``MultiheadAttention``, or one that never forms probabilities.
    """
    found = list(attention_sites(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention to analyse: none of its modules is fairseq's MultiheadAttention"
        )
    if any(getattr(module, "use_xformers", False) for _, _, module in found):
        raise ValueError("its attention is that of xFormers, which never forms the probabilities to look at")
    return found


def collect(
    model: nn.Module,
    sample: Dict[str, Any],
    with_output: bool = True,
    keep: Optional[Callable[[Attention, Tensor], Any]] = None,
) -> Collected:
    """Collect a model's attention, layer outputs and output distribution on one batch.

    ``collect(model, sample).at("cross")[0].probabilities`` are the probabilities of the first decoder layer's
    cross-attention, (bsz, num_heads, tgt_len, src_len). All of the batch is kept, unless ``keep`` takes what it needs
    of each layer as it is made.

    Args:
        model: of this plugin or of fairseq, in any mode (it runs in evaluation mode).
        sample: a fairseq batch: ``task.dataset("valid").collater([...])``.
        with_output: whether to collect the output distribution, (bsz, 1, tgt_len, words), which is large. There is
            none with an adaptive softmax, which never has all scores.
        keep: called with each :class:`Attention` and the mask of its queries; it is collected where that is true.

    Raises:
        ValueError: the model has no attention that can be looked at.
    """
    places = {module: (site, layer) for site, layer, module in attention_modules(model)}
    collected, logits = Collected(_token_masks(model, sample)), []
    decoder = getattr(model, "decoder", None)
    projection = getattr(decoder, "output_projection", None)

    def take(attention: Attention) -> None:
        mask = collected.masks["decoder" if attention.site == "output" else attention.site]
        if keep is None or keep(attention, mask):
            collected.attention.append(attention)

    def look(module: nn.Module, args: Tuple, kwargs: Dict[str, Any], _: Any) -> None:
        take(Attention(*places[module], *_recomputed(module, args, kwargs)))

    def keep_layer(module: nn.Module, args: Tuple, kwargs: Dict[str, Any], result: Any) -> None:
        side, layer = places[module.self_attn]
        if layer == 0:
            collected.layers.append(LayerOutput(side, 0, (args[0] if args else kwargs["x"]).transpose(0, 1)))
        hidden = result[0] if isinstance(result, tuple) else result
        collected.layers.append(LayerOutput(side, layer + 1, hidden.transpose(0, 1)))

    hooks: Dict[nn.Module, Callable] = dict.fromkeys(places, look)
    hooks |= {module: keep_layer for module in model.modules() if getattr(module, "self_attn", None) in places}
    if with_output and projection is not None:
        hooks[projection] = lambda *args: logits.append(args[-1])
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            for module, hook in hooks.items():
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            result = model(**sample["net_input"])
            if logits:
                both = logits[0], model.get_normalized_probs(result, log_probs=False)
                mapping = getattr(decoder, "output_mapping", None)
                take(Attention("output", 0, *(each.unsqueeze(1) for each in both), mapping))
    finally:
        model.train(was_training)
    return collected


def _recomputed(
    module: MultiheadAttention, args: Tuple, kwargs: Dict[str, Any]
) -> Tuple[Tensor, Tensor, Optional[nn.Module]]:
    """The scores of an attention module that is called in this way, their probabilities, and its mapping."""
    arguments = {**inspect.signature(module.forward).bind(*args, **kwargs).arguments, "before_softmax": True}
    if isinstance(arguments.get("attn_mask"), Tensor):
        arguments["attn_mask"] = additive_mask(arguments["attn_mask"], arguments["query"].dtype)
    # only on this path does fairseq's own attention stop before its softmax
    with patch.object(module, "skip_embed_dim_check", True):
        scores, _ = module.forward(**arguments)
    scores, mapping = scores.unflatten(0, (-1, module.num_heads)), getattr(module, "mapping", None)
    return scores, probabilities_by(mapping or Softmax())(scores).float(), mapping


def _token_masks(model: nn.Module, sample: Dict[str, Any]) -> Dict[str, Tensor]:
    """Masks of each site's queries: bool (bsz, length), true for tokens, false for padding."""
    source, target = (sample["net_input"].get(name) for name in ("src_tokens", "prev_output_tokens"))
    if target is not None:
        decoder = target.ne(model.decoder.dictionary.pad())
        return {"encoder": source.ne(model.encoder.dictionary.pad()), "decoder": decoder, "cross": decoder}
    side = "decoder" if hasattr(model, "decoder") else "encoder"
    return {side: source.ne(getattr(model, side).dictionary.pad())}
