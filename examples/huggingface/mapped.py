"""Hugging Face models with another mapping than softmax in their attention: a class for yours, and a small demo.

    python examples/huggingface/mapped.py [MAPPING]     # trains a tiny GPT-2; seconds

``mapped(GPT2LMHeadModel)`` is that class with the mapping that its configuration names. Each attention has its own
module, whose parameters are trained, saved and loaded with the model; weights of the stock model load too. It takes
any model that asks transformers' ``AttentionInterface`` for its attention, as most of them do.
"""

import sys
from functools import partial

import torch
import transformers
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from multimax_fairseq.attention import mapped_attention
from multimax_fairseq.mappings import build_mapping

NAME = "mapped_attention"
REFUSED = ("position_bias", "softcap", "s_aux")  # what some models do to scores, and mapped_attention does not


def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **others):
    """What transformers calls; query is (batch, heads, length, head_dim), key and value may have fewer heads."""
    for name in REFUSED:
        if others.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__} asks for {name}, which mapped_attention has not")
    groups = query.size(1) // key.size(1)
    key, value = (tensor.repeat_interleave(groups, dim=1) if groups > 1 else tensor for tensor in (key, value))
    causal = module.is_causal if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.size(2) > 1
    output = mapped_attention(query, key, value, module.mapping, attention_mask, dropout, causal, scaling)
    return output.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # true where a key takes part; None where is_causal says it all


def mapped(model_class):
    """``model_class`` with ``build_mapping(**config.mapping)`` in each attention: ``{"name": "multimax", …}``."""

    class Mapped(model_class):
        def __init__(self, config, *args, **kwargs):
            config._attn_implementation = NAME
            super().__init__(config, *args, **kwargs)
            for module in list(self.modules()):
                if hasattr(module, "is_causal") and hasattr(module, "scaling"):  # attention, in every model
                    module.mapping = build_mapping(**config.mapping)
                elif isinstance(module, transformers.PreTrainedModel):
                    module._init_weights = partial(start, module._init_weights, config.mapping)

    Mapped.__name__ = model_class.__name__  # what save_pretrained writes down
    return Mapped


@torch.no_grad()
def start(start_stock, mapping, module):
    """What from_pretrained calls for each module: what the saved model lacks of a mapping starts as in a new one."""
    new = build_mapping(**mapping)
    if type(module) is not type(new):
        return start_stock(module)
    for kind in (nn.Module.parameters, nn.Module.buffers):
        for tensor, first in zip(kind(module), kind(new)):
            if not getattr(tensor, "_is_hf_initialized", False):
                tensor.copy_(first)


def main(mapping="multimax"):
    torch.manual_seed(1)
    tokens = torch.randint(1, 50, (16, 12)).repeat(1, 2)  # the second half repeats the first
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, mapping={"name": mapping})
    model = mapped(transformers.GPT2LMHeadModel)(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(61):
        loss = model(tokens, labels=tokens).loss
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.2f}")
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    for name, parameter in model.named_parameters():
        if ".mapping." in name:
            print(f"    {name}: {[round(number, 2) for number in parameter.flatten().tolist()]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
