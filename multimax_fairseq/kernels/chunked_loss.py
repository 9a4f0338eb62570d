"""Output projection and loss together, over chunks of tokens: the full logits never exist.

A chunk of logits is computed into a buffer. Its gradient replaces it there, and its part of the gradients of features
and weight is added to them; then the next chunk takes the buffer. All of this happens in the forward: the loss is one
number, so the backward only multiplies, and no logits are computed twice. A :class:`RowsLoss` computes the loss from
rows of logits: see :mod:`.chunked_cross_entropy` and :mod:`.chunked_entmax_loss`.
"""

from typing import Any, Callable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .scores import compute_dtype

# Logits that exist at a time: 2^26, 256 MiB in fp32. A chunk of N tokens reads and writes the gradient of the whole
# weight once, 2 V D numbers, for products of 6 V D N operations: 3 N operations a number. With 267,744 types, N is
# 250: 750 operations take 7.5 ns at a core's 100 GFLOP/s, and a number of 4 bytes takes 0.4 ns at 10 GB/s.
LOGITS_AT_A_TIME = 2**26
TOKENS_MULTIPLE = 32  # chunk sizes are multiples of this, which suits matrix products

# Logits in one call of a compiled kernel, which makes a copy of them: for each CPU thread as many as its cache holds
# (2 MiB in fp32), on a GPU enough to occupy it (64 MiB).
CPU_BLOCK, GPU_BLOCK = 2**19, 2**24

# Inductor copies a GPU kernel's input that does not start at a multiple of 16 bytes; before torch 2.8, what the
# kernel writes there is lost. This many rows, of any width and dtype, are a multiple of 16 bytes.
ALIGNED_ROWS = 8

# In fp16 the gradient of a logit, some 1 / V, would be below the smallest number (6e-8), and a sum over tokens could
# be above the largest (65,504). So the gradient is stored times 2^8, and multiplied with features times 2^-4.
FP16_GRADIENT_SCALE, FP16_FEATURE_SCALE = 2.0**8, 2.0**-4


def default_chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits are computed at a time: ``LOGITS_AT_A_TIME`` / V, rounded up to a multiple of 32.

    This is 256 tokens for 267,744 types (274 MB in fp32), and 6,720 for 10,000 types.
    """
    tokens = -(-LOGITS_AT_A_TIME // vocabulary)
    return -(-tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE


def check_options(label_smoothing: float, chunk_tokens: int) -> None:
    """Raises ValueError where one of the two is out of its range."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"--label-smoothing takes a number in [0, 1); got {label_smoothing}")
    if chunk_tokens < 0:
        raise ValueError(f"--chunk-tokens takes a number of tokens, or 0 for an automatic one; got {chunk_tokens}")


class RowsLoss:
    """A loss, computed from rows of logits.

    Attributes:
        kinds: a NamedTuple of the numbers for each token; the first is the loss that is differentiated.
        parameters: tensors other than the logits that get a gradient.
    """

    kinds: Callable[..., Any]
    parameters: Tuple[Tensor, ...] = ()

    def losses(self, logits: Tensor, targets: Tensor) -> Tuple[Tensor, ...]:
        """A number of each kind for each row, (rows, 1), from logits, (rows, V), and targets, (rows, 1).

        The logits may be written to.
        """
        raise NotImplementedError

    def losses_and_gradients_(self, logits: Tensor, targets: Tensor) -> Tuple[Tuple[Tensor, ...], List[Tensor]]:
        """The same, and the gradients of the summed loss with respect to the parameters, in fp32 at least.

        Its gradients with respect to the logits, times :func:`gradient_scale`, replace the logits.
        """
        raise NotImplementedError


def chunked_loss(
    loss: RowsLoss,
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Optional[Tensor],
    chunk_tokens: int,
    reduce: bool,
) -> Any:
    """The loss of ``features @ weight.T + bias`` and ``targets``, in bounded memory.

    Products are computed in the dtype of ``features``, under autocast in autocast's. Args and Returns are those of
    :func:`.chunked_cross_entropy.chunked_cross_entropy`, with ``loss.kinds`` of sums or of (N,).
    """
    chunk_tokens = chunk_tokens or default_chunk_tokens(len(weight))
    dtype = product_dtype(features)
    with torch.autocast(features.device.type, enabled=False):
        if not reduce:
            with torch.no_grad():
                return loss.kinds(*_Chunks(loss, features, weight, bias, targets, chunk_tokens, dtype).losses())
        tensors = (features, weight, bias, *loss.parameters)
        differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return loss.kinds(*_ChunkedLoss.apply(loss, targets, chunk_tokens, dtype, differentiable, *tensors))


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that products with ``tensor`` are computed in: autocast's where it is on, else its own."""
    device = tensor.device.type
    if tensor.dtype == torch.float64:  # which autocast leaves alone
        return tensor.dtype
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
    if device == "cpu":  # before torch 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else tensor.dtype
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else tensor.dtype


def gradient_scale(dtype: torch.dtype) -> float:
    """The factor with which gradients of logits of a dtype are stored."""
    return FP16_GRADIENT_SCALE if dtype == torch.float16 else 1.0


