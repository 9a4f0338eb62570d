"""timm's Vision Transformers with any mapping of scores to probabilities in the place of softmax.

    import multimax_vit, timm
    model = timm.create_model("multimax_deit_small_patch16_224", output_mapping="multimax")

As in the paper's experiment on ImageNet, tokens are averaged (``global_pool="avg"``, no class token) after the last
normalisation. MultiMax acts in the attention of every block, and with ``output_mapping="multimax"`` on the classes.

Importing this file registers the models with timm. It runs scripts that know nothing of it, too, such as timm's own
``train.py``:

    python examples/vision/multimax_vit.py train.py DATA --model multimax_deit_small_patch16_224 \\
        --model-kwargs attention_mapping=multimax output_mapping=multimax

Sources: Zhou, Fritz, Keuper, *MultiMax: Sparse and Multi-Modal Attention Learning*, ICML 2024; Touvron et al.,
*Training data-efficient image transformers & distillation through attention*, ICML 2021 (DeiT).
"""

import contextlib
import functools
import math
import pickle
import re
import runpy
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def declare_missing_operators() -> None:
    """Let torchvision be imported where its operators in C++ do not load, since nothing here calls them.

    timm imports torchvision, which PyPI has for CUDA: beside a torch for CPUs its import ends with "operator
    torchvision::nms does not exist". An operator of that name, without any code, is all that it asks for.
    """
    while True:
        try:
            import torchvision  # noqa: F401
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor unused) -> Tensor")  # a second time it is an error of its own
        else:
            return


declare_missing_operators()

from timm.layers import Attention, maybe_add_mask, resolve_self_attn_mask  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model  # noqa: E402
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn  # noqa: E402

from multimax_fairseq.compat import trust_plain_records  # noqa: E402
from multimax_fairseq.mappings import MultiMax, build_mapping  # noqa: E402

OUTPUT_MAPPINGS = ("softmax", "multimax")

# Width and heads; all have 12 blocks, patches of 16 × 16, and 64 numbers a head.
DEIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}

# the authors' names of parameters → those of multimax_fairseq.mappings.MultiMax
AUTHORS_NAMES = {"ranges": "thresholds", "ts": "gains"}

# called with scores and probabilities, (batch, heads, queries, keys) each
OnAttention = Callable[[Tensor, Tensor], None]


class InsteadOfFusedAttention(TorchFunctionMode):
    """While it is entered, ``F.scaled_dot_product_attention`` is ``attend``, which takes the same arguments."""

    def __init__(self, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            self.calls += 1
            function = self.attend
        return function(*args, **(kwargs or {}))


class MappedAttention(Attention):
    """timm's attention with another mapping in the place of softmax.

    ``forward`` is timm's, with its projections and normalisations; where it calls PyTorch's fused attention, it gets
    :meth:`attend`. With softmax nothing is replaced. An instance is made of one of timm's by :meth:`adopt`.

    Attributes:
        mapping: module over the last dimension, from ``multimax_fairseq.mappings.build_mapping``; None is softmax.
        on_attention: where it is not None, it is called with scores and probabilities (see :func:`recording`).
    """

    mapping: Optional[nn.Module]
    on_attention: Optional[OnAttention]

    @classmethod
    def adopt(cls, attention: Attention, mapping: Optional[nn.Module]) -> "MappedAttention":
        """Turn timm's ``attention`` into one with a mapping: the same object, with its weights, returned."""
        if type(attention) is not Attention:
            raise ValueError(f"a mapping can be put into timm's Attention, not into {type(attention).__name__}")
        attention.__class__ = cls
        attention.mapping = mapping
        attention.on_attention = None
        return attention

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.mapping is None and self.on_attention is None:
            return super().forward(x, *args, **kwargs)
        timms_choice, self.fused_attn = self.fused_attn, True
        try:
            with InsteadOfFusedAttention(self.attend) as instead:
                output = super().forward(x, *args, **kwargs)
        finally:
            self.fused_attn = timms_choice
        if instead.calls != 1:
            raise RuntimeError("this version of timm computes attention in another way: its mapping was not called")
        return output

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor] = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        """dropout(mapping(query · keyᵀ / √head_dim)) · value, by head.

        Args:
            query, key, value: (batch, heads, length, head_dim).
            attn_mask: bool (True: seen) or to be added to the scores.
            dropout_p: probability of dropping a probability.
            is_causal: whether a query sees only the keys up to its own position.

        Returns:
            (batch, heads, length, head_dim).
        """
        shape = query.shape
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        # alpha saves a copy of the scaled queries; beta = 0 leaves the first argument unread
        scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.transpose(1, 2), beta=0, alpha=self.scale)
        scores = scores.view(*shape[:3], -1)
        scores = maybe_add_mask(scores, resolve_self_attn_mask(shape[2], scores, attn_mask, is_causal))
        probabilities = scores.softmax(-1) if self.mapping is None else self.mapping(scores)
        if self.on_attention is not None:
            self.on_attention(scores, probabilities)
        if dropout_p:
            probabilities = F.dropout(probabilities, dropout_p)
        return torch.bmm(probabilities.flatten(0, 1), value).view(shape)


