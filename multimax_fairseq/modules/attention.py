"""Multi-head attention whose scores become probabilities by any mapping."""

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Dict, Iterator, Optional, Tuple, Union

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

from ..kernels.attention import MIN_KEYS, multimax_attention
from ..kernels.backend import is_traced
from ..kernels.masks import Masks
from ..mappings import MultiMax, additive_mask
from .scale import visible_keys

CAUSAL = "is_causal"  # attribute of a decoder's mask that hides what comes after a query, and nothing else

# Factor of the queries in the attention that is running, besides 1 / √head_dim.
_query_factor: ContextVar[Union[float, Tensor]] = ContextVar("query_factor", default=1.0)


class MappedMultiheadAttention(MultiheadAttention):
    """fairseq's attention with another mapping in place of softmax.

    fairseq does the projections, the masks, the decoding cache and the sharing of keys between beams, and returns
    the masked scores and the values (``before_softmax``). The rest is done here, in one path for training, teacher
    forcing and step-by-step decoding::

        scores = scale · q · k / √head_dim, masked by fairseq
        probabilities = mapping(scores)        (bsz, num_heads, tgt_len, src_len)
        output = out_proj(concat over heads of dropout(probabilities) · values)

    Where rows are long and nobody asks for the probabilities, MultiMax computes the same output without ever holding
    all of them (:mod:`..kernels.attention`). Instances are made from fairseq's by :meth:`adopt`.

    Attributes:
        mapping: module over the last dimension, from :func:`multimax_fairseq.mappings.build_mapping`.
        site: which attention of the model this is: ``"encoder"``, ``"decoder"`` or ``"cross"``.
        scale: the factor of the scores, from :func:`.scale.build_scale`, or None.
    """

    mapping: nn.Module
    site: str
    scale: Optional[nn.Module]

    @classmethod
    def adopt(
        cls, attention: MultiheadAttention, mapping: nn.Module, site: str, scale: Optional[nn.Module] = None
    ) -> "MappedMultiheadAttention":
        """Give fairseq's ``attention`` a mapping; returns the same object.

        Unlike a constructor, this keeps exactly the weights of the stock model, drawn in the same order, in every
        version of fairseq.

        Raises:
            TypeError: it is of a subclass, whose own way of attending would be lost.
        """
        if type(attention) not in (MultiheadAttention, cls):
            raise TypeError(
                f"only fairseq's MultiheadAttention itself can be given a mapping; {type(attention).__name__} "
                f"attends in its own way, which would be lost: leave {site} out of --attention-mapping-sites"
            )
        attention.__class__ = cls
        attention.mapping = mapping
        attention.site = site
        attention.scale = scale
        # Keeps forward() out of F.multi_head_attention_forward, where softmax is built in.
        attention._set_skip_embed_dim_check()
        return attention

    @property
    def scaling(self) -> Union[float, Tensor]:
        """What fairseq and :meth:`_attend_blockwise` multiply projected queries by."""
        scaling = self.__dict__["scaling"]
        return scaling if self.scale is None else scaling * _query_factor.get()

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Union[Tensor, Tuple[Tensor], None] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Attend; arguments and returns as fairseq's ``MultiheadAttention.forward``.

        Args:
            query: (tgt_len, bsz, embed_dim).
            key, value: (src_len, bsz, kdim), (src_len, bsz, vdim); None where they are cached.
            key_padding_mask: (bsz, src_len), true where a key is padding.
            attn_mask: (tgt_len, src_len), bool or to be added to the scores; −1e4 and less hides a key. In a tuple
                where activation checkpointing would copy it, and lose the mark ``CAUSAL``.
            before_softmax: return the masked scores and the values instead.

        Returns:
            The output, (tgt_len, bsz, embed_dim), and with ``need_weights`` the probabilities before dropout:
            fp32, (bsz, tgt_len, src_len) averaged over heads, or (num_heads, bsz, tgt_len, src_len) with
            ``need_head_weights``; else None.
        """
        if isinstance(attn_mask, tuple):
            (attn_mask,) = attn_mask
        wants_weights = need_weights or need_head_weights or before_softmax
        arguments = query, key, key_padding_mask, incremental_state, static_kv, attn_mask
        with nullcontext() if self.scale is None else self._scaled(*arguments):
            if not wants_weights and incremental_state is None and self._goes_blockwise(query, key, attn_mask):
                return self._attend_blockwise(query, key, value, key_padding_mask, attn_mask), None

            scores, values = super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                incremental_state=incremental_state,
                need_weights=False,
                static_kv=static_kv,
                attn_mask=None if attn_mask is None else additive_mask(attn_mask, query.dtype),
                before_softmax=True,
            )
        if before_softmax:
            return scores, values

        tgt_len, bsz = query.shape[:2]
        src_len = scores.size(-1)
        probabilities = self.mapping(scores.view(bsz, self.num_heads, tgt_len, src_len))
        output = self._weighted_sum(self.dropout_module(probabilities), values)
        output = self.out_proj(output.permute(2, 0, 1, 3).reshape(tgt_len, bsz, self.embed_dim))

        if not (need_weights or need_head_weights):
            return output, None
        weights = probabilities.float().transpose(0, 1)  # (num_heads, bsz, tgt_len, src_len)
        return output, weights if need_head_weights else weights.mean(dim=0)

    @contextmanager
    def _scaled(
        self,
        query: Tensor,
        key: Optional[Tensor],
        key_padding_mask: Optional[Tensor],
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]],
        static_kv: bool,
        attn_mask: Optional[Tensor],
    ) -> Iterator[None]:
        """While open, :attr:`scaling` includes the factor of ``scale`` for these arguments of :meth:`forward`."""

        def count_keys() -> Tensor:
            """(tgt_len or 1, bsz or 1)"""
            cache = {} if incremental_state is None else self._get_input_buffer(incremental_state)
            cached_keys = cache.get("prev_key")  # (kv_bsz, num_heads, length, head_dim)
            src_len = 0 if cached_keys is None else cached_keys.size(2)
            if not (static_kv and src_len):
                src_len += (query if self.self_attention else key).size(0)
            padding = self._append_prev_key_padding_mask(
                key_padding_mask, cache.get("prev_key_padding_mask"), query.size(1), src_len, static_kv
            )
            if padding is not None:  # cached once per sentence, for all hypotheses of a beam
                padding = padding.repeat_interleave(query.size(1) // len(padding), dim=0)
            always = int(self.bias_k is not None) + int(self.add_zero_attn)
            visible = visible_keys(src_len, padding, attn_mask, getattr(attn_mask, CAUSAL, False))
            return visible.to(query.device) + always

        factor = self.scale(count_keys)
        if factor.dim() > 1:  # (…, num_heads)
            factor = factor.repeat_interleave(self.head_dim, dim=-1)
        previous = _query_factor.set(factor)
        try:
            yield
        finally:
            _query_factor.reset(previous)

    def _goes_blockwise(self, query: Tensor, key: Optional[Tensor], attn_mask: Optional[Tensor]) -> bool:
        """Whether the path without the whole matrix of probabilities can be taken, and pays."""
        return (
            isinstance(self.mapping, MultiMax)
            and (query if self.self_attention else key).size(0) >= MIN_KEYS
            and self.bias_k is None
            and not self.add_zero_attn
            and not (attn_mask is not None and attn_mask.requires_grad)
            and not is_traced()
        )

    def _attend_blockwise(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor],
        attn_mask: Optional[Tensor],
    ) -> Tensor:
        """The output of :meth:`forward`, by :func:`..kernels.attention.multimax_attention`."""
        tgt_len, bsz = query.shape[:2]
        if self.self_attention:
            key = value = query
        elif self.encoder_decoder_attention:
            value = key
        by_head = (-1, bsz * self.num_heads, self.head_dim)
        queries = self.q_proj(query).mul_(self.scaling).view(by_head).transpose(0, 1)
        keys, values = (
            projection(tensor).view(by_head).transpose(0, 1)
            for projection, tensor in ((self.k_proj, key), (self.v_proj, value))
        )
        causal = getattr(attn_mask, CAUSAL, False)
        masks = Masks(
            causal=causal,
            keys=None if key_padding_mask is None else self._hidden_keys(key_padding_mask, queries.dtype),
            scores=None if causal or attn_mask is None else additive_mask(attn_mask, queries.dtype),
        )
        thresholds, gains = self.mapping.coefficients()
        drops = self.training or self.dropout_module.apply_during_inference
        dropout = self.dropout_module.p if drops else 0.0
        output = multimax_attention(queries, keys, values, thresholds, gains, masks, dropout)
        return self.out_proj(output.transpose(0, 1).reshape(tgt_len, bsz, self.embed_dim))

    def _hidden_keys(self, key_padding_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """(bsz, src_len) → (bsz · num_heads, 1, src_len), to be added to scores."""
        return additive_mask(key_padding_mask.bool(), dtype).repeat_interleave(self.num_heads, dim=0)[:, None]

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
            output = torch.bmm(probabilities.view(-1, tgt_len, src_len), values)
            return output.view(bsz, num_heads, tgt_len, -1)
        values = values.view(-1, num_heads, src_len, self.head_dim)
        by_sentence = probabilities.view(values.size(0), -1, num_heads, tgt_len, src_len)
        # einsum computes a beam in one product; matmul would copy the values for each hypothesis
        return torch.einsum("sbhij,shjd->sbhid", by_sentence, values).flatten(0, 1)
