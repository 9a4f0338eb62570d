"""Collects a model's attention on a batch: scores and probabilities of every site, layer and head.

Works for this plugin's and fairseq's own translation and language models. It replaces nothing in a model: temporary
hooks ask each attention module for what it can already return.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from ..mappings import additive_mask

if TYPE_CHECKING:  # importing fairseq takes seconds, and many tools need only the files of this package
    from fairseq.modules import MultiheadAttention


class AttentionModule(NamedTuple):
    """An attention module and its place.

    Attributes:
        name: in the model, such as ``decoder.layers.0.encoder_attn``.
        site: ``"encoder"``, ``"decoder"`` (self-attention) or ``"cross"``.
        layer: from 0, within its site.
    """

    name: str
    site: str
    layer: int
    module: MultiheadAttention

    @property
    def mapping(self) -> Optional[nn.Module]:
        """Its mapping from scores to probabilities; None for fairseq's own softmax."""
        return getattr(self.module, "mapping", None)


class Attention(NamedTuple):
    """What an attention module did on a batch.

    Attributes:
        site, layer: as of :class:`AttentionModule`.
        scores: (bsz, num_heads, tgt_len, src_len), scaled and masked (−inf), before the mapping (and so before σ).
        probabilities: (bsz, num_heads, tgt_len, src_len), fp32, without dropout.
    """

    site: str
    layer: int
    scores: Tensor
    probabilities: Tensor


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


class Output(NamedTuple):
    """The distribution over the vocabulary at each position of the decoder.

    Attributes:
        scores: (bsz, tgt_len, vocabulary), the logits, before an output mapping's σ.
        probabilities: (bsz, tgt_len, vocabulary).
    """

    scores: Tensor
    probabilities: Tensor


@dataclass
class Collected:
    """Everything collected on one batch, in model order.

    Attributes:
        masks: bool (bsz, length) by site, true where a query is a token, false at padding.
        output: None with an adaptive softmax, which never has all scores.
    """

    attention: List[Attention] = field(default_factory=list)
    layers: List[LayerOutput] = field(default_factory=list)
    masks: Dict[str, Tensor] = field(default_factory=dict)
    output: Optional[Output] = None

    def at(self, site: str) -> List[Attention]:
        """The attention of each layer of a site."""
        return [attention for attention in self.attention if attention.site == site]