class MultiMaxVisionTransformer(VisionTransformer):
    """timm's ``VisionTransformer`` with a mapping in the attention of each block, and one on the classes.

    With ``output_mapping="multimax"`` the model returns σ(logits): softmax and cross-entropy of them are MultiMax's.

    Args:
        attention_mapping: a name of ``multimax_fairseq.mappings.MAPPINGS``. ``softmax`` leaves timm's attention as it
            is, with its fused kernels.
        attention_options: of :func:`multimax_fairseq.mappings.build_mapping`, such as ``{"order": 1}``.
        output_mapping: ``softmax`` or ``multimax``.
        output_options: likewise.
        options: timm's own; without them tokens are averaged and there is no class token.

    Raises:
        ValueError: a mapping has another name, or one of its options another value.
    """

    def __init__(
        self,
        *args: Any,
        attention_mapping: str = "multimax",
        output_mapping: str = "softmax",
        attention_options: Optional[Dict[str, Any]] = None,
        output_options: Optional[Dict[str, Any]] = None,
        **options: Any,
    ):
        if output_mapping not in OUTPUT_MAPPINGS:
            raise ValueError(f"the classes are mapped by {' or '.join(OUTPUT_MAPPINGS)}; got {output_mapping!r}")
        # fc_norm=False: timm would normalise after averaging, and the authors do before
        averaged = {"global_pool": "avg", "class_token": False, "fc_norm": False}
        super().__init__(*args, **{**averaged, **options})
        for block in self.blocks:
            # entmax has an α of its own for each head, if it learns α at all
            by_head = {"num_heads": block.attn.num_heads} if attention_mapping == "entmax" else {}
            mapping = build_mapping(attention_mapping, **by_head, **(attention_options or {}))
            MappedAttention.adopt(block.attn, None if attention_mapping == "softmax" else mapping)
        mapping = build_mapping(output_mapping, **(output_options or {}))
        self.output_mapping = mapping if isinstance(mapping, MultiMax) else None

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = super().forward_head(x, pre_logits)
        returns_logits = not pre_logits and self.num_classes > 0
        return self.output_mapping.modulate(x) if returns_logits and self.output_mapping is not None else x

    def no_weight_decay(self) -> Set[str]:
        """timm's, and the numbers of all mappings: the authors' are vectors, which timm does not decay."""
        return super().no_weight_decay() | self.mapping_parameters()

    def mapping_parameters(self) -> Set[str]:
        """Names of the parameters that stock timm models do not have."""
        return {name for name, _ in self.named_parameters() if "mapping." in name}

    def load_state_dict(self, state_dict: Dict[str, Tensor], *args: Any, **kwargs: Any):
        return super().load_state_dict(convert_checkpoint(state_dict, self), *args, **kwargs)


def convert_checkpoint(state_dict: Dict[str, Tensor], model: MultiMaxVisionTransformer) -> Dict[str, Tensor]:
    """Weights by this model's names, from those of its own, of stock timm models, or of the authors' code.

    - The authors' ``ranges`` and ``ts``, flat in the order b1, d1, b2, d2, become ``thresholds`` and ``gains``.
    - Weights without any mapping's get MultiMax's at 0, where it is softmax; other mappings keep theirs.
    - The class token and its position are left out where the model has none.
    """
    converted = {}
    for name, tensor in state_dict.items():
        *path, last = name.removeprefix("module.").split(".")
        if last in AUTHORS_NAMES:
            path.append("mapping" if path else "output_mapping")
            last, tensor = AUTHORS_NAMES[last], tensor.reshape(-1, 2)
        converted[".".join([*path, last])] = tensor
    if model.cls_token is None and "cls_token" in converted:
        del converted["cls_token"]
        positions = converted["pos_embed"]
        if math.isqrt(positions.size(1)) ** 2 != positions.size(1):
            converted["pos_embed"] = positions[:, 1:]
    names = model.mapping_parameters()
    if names.isdisjoint(converted):
        for name, parameter in model.named_parameters():
            if name in names:
                is_multimax = name.endswith((".thresholds", ".gains"))
                converted[name] = torch.zeros_like(parameter) if is_multimax else parameter.detach()
    return converted


