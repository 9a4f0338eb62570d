"""Output projection, output mapping and cross-entropy together, over chunks of tokens: the full logits never exist.

A chunk of logits is computed into a buffer, its gradient takes its place there, and what that adds to the gradients
of features and weight is added; then the buffer is free for the next chunk. All of it happens in the forward: the
loss is one number, so the backward has only to multiply, and no logits are computed twice. With p = softmax(σ(x)),
x the V logits of a token of target t, and ε_i = ε / (V − 1) for a label smoothing of ε, as fairseq has it::

    loss = − (1 − ε − ε_i) log p_t − ε_i Σ_v log p_v = log Σ_v exp σ(x_v) − (1 − ε − ε_i) σ(x_t) − ε_i Σ_v σ(x_v)
    ∂loss / ∂σ(x_v) = p_v − ε_i − (1 − ε − ε_i) [v = t]
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .compiler import Kernel, kernel
from .rows import modulate_rows, modulate_rows_backward, present_sigma, sigma_backward
from .scores import compute_dtype, is_absent

# Logits that exist at a time: 2^26, 256 MiB in fp32. A chunk of N tokens reads and writes the gradient of the whole
# weight once, 2 V D numbers, for products of 6 V D N operations: 3 N operations a number. At the 250 tokens that this
# leaves of 267,744 types that is 750, some 75 ms of a core's 100 GFLOP/s for the 8 ms that 80 MB take at 10 GB/s.
LOGITS_AT_A_TIME = 2**26
TOKENS_MULTIPLE = 32  # chunks are of so many tokens, or a multiple: what matrix products like

# Logits in one call of a compiled kernel, which has a copy of its own of them: of each thread as many as its cache
# holds (2 MiB in fp32), on a GPU enough to occupy it (64 MiB).
CPU_BLOCK, GPU_BLOCK = 2**19, 2**24

# In fp16 the gradient of a logit, some 1 / V, would be below the smallest number (6e-8), and a sum over tokens could
# be above the largest (65,504): the first is held times 2^8, and multiplied with features times 2^-4.
FP16_GRADIENT_SCALE, FP16_FEATURE_SCALE = 2.0**8, 2.0**-4


def default_chunk_tokens(vocabulary: int) -> int:
    """The number of tokens whose logits are computed at a time.

    ``LOGITS_AT_A_TIME`` / V, rounded up to a multiple of 32: 256 tokens of 267,744 types (274 MB in fp32), 6,720 of
    10,000 types.
    """
    tokens = -(-LOGITS_AT_A_TIME // vocabulary)
    return -(-tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE


class TokenLosses(NamedTuple):
    """Sums over tokens, or a number for each, in nat."""

    loss: Tensor  # with label smoothing
    nll_loss: Tensor  # − log p_t; no gradient


def chunked_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Optional[Tensor] = None,
    thresholds: Optional[Tensor] = None,
    gains: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    chunk_tokens: int = 0,
    reduce: bool = True,
) -> TokenLosses:
    """Cross-entropy of ``softmax(σ(features @ weight.T + bias))`` with ``targets``, in bounded memory.

    Beside weight, features and their gradients it needs the logits of one chunk; in fp16 and bf16 the gradients are
    accumulated in fp32.

    Args:
        features: (N, D), fp16, bf16, fp32 or fp64.
        weight: (V, D), of the dtype of ``features``.
        targets: (N,), int64, each in [0, V).
        bias: (V,) or None.
        thresholds, gains: (order, 2), as in :func:`..mappings.multimax.modulate`; None for softmax.
        label_smoothing: ε, in [0, 1).
        chunk_tokens: tokens whose logits are computed at a time; 0: :func:`default_chunk_tokens`.
        reduce: whether to return sums, which have a gradient, or a number for each token, which have none.

    Returns:
        losses, () or (N,), of the dtype of ``features``, fp32 at least. Gradients of features, weight, bias,
        thresholds and gains; none of a gradient. Error of these against float64, in fp32: below 1e-5 of the largest.

    Raises:
        ValueError: ``label_smoothing`` or ``chunk_tokens`` is out of its range.
    """
    check_options(label_smoothing, chunk_tokens)
    chunk_tokens = chunk_tokens or default_chunk_tokens(len(weight))
    if thresholds is None:  # softmax is MultiMax of order 0
        thresholds = gains = features.new_zeros(0, 2, dtype=compute_dtype(features.dtype))
    tensors = (features, weight, bias, thresholds, gains)
    if not reduce:
        chunks = _Chunks(*(tensor if tensor is None else tensor.detach() for tensor in tensors), targets,
                         label_smoothing, chunk_tokens)  # fmt: skip
        return chunks.losses()
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return TokenLosses(*_ChunkedCrossEntropy.apply(*tensors, targets, label_smoothing, chunk_tokens, differentiable))


def check_options(label_smoothing: float, chunk_tokens: int) -> None:
    """Raises ValueError where one of the two is out of its range."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"--label-smoothing takes a number in [0, 1); got {label_smoothing}")
    if chunk_tokens < 0:
        raise ValueError(f"--chunk-tokens takes a number of tokens, or 0 for an automatic one; got {chunk_tokens}")