def attention_modules(model: nn.Module) -> List[AttentionModule]:
    """The attention modules of a model, in model order.

    Raises:
        ValueError: it has no fairseq ``MultiheadAttention``, or one that never forms probabilities.
    """
    from fairseq.modules import MultiheadAttention

    found, layers = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, MultiheadAttention):
            continue
        if getattr(module, "use_xformers", False):
            raise ValueError(f"{name} is xFormers attention, which never forms the probabilities to look at")
        site = "cross" if module.encoder_decoder_attention else _side(name)
        layers[site] = layers.get(site, -1) + 1
        found.append(AttentionModule(name, site, layers[site], module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention to analyse: none of its modules is fairseq's MultiheadAttention"
        )
    return found


def _side(name: str) -> str:
    return "decoder" if "decoder" in name.split(".") else "encoder"


@contextmanager
def recording(
    model: nn.Module,
    on_attention: Optional[Callable[[Attention], Any]] = None,
    on_layer: Optional[Callable[[LayerOutput], Any]] = None,
) -> Iterator[None]:
    """Report what attention modules and layers do in each forward pass of the model.

    Modules report one after another, so a listener can keep as little as it likes::

        with recording(model, on_attention=lambda attention: print(attention.site, attention.layer)):
            model(**sample["net_input"])

    The model's results do not change. It has to see whole sentences (no decoding cache).
    """
    found = attention_modules(model)
    attentions = [attention.module for attention in found]
    with ExitStack() as stack:
        for attention in found:
            if on_attention is not None:
                _report_attention(attention, on_attention, stack)
        numbers: Dict[str, int] = {}
        for name, module in model.named_modules():
            if hasattr(module, "can_use_fastpath"):
                # fairseq 0.12.2 evaluates its own encoder layers in one kernel that bypasses their attention modules
                stack.enter_context(_attribute(module, "can_use_fastpath", False))
            if on_layer is not None and getattr(module, "self_attn", None) in attentions:
                side = _side(name)
                numbers[side] = numbers.get(side, 0) + 1
                _report_layer(side, numbers[side], module, on_layer, stack)
        yield


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _report_attention(attention: AttentionModule, report: Callable[[Attention], Any], stack: ExitStack) -> None:
    module = attention.module
    signature = inspect.signature(module.forward)
    wanted: List[Dict[str, Any]] = []  # the model's arguments

    def before(module: MultiheadAttention, args: Tuple, kwargs: Dict[str, Any]):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["incremental_state"] is not None:
            raise ValueError("attention can be recorded of whole sentences, not while decoding with a cache")
        wanted.append(dict(bound.arguments))
        return (), {**bound.arguments, "need_weights": True, "need_head_weights": True}

    def after(module: MultiheadAttention, args: Tuple, kwargs: Dict[str, Any], result: Tuple[Tensor, Tensor]):
        asked = wanted.pop()
        output, weights = result  # weights: (num_heads, bsz, tgt_len, src_len)
        scores = _scores(module, kwargs)
        probabilities = weights.transpose(0, 1)
        report(Attention(attention.site, attention.layer, scores.view_as(probabilities), probabilities))
        if asked["need_head_weights"]:
            return output, weights
        return output, weights.mean(0) if asked["need_weights"] else None

    # only on this path does fairseq's own attention return the weights of each head
    stack.enter_context(_attribute(module, "skip_embed_dim_check", True))
    for handle in (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ):
        stack.callback(handle.remove)


def _scores(module: MultiheadAttention, arguments: Dict[str, Any]) -> Tensor:
    """Masked scores, (bsz · num_heads, tgt_len, src_len), from a second call without hooks."""
    mask = arguments["attn_mask"]
    if isinstance(mask, Tensor):
        arguments = {**arguments, "attn_mask": additive_mask(mask, arguments["query"].dtype)}
    return module.forward(**{**arguments, "before_softmax": True})[0]


def _report_layer(
    side: str, number: int, layer: nn.Module, report: Callable[[LayerOutput], Any], stack: ExitStack
) -> None:
    def before(_, args: Tuple, kwargs: Dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["x"]
        report(LayerOutput(side, 0, hidden.transpose(0, 1)))

    def after(_, args: Tuple, result: Any) -> None:
        hidden = result[0] if isinstance(result, tuple) else result
        report(LayerOutput(side, number, hidden.transpose(0, 1)))

    if number == 1:
        stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(layer.register_forward_hook(after).remove)


def token_masks(model: nn.Module, sample: Dict[str, Any]) -> Dict[str, Tensor]:
    """Masks of each site's queries: bool (bsz, length), true for tokens, false for padding."""
    net_input = sample["net_input"]
    source = net_input["src_tokens"]
    if "prev_output_tokens" in net_input:
        target = net_input["prev_output_tokens"]
        decoder = target.ne(model.decoder.dictionary.pad())
        return {"encoder": source.ne(model.encoder.dictionary.pad()), "decoder": decoder, "cross": decoder}
    side = "decoder" if hasattr(model, "decoder") else "encoder"
    return {side: source.ne(getattr(model, side).dictionary.pad())}


@torch.no_grad()
def run(
    model: nn.Module,
    sample: Dict[str, Any],
    on_attention: Optional[Callable[[Attention], Any]] = None,
    on_layer: Optional[Callable[[LayerOutput], Any]] = None,
    with_output: bool = False,
) -> Optional[Output]:
    """Run a batch through a model in evaluation mode, reporting as :func:`recording` does.

    Args:
        model: its mode is restored afterwards.
        sample: a fairseq batch on the model's device.
        with_output: also return the distribution over the vocabulary (None with an adaptive softmax).
    """
    was_training = model.training
    model.eval()
    projection = getattr(getattr(model, "decoder", None), "output_projection", None) if with_output else None
    logits: List[Tensor] = []
    try:
        with recording(model, on_attention, on_layer), ExitStack() as stack:
            if projection is not None:
                stack.callback(projection.register_forward_hook(lambda _, __, out: logits.append(out)).remove)
            net_output = model(**sample["net_input"])
    finally:
        model.train(was_training)
    if not logits:
        return None
    return Output(logits[0], model.get_normalized_probs(net_output, log_probs=False))


def collect(model: nn.Module, sample: Dict[str, Any]) -> Collected:
    """Collect a model's attention, layer outputs and output distribution on one batch.

    For a few sentences: everything is kept. ``collect(model, sample).at("cross")[0].probabilities`` are the
    probabilities of the first decoder layer's cross-attention, (bsz, num_heads, tgt_len, src_len).

    Args:
        model: of this plugin or of fairseq, in any mode (it runs in evaluation mode).
        sample: a fairseq batch: ``task.dataset("valid").collater([...])``.

    Raises:
        ValueError: the model has no attention that can be recorded.
    """
    collected = Collected(masks=token_masks(model, sample))
    collected.output = run(model, sample, collected.attention.append, collected.layers.append, with_output=True)
    return collected


def output_mapping(model: nn.Module) -> Optional[nn.Module]:
    """The mapping of a model's output layer; None for softmax."""
    return getattr(getattr(model, "decoder", None), "output_mapping", None)
