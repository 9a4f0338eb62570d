"""The walk over a model that fairseq has built: where its attention is, and what it maps with from then on."""

from typing import Any, Dict, Iterator, Tuple

import torch
from fairseq.distributed import FullyShardedDataParallel
from fairseq.modules import MultiheadAttention
from torch import nn

from ..mappings import MAPPINGS, arguments_of, build_mapping
from ..modules import MappedDecoder, MappedMultiheadAttention
from ..modules.scale import SCALES
from .options import chosen_arguments, completed, mapped_sites


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


def attach(model: nn.Module, args: Any) -> None:
    """Give a Transformer the chosen mappings, with parameters drawn last, from torch's state, which stays.

    So models with other mappings start from the same projections under the same seed, and go on drawing alike.

    Raises:
        TypeError: attention is of a class that attends in its own way.
        ValueError: FSDP has already spread the layers over processes.
    """
    options, sites, parameters = completed(args), mapped_sites(args), sum(1 for _ in model.parameters())
    with torch.random.fork_rng(devices=[]):
        for site, _, attention in list(attention_sites(model)):
            if site in sites:
                name = options.attention_mapping
                arguments = chosen_arguments(name, options)
                if "num_heads" in arguments_of(MAPPINGS[name]):
                    arguments["num_heads"] = attention.num_heads
                scale = SCALES[options.attention_scale](attention.num_heads)
                MappedMultiheadAttention.adopt(attention, build_mapping(name, **arguments), site, scale)
        name = options.output_mapping
        output = None if name == "softmax" else build_mapping(name, **chosen_arguments(name, options))
        MappedDecoder.adopt(model.decoder, output)
    is_sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if is_sharded and sum(1 for _ in model.parameters()) > parameters:
        raise ValueError(
            "--ddp-backend fully_sharded spreads layers over processes before a mapping's parameters can be added to "
            "them; use --ddp-backend legacy_ddp or pytorch_ddp"
        )
