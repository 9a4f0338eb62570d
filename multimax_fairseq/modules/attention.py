"""Multi-head attention whose scores become probabilities by any mapping."""

from typing import Dict, Optional, Tuple

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from ..attention import mapped_attention, masked_scores
from ..mappings import additive_mask, is_absent
from ..mappings.masking import probabilities_by
from .scale import LogLengthScale, visible_keys


class MappedMultiheadAttention(MultiheadAttention):
    """fairseq's attention with another mapping in place of softmax.

    One path serves training, teacher forcing and step-by-step decoding::

        scores = scale · q · k / √head_dim, masked
        probabilities = mapping(scores)        (bsz, num_heads, tgt_len, src_len)
        output = out_proj(concat over heads of dropout(probabilities) · values)

    Where nobody asks for the probabilities, :func:`multimax_fairseq.attention.mapped_attention` computes it. In
    decoding, fairseq does the projections, the cache and the sharing of keys between beams, and returns the masked
    scores and the values (``before_softmax``). Instances are made from fairseq's by :meth:`adopt`.

    Attributes:
        mapping: module over the last dimension, from :func:`multimax_fairseq.mappings.build_mapping`.
        site: which attention of the model this is: ``"encoder"``, ``"decoder"`` or ``"cross"``.
        scale: the factor of the scores, from ``SCALES`` of :mod:`.scale`, or None.
        is_causal: whether it is a decoder's self-attention, to which fairseq gives no other mask than the one that
            hides what comes after a query: that one is then not read, and what it hides is not computed.
    """

    @classmethod
    def adopt(
        cls, attention: MultiheadAttention, mapping: nn.Module, site: str, scale: Optional[nn.Module] = None
    ) -> "MappedMultiheadAttention":
        """Give fairseq's ``attention`` a mapping; returns the same object.

        Unlike a constructor, this keeps exactly the weights of the stock model, drawn in the same order, in every
        version of fairseq.

        Raises:
            TypeError: it attends in its own way, which would be lost: a subclass, or xFormers.
        """
        if type(attention) not in (MultiheadAttention, cls) or getattr(attention, "use_xformers", False):
            raise TypeError(
                "only fairseq's MultiheadAttention itself, without xFormers, can be given a mapping; this "
                f"{type(attention).__name__} attends in its own way, which would be lost: leave {site} out of "
                "--attention-mapping-sites"
            )
        attention.__class__ = cls
        attention.mapping = mapping
        attention.site = site
        attention.scale = scale
        attention.extra_keys = (attention.bias_k is not None) + attention.add_zero_attn
        attention.is_causal = site == "decoder" and attention.self_attention and not attention.extra_keys
        # Keeps forward() out of F.multi_head_attention_forward, where softmax is built in.
        attention._set_skip_embed_dim_check()
        return attention

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Attend; arguments and returns as fairseq's ``MultiheadAttention.forward``.

        Args:
            query: (tgt_len, bsz, embed_dim).
            key, value: (src_len, bsz, kdim), (src_len, bsz, vdim); None where they are cached.
            key_padding_mask: (bsz, src_len), true where a key is padding.
            attn_mask: (tgt_len, src_len), or (bsz · num_heads, tgt_len, src_len), bool or to be added to the scores;
                −9,000 and less hides a key.
            before_softmax: return the masked scores and the values instead, (bsz · num_heads, tgt_len, src_len) and
                (bsz · num_heads, src_len, head_dim).

        Returns:
            The output, (tgt_len, bsz, embed_dim), and with ``need_weights`` the probabilities before dropout:
            fp32, (bsz, tgt_len, src_len) averaged over heads, or (num_heads, bsz, tgt_len, src_len) with
            ``need_head_weights``; else None.
        """
        if incremental_state is None:
            queries, keys, values = self._project(query, key, value)
            is_causal = self.is_causal and attn_mask is not None
            mask = self._mask(key_padding_mask, None if is_causal else attn_mask)
            if self.scale is not None:
                seen = queries.new_zeros(1, 1, 1, keys.size(2)) if mask is None else mask
                queries = (queries * self._factor(seen, is_causal, queries.size(2))).to(queries.dtype)
            if not (need_weights or need_head_weights or before_softmax):
                drops = self.training or self.dropout_module.apply_during_inference
                dropout = self.dropout_module.p if drops else 0.0
                output = mapped_attention(queries, keys, values, self.mapping, mask, dropout, is_causal, scale=1.0)
                return self._joined(output), None
            scores = masked_scores(queries @ keys.transpose(-2, -1), mask, is_causal)
            values = values.flatten(0, 1)
        else:
            arguments = query, key, value, key_padding_mask, incremental_state
            scores, values = super().forward(*arguments, need_weights=False, static_kv=static_kv, before_softmax=True)
            scores = self._scaled_and_masked(scores.view(query.size(1), self.num_heads, *scores.shape[1:]), attn_mask)
        if before_softmax:
            return scores.flatten(0, 1), values

        probabilities = probabilities_by(self.mapping)(scores).to(values.dtype)
        output = self._joined(self._weighted_sum(self.dropout_module(probabilities), values))
        if not (need_weights or need_head_weights):
            return output, None
        weights = probabilities.float().transpose(0, 1)  # (num_heads, bsz, tgt_len, src_len)
        return output, weights if need_head_weights else weights.mean(dim=0)

    def _project(self, query: Tensor, key: Optional[Tensor], value: Optional[Tensor]) -> Tuple[Tensor, ...]:
        """Queries times 1 / √head_dim, keys and values, (bsz, num_heads, length, head_dim)."""
        if self.self_attention:
            key = value = query
        elif self.encoder_decoder_attention:
            value = key
        queries, keys, values = self.q_proj(query).mul_(self.scaling), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None:
            keys, values = (
                torch.cat([tensor, extra.to(tensor).expand(1, *tensor.shape[1:])])
                for tensor, extra in ((keys, self.bias_k), (values, self.bias_v))
            )
        if self.add_zero_attn:
            keys, values = (torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]) for tensor in (keys, values))
        heads = query.size(1), self.num_heads, self.head_dim
        return tuple(tensor.view(tensor.size(0), *heads).permute(1, 2, 0, 3) for tensor in (queries, keys, values))

    def _mask(self, key_padding_mask: Optional[Tensor], attn_mask: Optional[Tensor]) -> Optional[Tensor]:
        """What to add to scores, (bsz | 1, num_heads | 1, tgt_len | 1, src_len); keys of no token come last."""
        mask = None if attn_mask is None else self._by_head(additive_mask(attn_mask, torch.float32))
        if key_padding_mask is not None:
            padding = additive_mask(key_padding_mask.bool(), torch.float32)[:, None, None]
            mask = padding if mask is None else mask + padding
        return torch.nn.functional.pad(mask, (0, self.extra_keys)) if self.extra_keys and mask is not None else mask

    def _by_head(self, mask: Tensor) -> Tensor:
        """A mask of :meth:`forward`, with dimensions for sentences and heads."""
        return mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))

    def _factor(self, seen: Tensor, is_causal: bool, tgt_len: int) -> Tensor:
        """What ``scale`` makes of the keys that are seen, as :func:`.scale.visible_keys` counts them."""
        if isinstance(self.scale, LogLengthScale):
            return self.scale(visible_keys(seen, is_causal, tgt_len))
        return self.scale()

    def _scaled_and_masked(self, scores: Tensor, attn_mask: Optional[Tensor]) -> Tensor:
        """Scores of fairseq, −inf at padding, (bsz, num_heads, tgt_len, src_len), times ``scale``, plus the mask."""
        added = 0.0 if attn_mask is None else self._by_head(additive_mask(attn_mask, scores.dtype))
        if self.scale is not None:
            absent = is_absent(scores)
            factor = self._factor(scores + added, False, scores.size(2))
            scores = (scores.masked_fill(absent, 0.0) * factor).to(scores.dtype).masked_fill(absent, -torch.inf)
        return scores + added

    def _joined(self, output: Tensor) -> Tensor:
        """(bsz, num_heads, tgt_len, head_dim) → (tgt_len, bsz, embed_dim), projected."""
        bsz, _, tgt_len, _ = output.shape
        return self.out_proj(output.permute(2, 0, 1, 3).reshape(tgt_len, bsz, self.embed_dim))

    def _weighted_sum(self, probabilities: Tensor, values: Tensor) -> Tensor:
        """probabilities · values, head by head.

        Args:
            probabilities: (bsz, num_heads, tgt_len, src_len).
            values: (kv_bsz · num_heads, src_len, head_dim); kv_bsz is bsz, or the number of sentences where
                the hypotheses of a beam, which lie side by side in bsz, share their keys and values.

        Returns:
            (bsz, num_heads, tgt_len, head_dim).
        """
        bsz, num_heads, tgt_len, src_len = probabilities.shape
        if values.size(0) == bsz * num_heads:
            return torch.bmm(probabilities.flatten(0, 1), values).view(bsz, num_heads, tgt_len, self.head_dim)
        values = values.view(-1, num_heads, src_len, self.head_dim)
        by_sentence = probabilities.view(values.size(0), -1, num_heads, tgt_len, src_len)
        # einsum computes a beam in one product; matmul would copy the values for each hypothesis
        return torch.einsum("sbhij,shjd->sbhid", by_sentence, values).flatten(0, 1)