def load_authors_checkpoint(path: Union[str, Path], **options: Any) -> MultiMaxVisionTransformer:
    """The model, in evaluation mode, of a checkpoint that the authors' ``vision_transformer.py`` has made.

    The size of pictures, patches and layers is read off the weights. What weights do not tell is as in DeiT, by which
    the authors train: 64 numbers a head, and 1e-6 in the normalisations.

    Args:
        path: a file of ``torch.save``: the weights, or a dictionary with them under ``model``, as DeiT's is.
        options: of the model, where it is not DeiT's, for instance ``num_heads=8``.

    Raises:
        ValueError: it is another kind of file, or another kind of model.

    Source: github.com/ZhouYuxuanYX/MultiMax, vision_transformer.py.
    """
    weights = read_weights(path)
    flat = {name: weights[name].numel() for name in weights if name.split(".")[-1] in AUTHORS_NAMES}
    if not flat:
        raise ValueError(f"{path} has no `ranges` and `ts`; load it with timm: create_model(…, checkpoint_path=…)")
    if set(flat.values()) != {4} or "pos_embed" not in weights or "cls_token" in weights:
        raise ValueError(f"{path} is of another version of the authors' model; this reads order 2, no class token")
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    width, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    inferred = {
        "img_size": math.isqrt(weights["pos_embed"].size(1)) * patch_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "num_classes": weights["head.weight"].size(0),
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // 64,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].size(0) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,  # the authors' own code has none
        "attention_mapping": "multimax" if "blocks.0.attn.ts" in weights else "softmax",
        "output_mapping": "multimax" if "ts" in weights else "softmax",
    }
    model = MultiMaxVisionTransformer(**{**inferred, **options})
    model.load_state_dict(weights)
    return model.eval()


def read_weights(path: Union[str, Path]) -> Dict[str, Tensor]:
    """Names and tensors of a checkpoint, without running code that it may hold."""
    # DeiT's script saves its options, too: numbers and strings. (Not with torch's safe_globals, which when it
    # ends takes from the list what others have put there, too.)
    trust_plain_records()
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights, and reading that could run code; save its weights alone, "
            f"where you trust it: {str(error).splitlines()[0]}"
        ) from error
    weights = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} has no dictionary of weights, neither itself nor under `model`")
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


@contextlib.contextmanager
def recording(
    model: MultiMaxVisionTransformer, on_attention: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """While it is entered, each block calls ``on_attention`` with its number, scores and probabilities.

    Scores and probabilities are (batch, heads, queries, keys); the former scaled, and not modulated.
    """
    for number, block in enumerate(model.blocks):
        block.attn.on_attention = functools.partial(on_attention, number)
    try:
        yield
    finally:
        for block in model.blocks:
            block.attn.on_attention = None


def _filter(state_dict: Dict[str, Any], model: MultiMaxVisionTransformer) -> Dict[str, Tensor]:
    """What timm calls on weights before it loads them: positions and patches are resampled to the model's size."""
    return checkpoint_filter_fn(convert_checkpoint(state_dict.get("model", state_dict), model), model)


def _create_deit(size: str, pretrained: bool, options: Dict[str, Any]) -> MultiMaxVisionTransformer:
    width, num_heads = DEIT[size]
    shape = {"patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": num_heads}
    return build_model_with_cfg(
        MultiMaxVisionTransformer,
        f"multimax_deit_{size}_patch16_224",
        pretrained,
        pretrained_filter_fn=_filter,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **options},
    )


# Read by register_model: how pictures are prepared, and where the stock weights are that ``pretrained=True`` loads.
default_cfgs = generate_default_cfgs(
    {
        f"multimax_deit_{size}_patch16_224.fb_in1k": get_pretrained_cfg(f"deit_{size}_patch16_224").to_dict()
        for size in DEIT
    }
)


@register_model
def multimax_deit_tiny_patch16_224(pretrained: bool = False, **options: Any) -> MultiMaxVisionTransformer:
    """DeiT-tiny (5M parameters) with the arguments of :class:`MultiMaxVisionTransformer`."""
    return _create_deit("tiny", pretrained, options)


@register_model
def multimax_deit_small_patch16_224(pretrained: bool = False, **options: Any) -> MultiMaxVisionTransformer:
    """DeiT-small (22M parameters), likewise."""
    return _create_deit("small", pretrained, options)


@register_model
def multimax_deit_base_patch16_224(pretrained: bool = False, **options: Any) -> MultiMaxVisionTransformer:
    """DeiT-base (86M parameters), likewise."""
    return _create_deit("base", pretrained, options)


def main(arguments: List[str]) -> None:
    """Run a Python script, where these models are registered."""
    if not arguments or not Path(arguments[0]).is_file():
        sys.exit("usage: multimax_vit.py SCRIPT [ARGUMENT ...]     the script is, for instance, timm's train.py")
    sys.argv[:] = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
