"""timm's Vision Transformers with any mapping of scores to probabilities in the place of softmax.

    import multimax_vit, timm
    model = timm.create_model("multimax_deit_small_patch16_224", output_mapping="multimax")

As in the paper's experiment on ImageNet, tokens are averaged (``global_pool="avg"``, no class token) after the last
normalisation. MultiMax acts in the attention of every block, and with ``output_mapping="multimax"`` on the classes.
"""

import math
import pickle
import re
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Set, Union

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def declare_missing_operators() -> None:
    """Let torchvision, which timm imports, be imported beside a torch for CPUs: nothing calls its operators."""
    while True:
        try:
            import torchvision  # noqa: F401

            return
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "(Tensor unused) -> Tensor")


declare_missing_operators()

from timm.layers import Attention  # noqa: E402
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from multimax_fairseq.compat import trust_plain_records  # noqa: E402
from multimax_fairseq.mappings import MultiMax, Softmax, build_mapping  # noqa: E402

OUTPUT_MAPPINGS = ("softmax", "multimax")
HEAD_WIDTH = 64  # of DeiT
DEIT = {"tiny": 192, "small": 384, "base": 768}  # widths; all have 12 blocks and patches of 16 × 16
AUTHORS_NAMES = {"ranges": "thresholds", "ts": "gains"}  # the authors' names of parameters → MultiMax's


class InsteadOfSoftmax(TorchFunctionMode):
    """While it is entered, ``scores.softmax(dim=-1)`` is ``mapping(scores)``."""

    def __init__(self, mapping: Callable[[Tensor], Tensor]):
        super().__init__()
        self.mapping, self.calls = mapping, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.softmax and not self.calls:
            self.calls += 1
            return self.mapping(args[0])
        return function(*args, **(kwargs or {}))


class MappedAttention(Attention):
    """timm's attention with a mapping where ``forward`` calls softmax; made of one of timm's by :meth:`adopt`.

    Attributes:
        mapping: over the last dimension of scores, (batch, heads, queries, keys). A forward hook on it sees them.
    """

    @classmethod
    def adopt(cls, attention: Attention, mapping: nn.Module) -> None:
        if type(attention) is not Attention:
            raise ValueError(f"a mapping can be put into timm's Attention, not into {type(attention).__name__}")
        attention.__class__ = cls
        attention.mapping = mapping

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(self.mapping) is Softmax and not self.mapping._forward_hooks:
            return super().forward(x, *args, **kwargs)
        timms_choice, self.fused_attn = self.fused_attn, False
        try:
            with InsteadOfSoftmax(self.mapping) as instead:
                output = super().forward(x, *args, **kwargs)
        finally:
            self.fused_attn = timms_choice
        if not instead.calls:
            raise RuntimeError("this version of timm computes attention in another way: its mapping was not called")
        return output


class MultiMaxVisionTransformer(VisionTransformer):
    """timm's ``VisionTransformer`` with a mapping in the attention of each block, and one on the classes.

    With ``output_mapping="multimax"`` the model returns σ(logits): softmax and cross-entropy of them are MultiMax's.

    Args:
        attention_mapping: a name of ``multimax_fairseq.mappings.MAPPINGS``; ``softmax`` is timm's own attention.
        attention_options: of :func:`multimax_fairseq.mappings.build_mapping`, such as ``{"order": 1}``.
        output_mapping: ``softmax`` or ``multimax``.
        options: timm's own; without them tokens are averaged and there is no class token.

    Raises:
        ValueError: a mapping has another name, or one of its options another value.
    """

    def __init__(self, *args: Any, attention_mapping: str = "multimax", output_mapping: str = "softmax",
                 attention_options: Optional[Dict[str, Any]] = None, **options: Any):
        if output_mapping not in OUTPUT_MAPPINGS:
            raise ValueError(f"the classes are mapped by {' or '.join(OUTPUT_MAPPINGS)}; got {output_mapping!r}")
        # fc_norm=False: timm would normalise after averaging, and the authors do before
        averaged = {"global_pool": "avg", "class_token": False, "fc_norm": False}
        super().__init__(*args, **{**averaged, **options})
        with torch.random.fork_rng(devices=[]):  # models with other mappings go on drawing alike
            for block in self.blocks:
                by_head = {"num_heads": block.attn.num_heads} if attention_mapping == "entmax" else {}
                mapping = build_mapping(attention_mapping, **by_head, **(attention_options or {}))
                MappedAttention.adopt(block.attn, mapping)
            self.output_mapping = MultiMax() if output_mapping == "multimax" else None

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = super().forward_head(x, pre_logits)
        return x if pre_logits or self.output_mapping is None else self.output_mapping.modulate(x)

    def no_weight_decay(self) -> Set[str]:
        """timm's, and the numbers of all mappings: the authors' are vectors, which timm does not decay."""
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if "mapping." in name}


