"""Output projection and loss together, over chunks of tokens: the full logits never exist.

A chunk of logits is computed into a buffer. Its gradient replaces it there, and its part of the gradients of features
and weight is added to them; then the next chunk takes the buffer. All of this happens in the forward: the loss is one
number, so the backward only multiplies, and no logits are computed twice. A :class:`RowsLoss` computes the loss from
rows of logits. :func:`whole_losses` is what all of this computes, in two lines: it serves where PyTorch's own
operators are needed (tracing, ``torch.func``, second derivatives).

Precision. Losses, and gradients before they are rounded, are fp32 at least. Products of half precision are fp32 on a
GPU. On a CPU those of fp16 are computed in fp32, which is also faster, and bf16's are rounded as PyTorch's are.
"""

from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..backend import autocast_dtype, gradients_of, is_plain, no_autocast
from ..compiler import Kernel
from ..scores import compute_dtype

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

# Numbers of a product that is computed before it is added to a sum of another dtype: 32 MiB in fp32.
PRODUCT_AT_A_TIME = 2**23

# The largest gradient of a chunk in fp16: sums of their products are fp32, so only they themselves have to fit.
FP16_LARGEST_GRADIENT = 2.0**15


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
        kernel: what :meth:`compiled_` runs.
    """

    kinds: Callable[..., Any]
    parameters: Tuple[Tensor, ...] = ()
    kernel: Kernel

    def formula(self, logits: Tensor, targets: Tensor, *parameters: Tensor) -> Sequence[Tensor]:
        """A number of each kind for each row, (rows,), from logits, (rows, V), fp32 at least, and targets, (rows, 1):
        what is computed, in operators that can be differentiated any number of times."""
        raise NotImplementedError

    def compiled_(self, logits: Tensor, targets: Tensor) -> Tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The same, and the gradients of the summed loss with respect to the parameters.

        Its gradients with respect to the logits replace the logits, which may be half precision.
        """
        raise NotImplementedError


def whole_losses(loss: RowsLoss, dtype: torch.dtype, targets: Tensor, features, weight, bias, *parameters) -> Any:
    """The readable form: numbers of each kind, (N,), by way of all logits, from products in ``dtype``."""
    logits = F.linear(features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return loss.formula(logits.to(compute_dtype(dtype)), targets.unsqueeze(-1), *parameters)


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
    :func:`.cross_entropy.chunked_cross_entropy`, with ``loss.kinds`` of sums or of (N,).
    """
    tensors = (features, weight, bias, *loss.parameters)
    differentiable = reduce and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    dtype = autocast_dtype(features) or features.dtype
    if dtype == torch.float16 and not has_wide_products(features):
        dtype = torch.float32
    problem = loss, dtype, targets
    with no_autocast(features), torch.set_grad_enabled(differentiable):
        if not is_plain(targets, *(tensor for tensor in tensors if tensor is not None)):
            numbers = whole_losses(*problem, *tensors)
            numbers = numbers[0], *(kind.detach() for kind in numbers[1:])
            return loss.kinds(*(_sums(numbers) if reduce else numbers))
        chunk_tokens = chunk_tokens or default_chunk_tokens(len(weight))
        if differentiable:
            return loss.kinds(*_ChunkedLoss.apply(problem, chunk_tokens, *tensors))
        numbers, _ = _over_chunks(*problem, chunk_tokens, None, *tensors[:3])
        return loss.kinds(*(_sums(numbers) if reduce else numbers))


def has_wide_products(tensor: Tensor) -> bool:
    """Whether PyTorch can give products of half-precision matrices on this device in fp32: on a GPU, from 2.8 on."""
    return tensor.device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads()


def wide_product(left: Tensor, right: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """``left @ right`` in fp32, of half-precision matrices."""
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def blocks_of_rows(logits: Tensor, *others: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Splits logits, (n, V), and others, (n, …), into rows for one call of a kernel, which may write to them."""
    rows = block_rows(logits.device.type, logits.size(1))
    return zip(*(tensor.split(rows) for tensor in (logits, *others)))


def block_rows(device: str, width: int) -> int:
    """Rows for one call of a compiled kernel, at least 2; on a CPU, ``CPU_BLOCK`` logits for each thread."""
    if device == "cpu":
        return max(CPU_BLOCK // width * torch.get_num_threads(), torch.get_num_threads(), 2)
    return max(GPU_BLOCK // width // ALIGNED_ROWS, 1) * ALIGNED_ROWS


class _ChunkedLoss(Function):
    """Sums of losses over tokens; see :func:`chunked_loss`."""

    @staticmethod
    def forward(ctx, problem: Tuple, chunk_tokens: int, *tensors: Optional[Tensor]) -> Tuple[Tensor, ...]:
        ctx.problem, ctx.chunk_tokens = problem, chunk_tokens
        ctx.save_for_backward(*tensors)
        numbers, ctx.gradients = _over_chunks(*problem, chunk_tokens, ctx.needs_input_grad[2:], *tensors[:3])
        sums = _sums(numbers)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        needed = ctx.needs_input_grad[2:]
        # Not kept here: a tensor that nobody else holds becomes the parameter's gradient without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(grad_loss):

            def loss(*tensors: Optional[Tensor]) -> Tensor:
                return _sums(whole_losses(*ctx.problem, *tensors))[0]

            return None, None, *gradients_of(loss, tensors, needed, grad_loss)
        if gradients is None:  # a second backward
            _, gradients = _over_chunks(*ctx.problem, ctx.chunk_tokens, needed, *tensors[:3])
        if grad_loss != 1:  # a loss scale, say; a pass over the weight's gradient takes time
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_loss)
        return (None, None, *(g if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, tensors)))


def _over_chunks(
    loss: RowsLoss,
    dtype: torch.dtype,
    targets: Tensor,
    chunk_tokens: int,
    wanted: Optional[Sequence[bool]],
    features: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
) -> Tuple[List[Tensor], List[Optional[Tensor]]]:
    """Numbers of each kind, (N,), and gradients of the sum of the first, in fp32 at least: of features, weight and
    bias where ``wanted``, and of the loss's parameters."""
    features, weight, targets = features.to(dtype), weight.to(dtype), targets.unsqueeze(-1)
    bias = None if bias is None else bias.to(dtype)
    exact, is_wide = compute_dtype(dtype), dtype != compute_dtype(dtype) and has_wide_products(features)
    # The first product overwrites them: zeros would cost a pass.
    grads = [
        torch.empty_like(tensor, dtype=exact) if is_wanted else None
        for tensor, is_wanted in zip((features, weight, bias), wanted or (False,) * 3)
    ]
    grads_of_parameters = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in loss.parameters]
    buffer = features.new_empty(min(chunk_tokens, len(features)), len(weight), dtype=exact if is_wide else dtype)
    numbers = []
    for start in range(0, max(len(features), 1), chunk_tokens):  # no tokens are one chunk, too
        tokens = slice(start, start + chunk_tokens)
        inputs, grad = features[tokens], buffer[: len(features) - start]
        if bias is not None and not is_wide:  # rounded once
            torch.addmm(bias, inputs, weight.t(), out=grad)
        else:
            (wide_product if is_wide else torch.mm)(inputs, weight.t(), out=grad)
            if bias is not None:
                grad += bias
        numbers_of_chunk, parts = _losses_and_gradients_(loss, grad, targets[tokens], wanted is not None)
        numbers.append(numbers_of_chunk)
        for grad_parameter, part in zip(grads_of_parameters, parts):
            grad_parameter += part
        if grads[2] is not None:
            total = grad.sum(0, dtype=exact)
            grads[2] = total if start == 0 else grads[2].add_(total)
        if wanted is not None:
            half, scale = _rounded(grad, dtype)
            if grads[0] is not None:
                _add_product_(grads[0][tokens], half, weight, True, scale)
            if grads[1] is not None:  # a product for each chunk, rounded once in all
                _add_product_(grads[1], half.t(), inputs, start == 0, scale, len(features) > chunk_tokens)
    numbers = [torch.cat(kind) for kind in zip(*numbers)]
    return numbers, [*grads, *(gradient.to(exact) for gradient in grads_of_parameters)]


