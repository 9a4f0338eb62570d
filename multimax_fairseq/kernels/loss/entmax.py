"""Output projection and the loss of a sparse mapping together, in the chunks of :mod:`.chunks`.

With p the mapping's output, x the V logits of a token, t its target, x̄ their mean and H_α Tsallis' entropy, the
Fenchel-Young loss and its gradients are as follows. As p maximises the first line, only H_α depends on α::

    L = max_p ⟨p, x⟩ + H_α(p) − x_t = ⟨p, x − x_t⟩ + H_α(p)      H_α(p) = Σ_v (p_v − p_v^α) / (α (α − 1))
    loss = L + ε (x_t − x̄)
    ∂loss / ∂x_v = p_v − ε / V − (1 − ε) [v = t]                 ∂loss / ∂α = ∂H_α(p) / ∂α at this p

Sources: Blondel, Martins & Niculae 2020, *Learning with Fenchel-Young losses* (JMLR 21); Peters, Niculae & Martins
2019, *Sparse sequence-to-sequence models* (ACL); label smoothing, Peters & Martins 2021, *Smoothing and shrinking the
sparse seq2seq search space* (NAACL).
"""

from typing import Callable, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ..compiler import Kernel
from ..scores import compute_dtype, is_absent
from .chunks import RowsLoss, blocks_of_rows, check_options, chunked_loss


class EntmaxLosses(NamedTuple):
    """Sums over tokens, or a number for each; only the first has a gradient."""

    loss: Tensor  # with label smoothing
    plain_loss: Tensor  # without
    impossible: Tensor  # 1 where the target's probability is 0, else 0
    support: Tensor  # number of types whose probability is above 0


def chunked_entmax_loss(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    mapping: Callable[[Tensor], Tensor],
    alpha: Union[float, Tensor],
    bias: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    padding: Optional[int] = None,
    chunk_tokens: int = 0,
    reduce: bool = True,
) -> EntmaxLosses:
    """Fenchel-Young loss of ``mapping(features @ weight.T + bias)`` with ``targets``, in bounded memory.

    Args:
        features, weight, targets, bias, label_smoothing, chunk_tokens, reduce: as those of
            :func:`.cross_entropy.chunked_cross_entropy`.
        mapping: α-entmax for this ``alpha``: logits, (rows, V), fp32 at least, to probabilities. It is not
            differentiated.
        alpha: in (1, 2], a number or a tensor of one; 2 for sparsemax, 1.5 for 1.5-entmax.
        padding: the type that label smoothing leaves out.

    Returns:
        losses, () or (N,), of the dtype of ``features``, fp32 at least; differentiable once, in features, weight,
        bias and α (where it is a tensor). Error against float64, in fp32: below 2e-5, relative.

    Raises:
        ValueError: ``label_smoothing`` or ``chunk_tokens`` is out of its range.
    """
    check_options(label_smoothing, chunk_tokens)
    loss = _EntmaxLoss(mapping, alpha, label_smoothing, padding)
    return chunked_loss(loss, features, weight, targets, bias, chunk_tokens, reduce)


