"""Attention rollout: each input token's share in an output, through all attention and residual connections.

Source: Abnar & Zuidema, *Quantifying Attention Flow in Transformers*, ACL 2020: the product over layers of
½ A + ½ I, where A is a layer's attention averaged over heads.
"""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor


def attention_rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Π over layers of ½ A + ½ I, rows normalised, for the self-attention of an encoder or a language model.

    Args:
        attentions: one for each layer, first to last: (bsz, num_heads, length, length), or averaged over heads,
            (bsz, length, length). A row of zeros (a padded query) passes its token on unchanged.

    Returns:
        (bsz, length, length): row i says how much of output i comes from each input. Rows sum to 1.
    """
    rollout = None
    for attention in attentions:
        step = _with_residual(_mean_of_heads(attention))
        rollout = step if rollout is None else step @ rollout
    if rollout is None:
        raise ValueError("a rollout needs the attention of at least one layer")
    return rollout


def translation_rollout(
    decoder: Sequence[Optional[Tensor]], cross: Sequence[Tensor], encoder: Sequence[Tensor]
) -> Tuple[Tensor, Tensor]:
    """The rollout of an encoder and a decoder: each self-attention and each cross-attention has weight ½.

    Let E be the encoder's rollout and R that of a decoder layer's inputs. Self-attention turns R into ½ A R + ½ R;
    cross-attention then turns the new R into ½ C E + ½ R.

    Args:
        decoder: self-attention of each decoder layer, (bsz, num_heads, tgt_len, tgt_len) or averaged; with
            ``--cross-self-attention`` (…, tgt_len, src_len + tgt_len), whose source part is multiplied by E.
        cross: cross-attention of each decoder layer, (bsz, num_heads, tgt_len, src_len) or averaged; none with
            ``--no-cross-attention``.
        encoder: self-attention of each encoder layer, (bsz, num_heads, src_len, src_len) or averaged.

    Returns:
        how much of each decoder output comes from each source token, (bsz, tgt_len, src_len), and from each target
        token read, (bsz, tgt_len, tgt_len). The two rows of an output together sum to 1.
    """
    if not decoder or len(cross) not in (0, len(decoder)):
        raise ValueError(f"decoder layers are alike; got {len(decoder)} self- and {len(cross)} cross-attentions")
    encoded = attention_rollout(encoder)
    bsz, src_len, _ = encoded.shape
    tgt_len = decoder[0].size(-2)
    over_source = encoded.new_zeros(bsz, tgt_len, src_len)
    over_target = torch.eye(tgt_len, dtype=encoded.dtype, device=encoded.device).expand(bsz, -1, -1)
    for layer, attention in enumerate(map(_mean_of_heads, decoder)):
        of_source, of_target = attention.split([attention.size(-1) - tgt_len, tgt_len], dim=-1)
        step = of_target + torch.eye(tgt_len, dtype=attention.dtype, device=attention.device)
        over_source, over_target = step @ over_source, step @ over_target
        if of_source.size(-1):
            over_source = over_source + of_source @ encoded
        over_source, over_target = _normalised(over_source, over_target)
        if cross:
            over_source = over_source + _mean_of_heads(cross[layer]) @ encoded
            over_source, over_target = _normalised(over_source, over_target)
    return over_source, over_target


def _normalised(over_source: Tensor, over_target: Tensor) -> Tuple[Tensor, Tensor]:
    total = (over_source.sum(-1) + over_target.sum(-1)).unsqueeze(-1)
    return over_source / total, over_target / total


def _mean_of_heads(attention: Tensor) -> Tensor:
    attention = attention.float() if attention.dtype in (torch.float16, torch.bfloat16) else attention
    return attention.mean(1) if attention.dim() == 4 else attention


def _with_residual(attention: Tensor) -> Tensor:
    step = (attention + torch.eye(attention.size(-1), dtype=attention.dtype, device=attention.device)) / 2
    return step / step.sum(-1, keepdim=True)