def _losses_and_gradients_(
    loss: RowsLoss, logits: Tensor, targets: Tensor, is_differentiated: bool
) -> Tuple[Sequence[Tensor], Sequence[Tensor]]:
    """:meth:`RowsLoss.compiled_`, by autograd of its formula where nothing is compiled."""
    if loss.kernel.compiles(logits):
        return loss.compiled_(logits, targets)
    parameters = [parameter.detach().requires_grad_(is_differentiated) for parameter in loss.parameters]
    numbers, parts = [], [0.0] * len(parameters)
    for block, targets_of_block in blocks_of_rows(logits, targets):
        x = block.to(compute_dtype(block.dtype)).detach().requires_grad_(is_differentiated)
        with torch.set_grad_enabled(is_differentiated):
            kinds = loss.formula(x, targets_of_block, *parameters)
            total = kinds[0].sum()
        if is_differentiated:
            grad, *grads = torch.autograd.grad(total, [x, *parameters], allow_unused=True, materialize_grads=True)
            parts = [part + gradient.double() for part, gradient in zip(parts, grads)]
            block.copy_(grad)
        numbers.append([kind.detach() for kind in kinds])
    return [torch.cat(kind) for kind in zip(*numbers)], parts


def _rounded(grad: Tensor, dtype: torch.dtype) -> Tuple[Tensor, Optional[Tensor]]:
    """Gradients of logits in ``dtype``, and what they are multiplied with in fp16, which holds none below 6e-8."""
    if dtype != torch.float16 or not grad.numel():
        return grad.to(dtype), None
    scale = FP16_LARGEST_GRADIENT / torch.linalg.vector_norm(grad, float("inf")).clamp(min=FP16_LARGEST_GRADIENT**-3)
    return torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype)), scale


def _add_product_(
    total: Tensor, left: Tensor, right: Tensor, is_first: bool, scale: Optional[Tensor], is_one_of_many: bool = False
) -> None:
    """Adds ``left @ right / scale`` to ``total``, or overwrites it if it is the first; unrounded if others follow."""
    beta = 0 if is_first else 1  # 0 ignores what was there
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta)
        return
    is_wide = has_wide_products(total)
    is_rounded = is_one_of_many and not is_wide  # PyTorch rounds such products of half-precision matrices
    right = right.float() if is_rounded else right
    rows = max(PRODUCT_AT_A_TIME // total.size(1), 1)
    for part, left_part in zip(total.split(rows), left.split(rows)):
        if is_rounded:
            part.addmm_(left_part.float(), right, beta=beta)
            continue
        product = (wide_product if is_wide else torch.mm)(left_part, right)
        if scale is not None:
            product /= scale
        if is_first:
            part.copy_(product)
        else:
            part.add_(product)


def _sums(numbers: Sequence[Tensor]) -> Tuple[Tensor, ...]:
    """Over tokens, of which there are many: float64 costs nothing here."""
    return tuple(kind.sum(dtype=torch.float64).to(kind.dtype) for kind in numbers)