@Kernel
def entmax_loss_rows_(
    logits: Tensor, probabilities: Tensor, target_logits: Tensor, alpha: Tensor, smoothing: Tensor
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces the logits by their gradient, without the part that only the target has.

    Args:
        logits: (rows, V); becomes p − ε / V.
        probabilities: (rows, V), fp32 at least.
        target_logits: (rows, 1), of the dtype of ``probabilities``.
        alpha, smoothing: (1,) each; ε / V.

    Returns:
        L, Σ x, the support and ∂L/∂α, (rows, 1) each.
    """
    p, x = probabilities, logits.to(probabilities.dtype)
    absent = is_absent(x)
    # p^α − p = p · (exp u − 1): exact also where α is near 1. At p = 0, u is finite, so its products are 0.
    u = (alpha - 1) * p.clamp(min=torch.finfo(p.dtype).tiny).log()
    change = p * torch.expm1(u)
    scale = alpha * (alpha - 1)
    gap = (x - target_logits).masked_fill(absent, 0.0)
    loss = (p * gap - change / scale).sum(-1, keepdim=True)
    slope = (alpha * (change - u * (change + p)) + (alpha - 1) * change) / (scale * scale)
    total = x.masked_fill(absent, 0.0).sum(-1, keepdim=True)
    support = (p > 0).to(p.dtype).sum(-1, keepdim=True)
    logits.copy_((p - smoothing).masked_fill(absent, 0.0))
    return loss, total, support, slope.sum(-1, keepdim=True)


class _EntmaxLoss(RowsLoss):
    """Arguments as in :func:`chunked_entmax_loss`."""

    kinds, kernel = EntmaxLosses, entmax_loss_rows_

    def __init__(self, mapping, alpha: Union[float, Tensor], label_smoothing: float, padding: Optional[int]):
        self.mapping, self.alpha = mapping, alpha
        self.parameters = (alpha,) if isinstance(alpha, Tensor) else ()
        self.label_smoothing, self.padding = label_smoothing, padding

    def formula(self, logits: Tensor, targets: Tensor, *parameters: Tensor) -> Tuple[Tensor, ...]:
        (alpha,) = parameters or (self.alpha,)
        p, x = self.mapping(logits), logits.masked_fill(is_absent(logits), 0.0)
        positive, target_logits = p > 0, logits.gather(-1, targets)
        q = torch.where(positive, p, 1.0)  # whose part of the entropy is 0, as that of 0, but has derivatives
        entropy = -(q * torch.expm1((alpha - 1) * q.log())).sum(-1) / (alpha * (alpha - 1))
        plain_loss = (p * (x - target_logits)).sum(-1) + entropy
        words = torch.arange(x.size(-1), device=x.device) != (-1 if self.padding is None else self.padding)
        mean = torch.where(words, x, 0.0).sum(-1) / words.sum()
        loss = plain_loss + self.label_smoothing * (target_logits.squeeze(-1) - mean)
        impossible = p.gather(-1, targets).squeeze(-1) == 0
        return loss, plain_loss, impossible.to(p.dtype), positive.sum(-1).to(p.dtype)

    def compiled_(self, logits: Tensor, targets: Tensor) -> Tuple[Sequence[Tensor], Sequence[Tensor]]:
        dtype = compute_dtype(logits.dtype)
        smoothing = self.label_smoothing / (logits.size(1) - (self.padding is not None))
        alpha = torch.as_tensor(self.alpha, dtype=dtype, device=logits.device).reshape(1)
        rows = []
        for block, block_targets in blocks_of_rows(logits, targets):
            x = block.to(dtype)
            p, target_logits = self.mapping(x), x.gather(1, block_targets)
            padding_logits = 0.0 if self.padding is None else x[:, [self.padding]]
            loss, total, support, grad_alpha = entmax_loss_rows_(
                block, p, target_logits, alpha, torch.full_like(alpha, smoothing)
            )
            if self.padding is not None:
                block[:, self.padding] = p[:, self.padding].to(block.dtype)
            # The target's own is overwritten, as what is stored is rounded: 1 − ε taken from it would leave 0.
            target_p = p.gather(1, block_targets)
            share = smoothing if self.padding is None else smoothing * (block_targets != self.padding)
            block.scatter_(1, block_targets, (target_p - 1 + (self.label_smoothing - share)).to(block.dtype))
            smoothed = loss + self.label_smoothing * target_logits - smoothing * (total - padding_logits)
            rows.append((smoothed, loss, (target_p == 0).to(dtype), support, grad_alpha))
        *losses, grad_alpha = (torch.cat(kind).squeeze(1) for kind in zip(*rows))
        return losses, [grad_alpha.sum(dtype=torch.float64).view(p.shape) for p in self.parameters]