def blocks_of_rows(logits: Tensor, *others: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Splits logits, (n, V), and others, (n, …), into rows for one call of a kernel, which may write to them."""
    rows = block_rows(logits.device.type, logits.size(1))
    return zip(*(tensor.split(rows) for tensor in (logits, *others)))


def block_rows(device: str, width: int) -> int:
    """Rows for one call of a compiled kernel, at least 2; on a CPU, ``CPU_BLOCK`` logits for each thread."""
    if device == "cpu":
        return max(CPU_BLOCK // width * torch.get_num_threads(), torch.get_num_threads(), 2)
    return max(GPU_BLOCK // width // ALIGNED_ROWS, 1) * ALIGNED_ROWS


class _Chunks:
    """The losses of all tokens, and gradients of their sum, chunk by chunk; arguments as in :func:`chunked_loss`."""

    def __init__(self, loss, features, weight, bias, targets, chunk_tokens, dtype):
        self.loss = loss
        self.features, self.weight, self.bias = features.to(dtype), weight.to(dtype), bias
        self.targets = targets.unsqueeze(-1)  # (N, 1)
        self.chunk_tokens = min(chunk_tokens, len(features))
        self.dtype = compute_dtype(dtype)

    def losses(self) -> List[Tensor]:
        """(N,) each."""
        return self._joined([self.loss.losses(logits, self.targets[tokens]) for tokens, logits in self._logits()])

    def losses_and_gradients(self, wanted: List[bool]) -> Tuple[List[Tensor], List[Optional[Tensor]]]:
        """Losses, (N,) each, and gradients of the sum of the first, in fp32 at least: of features, weight and bias
        where ``wanted``, and of the loss's parameters."""
        features, weight, dtype = self.features, self.weight, self.dtype
        grad_features = torch.zeros_like(features, dtype=dtype) if wanted[0] else None
        # The first product, if there is one, overwrites it: zeros would cost a pass.
        make = torch.empty_like if len(features) else torch.zeros_like
        grad_weight = make(weight, dtype=dtype) if wanted[1] else None
        grad_bias = torch.zeros_like(self.bias, dtype=dtype) if wanted[2] else None
        grad_parameters = [torch.zeros_like(p, dtype=torch.float64) for p in self.loss.parameters]
        losses = []
        for tokens, grad in self._logits():
            losses_of_chunk, parts = self.loss.losses_and_gradients_(grad, self.targets[tokens])
            losses.append(losses_of_chunk)
            for grad_parameter, part in zip(grad_parameters, parts):
                grad_parameter += part
            if grad_features is not None:
                _product(grad, weight, grad_features[tokens], True)
            if grad_weight is not None:
                _product(grad.t(), features[tokens], grad_weight, tokens.start == 0)
            if grad_bias is not None:
                grad_bias.add_(grad.sum(0, dtype=dtype), alpha=1 / gradient_scale(grad.dtype))
        return self._joined(losses), [grad_features, grad_weight, grad_bias, *(g.to(dtype) for g in grad_parameters)]

    def _logits(self):
        """For each chunk, its tokens (a slice) and logits (n, V), in a buffer that the next chunk takes."""
        if not len(self.features):
            return
        buffer = self.features.new_empty(self.chunk_tokens, len(self.weight))
        for start in range(0, len(self.features), self.chunk_tokens):
            tokens = slice(start, min(start + self.chunk_tokens, len(self.features)))
            logits = buffer[: tokens.stop - tokens.start]
            torch.mm(self.features[tokens], self.weight.t(), out=logits)
            if self.bias is not None:
                logits += self.bias
            yield tokens, logits

    def _joined(self, losses) -> List[Tensor]:
        if not losses:
            return list(self.features.new_zeros(len(self.loss.kinds._fields), 0, dtype=self.dtype))
        return [torch.cat(kind).squeeze(1) for kind in zip(*losses)]


def _product(left: Tensor, right: Tensor, result: Tensor, first: bool) -> None:
    """Writes ``left @ right``, without the fp16 scales, to ``result``; adds it if it is not the ``first``."""
    if result.dtype == right.dtype:
        if first:
            torch.mm(left, right, out=result)
        else:
            result.addmm_(left, right)
        return
    scale = FP16_FEATURE_SCALE if right.dtype == torch.float16 else 1.0
    product = torch.mm(left, right * scale)
    factor = 1 / (scale * gradient_scale(right.dtype))
    if first:
        result.copy_(product).mul_(factor)
    else:
        result.add_(product, alpha=factor)


class _ChunkedLoss(Function):
    """Sums of losses over tokens; see :func:`chunked_loss`."""

    @staticmethod
    def forward(
        ctx, loss, targets, chunk_tokens, dtype, differentiable, features, weight, bias, *parameters
    ) -> Tuple[Tensor, ...]:
        chunks = _Chunks(loss, features, weight, bias, targets, chunk_tokens, dtype)
        ctx.gradients = None
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (features, weight, bias, *parameters)]
        if differentiable:
            losses, ctx.gradients = chunks.losses_and_gradients(list(ctx.needs_input_grad[5:]))
        else:
            losses = chunks.losses()
        # Sums of many tokens: float64 costs nothing here.
        sums = tuple(kind.sum(dtype=torch.float64).to(kind.dtype) for kind in losses)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a chunked loss are gone after one backward")
        # Not kept here: a tensor that nobody else holds becomes the parameter's gradient without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss != 1:  # a loss scale, say; a pass over the weight's gradient takes time
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        results = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes)]
        return (None, None, None, None, None, *results)