def load_authors_checkpoint(path: Union[str, Path], **options: Any) -> MultiMaxVisionTransformer:
    """The model, in evaluation mode, of a checkpoint that the authors' ``vision_transformer.py`` has made.

    The size of pictures, patches and layers is read off the weights; what they do not tell is DeiT's. The authors'
    ``ranges`` and ``ts``, flat in the order b1, d1, b2, d2, become ``thresholds`` and ``gains``.

    Args:
        path: a file of ``torch.save``: the weights, or a dictionary with them under ``model``, as DeiT's is.
        options: of the model, where it is not DeiT's, for instance ``num_heads=8``.

    Raises:
        ValueError: it is another kind of file, or another kind of model.

    Source: github.com/ZhouYuxuanYX/MultiMax, vision_transformer.py.
    """
    weights = read_weights(path)
    flat = {name: weights[name].numel() for name in weights if name.split(".")[-1] in AUTHORS_NAMES}
    if set(flat.values()) != {4} or "pos_embed" not in weights or "cls_token" in weights:
        raise ValueError(f"{path} has no `ranges` and `ts` of order 2 without a class token: it is no model of the "
                         "authors' that this reads")
    width, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    if "num_heads" not in options and width % HEAD_WIDTH:
        raise ValueError(f"{path} has a width of {width}, no multiple of DeiT's {HEAD_WIDTH} numbers a head: give "
                         "num_heads=")
    inferred = {
        "img_size": math.isqrt(weights["pos_embed"].size(1)) * patch_size, "patch_size": patch_size,
        "in_chans": channels, "num_classes": weights["head.weight"].size(0), "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        "num_heads": width // HEAD_WIDTH,
        "mlp_ratio": weights["blocks.0.mlp.fc1.weight"].size(0) / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,  # the authors' own code has none
        "attention_mapping": "multimax" if "blocks.0.attn.ts" in weights else "softmax",
        "output_mapping": "multimax" if "ts" in weights else "softmax",
    }
    model = MultiMaxVisionTransformer(**{**inferred, **options})
    converted = {}
    for name, tensor in weights.items():
        *place, last = name.split(".")
        if last in AUTHORS_NAMES:
            place.append("mapping" if place else "output_mapping")
            last, tensor = AUTHORS_NAMES[last], tensor.reshape(-1, 2)
        converted[".".join([*place, last])] = tensor
    model.load_state_dict(converted)
    return model.eval()


def read_weights(path: Union[str, Path]) -> Dict[str, Tensor]:
    """Names and tensors of a checkpoint, without running code that it may hold."""
    trust_plain_records()  # DeiT's script saves its options, too: numbers and strings
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than weights, and reading that could run code: save its weights alone, "
                         "where you trust it") from error
    weights = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} has no dictionary of weights, neither itself nor under `model`")
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def register_deit(size: str, width: int) -> None:
    """Register DeiT of a size, with the arguments of :class:`MultiMaxVisionTransformer`, with timm."""

    def build(pretrained: bool = False, **options: Any) -> MultiMaxVisionTransformer:
        shape = {"patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": width // HEAD_WIDTH}
        return build_model_with_cfg(MultiMaxVisionTransformer, build.__name__, pretrained, **{**shape, **options})

    build.__name__ = f"multimax_deit_{size}_patch16_224"
    register_model(build)


# read by register_model
default_cfgs = generate_default_cfgs({f"multimax_deit_{size}_patch16_224": {"num_classes": 1000} for size in DEIT})
for name in DEIT:
    register_deit(name, DEIT[name])
