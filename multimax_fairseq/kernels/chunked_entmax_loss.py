"""Output projection and the loss of a sparse mapping together, in the chunks of :mod:`.chunked_loss`.

With p the mapping's output, x the V logits of a token, t its target, x̄ their mean and H_α Tsallis' entropy, the
Fenchel-Young loss and its gradients are as follows. As p maximises the first line, only H_α depends on α::

    L = max_p ⟨p, x⟩ + H_α(p) − x_t = ⟨p, x − x_t⟩ + H_α(p)      H_α(p) = Σ_v (p_v − p_v^α) / (α (α − 1))
    loss = L + ε (x_t − x̄)
    ∂loss / ∂x_v = p_v − ε / V − (1 − ε) [v = t]                 ∂loss / ∂α = ∂H_α(p) / ∂α at this p

Sources: Blondel, Martins & Niculae 2020, *Learning with Fenchel-Young losses* (JMLR 21); Peters, Niculae & Martins
2019, *Sparse sequence-to-sequence models* (ACL); label smoothing, Peters & Martins 2021, *Smoothing and shrinking the
sparse seq2seq search space* (NAACL).
"""

from typing import Callable, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from .chunked_loss import RowsLoss, blocks_of_rows, check_options, chunked_loss, gradient_scale
from .compiler import kernel
from .scores import compute_dtype, is_absent


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
            :func:`.chunked_cross_entropy.chunked_cross_entropy`.
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


@kernel
def entmax_loss_rows_(
    logits: Tensor, probabilities: Tensor, target_logits: Tensor, alpha: Tensor, smoothing: Tensor
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces the logits by their gradient, without the part that only the target has.

    Args:
        logits: (rows, V); becomes p − ε / V, times :func:`.chunked_loss.gradient_scale`.
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
    logits.copy_((p - smoothing).masked_fill(absent, 0.0) * gradient_scale(logits.dtype))
    return loss, total, support, slope.sum(-1, keepdim=True)


class _EntmaxLoss(RowsLoss):
    """Arguments as in :func:`chunked_entmax_loss`."""

    kinds = EntmaxLosses

    def __init__(self, mapping, alpha: Union[float, Tensor], label_smoothing: float, padding: Optional[int]):
        self.mapping, self.alpha = mapping, alpha
        self.parameters = (alpha,) if isinstance(alpha, Tensor) else ()
        self.label_smoothing, self.padding = label_smoothing, padding

    def losses(self, logits: Tensor, targets: Tensor) -> Tuple[Tensor, ...]:
        return self.losses_and_gradients_(logits, targets)[0]

    def losses_and_gradients_(self, logits: Tensor, targets: Tensor) -> Tuple[Tuple[Tensor, ...], List[Tensor]]:
        dtype, scale = compute_dtype(logits.dtype), gradient_scale(logits.dtype)
        smoothing = self.label_smoothing / (logits.size(1) - (self.padding is not None))
        alpha = torch.as_tensor(self.alpha, dtype=dtype, device=logits.device).reshape(1)
        numbers = alpha, torch.full_like(alpha, smoothing)
        target_logits = logits.gather(1, targets).to(dtype)
        rows = []
        for block, block_targets, block_target_logits in blocks_of_rows(logits, targets, target_logits):
            probabilities = self.mapping(block.to(dtype))
            padding_logits = 0.0 if self.padding is None else block[:, [self.padding]].to(dtype)
            loss, total, support, grad_alpha = entmax_loss_rows_(block, probabilities, block_target_logits, *numbers)
            if self.padding is not None:
                block[:, self.padding] = (probabilities[:, self.padding] * scale).to(block.dtype)
            impossible = (probabilities.gather(1, block_targets) == 0).to(dtype)
            smoothed = loss + self.label_smoothing * block_target_logits - smoothing * (total - padding_logits)
            rows.append((smoothed, loss, impossible, support, grad_alpha))
        *losses, grad_alpha = (torch.cat(kind) for kind in zip(*rows))
        logits.scatter_add_(1, targets, logits.new_full(targets.shape, -(1 - self.label_smoothing) * scale))
        return tuple(losses), [grad_alpha.sum(dtype=torch.float64).view(p.shape) for p in self.parameters]