@kernel
def log_total_rows(logits: Tensor, thresholds: Tensor, gains: Tensor) -> Tuple[Tensor, Tensor]:
    """log Σ exp σ and Σ σ, (rows, 1) each, fp32 at least."""
    modulated = present_sigma(logits, thresholds, gains)
    return torch.logsumexp(modulated, -1, keepdim=True), modulated.sum(-1, keepdim=True)


@kernel
def cross_entropy_rows_(
    logits: Tensor, smoothing: Tensor, thresholds: Tensor, gains: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """Puts the gradient of the logits in their place, all but the part that only the target has.

    Args:
        logits: (rows, V); becomes (p − ε_i) · σ'(x), in fp16 times ``FP16_GRADIENT_SCALE``.
        smoothing: (1,), ε_i.

    Returns:
        log Σ exp σ and Σ σ, (rows, 1) each, and ∂L/∂(thresholds, gains), (2, order, 2).
    """
    modulated = present_sigma(logits, thresholds, gains)
    peak = modulated.amax(-1, keepdim=True)
    log_total = peak + (modulated - peak).exp().sum(-1, keepdim=True).log()
    # Not the exponentials of before, divided: the compiler would keep them, in a tensor of the size of the logits.
    upstream = ((modulated - log_total).exp() - smoothing).masked_fill(is_absent(logits), 0.0)
    if len(gains):
        grad, grad_parameters = sigma_backward(logits.to(log_total.dtype), upstream, thresholds, gains)
    else:
        grad, grad_parameters = upstream, upstream.new_zeros(2, 0, 2)
    logits.copy_(grad * _gradient_scale(logits.dtype))
    return log_total, modulated.sum(-1, keepdim=True), grad_parameters


def _gradient_scale(dtype: torch.dtype) -> float:
    return FP16_GRADIENT_SCALE if dtype == torch.float16 else 1.0


class _Chunks:
    """The losses of all tokens, and gradients of their sum, chunk by chunk; arguments as in the function above."""

    def __init__(self, features, weight, bias, thresholds, gains, targets, label_smoothing, chunk_tokens):
        self.features, self.weight, self.bias = features, weight, bias
        self.thresholds, self.gains = thresholds, gains
        self.targets = targets.unsqueeze(-1)  # (N, 1)
        self.chunk_tokens = min(chunk_tokens, len(features))
        self.dtype = compute_dtype(features.dtype)
        self.smoothing = label_smoothing / max(len(weight) - 1, 1)
        self.confidence = 1 - label_smoothing - self.smoothing

    def losses(self) -> TokenLosses:
        """(N,) each."""
        losses = [
            self._losses(target_logits, *log_totals)
            for _, logits, target_logits in self._logits()
            for log_totals in [_rows(log_total_rows, logits, self.thresholds, self.gains)]
        ]
        return self._joined(losses)

    def losses_and_gradients(self, wanted: List[bool]) -> Tuple[TokenLosses, List[Optional[Tensor]]]:
        """Losses, (N,) each, and of their sum the gradients of those of features, weight, bias, thresholds and gains
        that are ``wanted``, in fp32 at least."""
        features, weight, dtype = self.features, self.weight, self.dtype
        grad_features = torch.zeros_like(features, dtype=dtype) if wanted[0] else None
        # Zeros are written by the first product, not in a pass of their own, where there is one.
        make = torch.empty_like if len(features) else torch.zeros_like
        grad_weight = make(weight, dtype=dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(self.bias, dtype=dtype) if wanted[2] else None
        grad_parameters = torch.zeros(2, len(self.gains), 2, dtype=torch.float64, device=features.device)
        smoothing = torch.full((1,), self.smoothing, dtype=dtype, device=features.device)
        losses = []
        for tokens, logits, target_logits in self._logits():
            *log_totals, dense = _rows(cross_entropy_rows_, logits, smoothing, self.thresholds, self.gains)
            losses.append(self._losses(target_logits, *log_totals))
            grad_target, sparse = self._target_part(target_logits)
            grad = logits.scatter_add_(1, self.targets[tokens], grad_target)
            grad_parameters += dense + sparse
            if grad_features is not None:
                _product(grad, weight, grad_features[tokens], True)
            if grad_weight is not None:
                _product(grad.t(), features[tokens], grad_weight, tokens.start == 0)
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0, dtype=dtype), alpha=1 / _gradient_scale(grad.dtype))
        return self._joined(losses), [grad_features, grad_weight, grad_bias, *grad_parameters.to(dtype)]

    def _logits(self):
        """Of each chunk its tokens (a slice), logits (n, V), in memory used again, and targets' logits (n, 1)."""
        if not len(self.features):
            return
        buffer = self.features.new_empty(self.chunk_tokens, len(self.weight))
        for start in range(0, len(self.features), self.chunk_tokens):
            tokens = slice(start, min(start + self.chunk_tokens, len(self.features)))
            logits = buffer[: tokens.stop - tokens.start]
            torch.mm(self.features[tokens], self.weight.t(), out=logits)
            if self.bias is not None:
                logits += self.bias
            yield tokens, logits, logits.gather(1, self.targets[tokens])

    def _losses(self, target_logits: Tensor, log_total: Tensor, total: Tensor) -> Tuple[Tensor, Tensor]:
        """loss and nll_loss, (n,) each."""
        target_scores = target_logits.to(self.dtype)
        if len(self.gains):
            target_scores = modulate_rows(target_scores, self.thresholds, self.gains)
        losses = log_total - self.confidence * target_scores
        if self.smoothing:
            losses = losses - self.smoothing * total
        return losses.squeeze(1), (log_total - target_scores).squeeze(1)

    def _target_part(self, target_logits: Tensor) -> Tuple[Tensor, Tensor]:
        """What only targets add to the gradients of the logits, (n, 1), and of the parameters, (2, order, 2)."""
        grad = torch.full_like(target_logits, -self.confidence, dtype=self.dtype)
        grad_parameters = grad.new_zeros(2, 0, 2)
        if len(self.gains):
            grad, grad_parameters = modulate_rows_backward(
                target_logits.to(self.dtype), grad, self.thresholds, self.gains
            )
        return (grad * _gradient_scale(target_logits.dtype)).to(target_logits.dtype), grad_parameters

    def _joined(self, losses) -> TokenLosses:
        if not losses:
            return TokenLosses(*self.features.new_zeros(2, 0, dtype=self.dtype))
        return TokenLosses(*(torch.cat(kind) for kind in zip(*losses)))


