"""What the attention of a model does on a batch: scores and probabilities of every site, layer and head.

Works for this plugin's models and for fairseq's own, translation and language models. Nothing in a model is
replaced: hooks ask each attention module for what it can say anyway, and are gone afterwards.
"""

import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from ..mappings import additive_mask


class AttentionModule(NamedTuple):
    """An attention module and where it stands.

    Attributes:
        name: in the model, such as ``decoder.layers.0.encoder_attn``.
        site: ``"encoder"``, ``"decoder"`` (self-attention) or ``"cross"``.
        layer: from 0, within its site.
        module: the module itself.
    """

    name: str
    site: str
    layer: int
    module: MultiheadAttention

    @property
    def mapping(self) -> Optional[nn.Module]:
        """What turns its scores into probabilities; None for fairseq's own softmax."""
        return getattr(self.module, "mapping", None)


class Attention(NamedTuple):
    """What an attention module did on a batch.

    Attributes:
        site, layer: as of :class:`AttentionModule`.
        scores: (bsz, num_heads, tgt_len, src_len), scaled and masked (−inf), before σ or whatever the mapping is.
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
        layer: from 1; 0 is what goes into the first.
        hidden: (bsz, length, dim).
    """

    side: str
    layer: int
    hidden: Tensor


class Output(NamedTuple):
    """The vocabulary's distribution at each position of the decoder.

    Attributes:
        scores: (bsz, tgt_len, vocabulary), the logits, before σ of an output mapping.
        probabilities: (bsz, tgt_len, vocabulary).
    """

    scores: Tensor
    probabilities: Tensor


@dataclass
class Collected:
    """All of it for one batch, in the order of the model.

    Attributes:
        masks: bool (bsz, length) by site, true where a query is a token and no padding.
        output: None where an adaptive softmax never has all scores.
    """

    attention: List[Attention] = field(default_factory=list)
    layers: List[LayerOutput] = field(default_factory=list)
    masks: Dict[str, Tensor] = field(default_factory=dict)
    output: Optional[Output] = None

    def at(self, site: str) -> List[Attention]:
        """The attention of each layer of a site."""
        return [attention for attention in self.attention if attention.site == site]


def attention_modules(model: nn.Module) -> List[AttentionModule]:
    """The attention modules of a model, in its order.

    Raises:
        ValueError: it has none of fairseq's ``MultiheadAttention``, or one that never forms probabilities.
    """
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
    """While open, each forward pass of the model reports what its attention and its layers did.

    One module after the other, so that whoever listens can keep as little as it likes::

        with recording(model, on_attention=lambda attention: print(attention.site, attention.layer)):
            model(**sample["net_input"])

    The model computes what it computes otherwise; it has to see whole sentences (no decoding cache).
    """
    with ExitStack() as stack:
        for attention in attention_modules(model):
            if on_attention is not None:
                _report_attention(attention, on_attention, stack)
        numbers: Dict[str, int] = {}
        for name, module in model.named_modules():
            if hasattr(module, "can_use_fastpath"):
                # fairseq 0.12.2 evaluates its own encoder layers by one kernel, around their attention modules
                stack.enter_context(_attribute(module, "can_use_fastpath", False))
            if on_layer is not None and isinstance(getattr(module, "self_attn", None), MultiheadAttention):
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
    wanted: List[Dict[str, Any]] = []  # the arguments as the model gave them

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

    # fairseq's own attention has the weights of single heads only on this path
    stack.enter_context(_attribute(module, "skip_embed_dim_check", True))
    for handle in (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ):
        stack.callback(handle.remove)


def _scores(module: MultiheadAttention, arguments: Dict[str, Any]) -> Tensor:
    """Masked scores, (bsz · num_heads, tgt_len, src_len), by another call without hooks."""
    mask = arguments["attn_mask"]
    if mask is not None:
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
    """Where the queries of each site are tokens: bool (bsz, length) by site, false for padding."""
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
    """One pass of a batch through a model in evaluation, reporting as :func:`recording` does.

    Args:
        model: is left in the mode that it was in.
        sample: a batch of fairseq, on the model's device.
        with_output: also return the vocabulary's distribution (None with an adaptive softmax).
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
    """The attention, the layers' outputs and the output distribution of a model on one batch.

    For looking at a few sentences: all of it is kept. ``collect(model, sample).at("cross")[0].probabilities`` are
    the probabilities of the first decoder layer's cross-attention, (bsz, num_heads, tgt_len, src_len).

    Args:
        model: of this plugin or of fairseq, in any mode (it is evaluated).
        sample: a batch of fairseq: ``task.dataset("valid").collater([...])``.

    Raises:
        ValueError: the model has no attention that can be looked at.
    """
    collected = Collected(masks=token_masks(model, sample))
    collected.output = run(model, sample, collected.attention.append, collected.layers.append, with_output=True)
    return collected


def output_mapping(model: nn.Module) -> Optional[nn.Module]:
    """The mapping of a model's output layer, None where that is softmax."""
    return getattr(getattr(model, "decoder", None), "output_mapping", None)
