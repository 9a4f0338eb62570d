"""The walk over a model that fairseq has built: where its attention is, and what it maps with from then on."""

from typing import Dict, Iterator, Tuple

from fairseq.modules import MultiheadAttention
from torch import nn


def attention_sites(model: nn.Module) -> Iterator[Tuple[str, int, MultiheadAttention]]:
    """Each attention module of a model, in model order, whatever fairseq has wrapped around its layer.

    Yields:
        site ("encoder", "decoder" or "cross"), number among the modules of that site (from 0), module.
    """
    count: Dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            site = "decoder" if "decoder" in name.split(".") else "encoder"
            site = "cross" if module.encoder_decoder_attention else site
            count[site] = count.get(site, -1) + 1
            yield site, count[site], module