def _rows(function: Kernel, logits: Tensor, *arguments: Tensor) -> List[Tensor]:
    """A kernel's results for all rows: (rows, 1) each, and of all rows together, ∂L/∂(thresholds, gains)."""
    if function.compiles(logits):
        results = [function(block, *arguments) for block in logits.split(_compiled_rows(logits))]
    else:
        results = function.over_rows([logits], arguments)
    return [torch.cat(result) if result[0].dim() == 2 else sum(result) for result in zip(*results)]


def _compiled_rows(logits: Tensor) -> int:
    """Rows for one call of a compiled kernel, at least 2: on a CPU as many for each of its threads."""
    if logits.device.type != "cpu":
        return max(GPU_BLOCK // logits.size(1), 2)
    return max(CPU_BLOCK // logits.size(1) * torch.get_num_threads(), torch.get_num_threads(), 2)


def _product(left: Tensor, right: Tensor, result: Tensor, first: bool) -> None:
    """``left @ right`` into ``result``, or added to it where it is not the ``first``; the fp16 scales taken out."""
    if result.dtype == right.dtype:
        if first:
            torch.mm(left, right, out=result)
        else:
            result.addmm_(left, right)
        return
    scale = FP16_FEATURE_SCALE if right.dtype == torch.float16 else 1.0
    product = torch.mm(left, right * scale)
    factor = 1 / (scale * _gradient_scale(right.dtype))
    if first:
        result.copy_(product).mul_(factor)
    else:
        result.add_(product, alpha=factor)


class _ChunkedCrossEntropy(Function):
    """Sums of losses over tokens; see :func:`chunked_cross_entropy`."""

    @staticmethod
    def forward(
        ctx, features, weight, bias, thresholds, gains, targets, label_smoothing, chunk_tokens, differentiable
    ) -> Tuple[Tensor, Tensor]:
        tensors = (features, weight, bias, thresholds, gains)
        chunks = _Chunks(*tensors, targets, label_smoothing, chunk_tokens)
        ctx.gradients, ctx.dtypes = None, [None if tensor is None else tensor.dtype for tensor in tensors]
        if differentiable:
            losses, ctx.gradients = chunks.losses_and_gradients(list(ctx.needs_input_grad[:5]))
        else:
            losses = chunks.losses()
        # Sums of many tokens: float64 costs nothing here.
        loss, nll_loss = (kind.sum(dtype=torch.float64).to(kind.dtype) for kind in losses)
        ctx.mark_non_differentiable(nll_loss)
        return loss, nll_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, _grad_nll_loss: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of chunked_cross_entropy are gone after one backward")
        # Handed on, not kept: what nobody else holds becomes the parameter's gradient without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss != 1:  # a loss scale, say; a pass over the gradient of the weight takes its time
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        results = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes)]
        return (*results, None, None, None, None)
