"""Sparse mappings with a backward of their own, which needs only the probabilities.

They run in C++ (``sparse.cpp``), or by the kernels of :mod:`.sparse_rows`.
"""

from pathlib import Path
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import cpp, sparse_rows
from .compiler import Kernel
from .scores import compute_dtype


class Kernels(NamedTuple):
    """A mapping's kernels, and whether each takes a number per row: c = α − 1, or the ε of EvSoftMax."""

    forward: Kernel
    backward: Kernel
    forward_takes: bool
    backward_takes: bool


KERNELS = {  # in the order of with_mapping in sparse.cpp
    "sparsemax": Kernels(sparse_rows.sparsemax_rows, sparse_rows.sparsemax_rows_backward, False, False),
    "entmax15": Kernels(sparse_rows.entmax15_rows, sparse_rows.entmax15_rows_backward, False, False),
    "entmax": Kernels(sparse_rows.entmax_rows, sparse_rows.entmax_rows_backward, True, True),
    "evsoftmax": Kernels(sparse_rows.evsoftmax_rows, sparse_rows.evsoftmax_rows_backward, True, False),
}

LIBRARY = cpp.Library(
    Path(__file__).with_name("sparse.cpp"),
    {
        "sparse_rows": [cpp.INTEGER] * 4 + [cpp.ADDRESS] * 2 + [cpp.INTEGER] + [cpp.ADDRESS],
        "sparse_rows_backward": [cpp.INTEGER] * 4 + [cpp.ADDRESS] * 3 + [cpp.INTEGER] + [cpp.ADDRESS] * 2,
    },
)


def fused_sparse(
    name: str, scores: Tensor, formula: Callable[[Tensor], Tensor], parameter: Optional[Tensor] = None
) -> Tensor:
    """The mapping ``name`` over the last dimension of ``scores``: compiled, or else ``formula(scores)``.

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64; the first two are computed in fp32.
        parameter: c = α − 1 of ``entmax``, which gets a gradient, or ε of ``evsoftmax``: one number, or (…, 1).
    """
    if scores.numel() == 0:
        return scores.clone()
    x = scores.to(compute_dtype(scores.dtype))
    if not (LIBRARY.serves(x) or KERNELS[name].forward.compiles(_flat(x))):
        return formula(scores)
    if parameter is None:
        parameter = x.new_ones(())
    elif parameter.numel() > 1:
        parameter = parameter.expand(*x.shape[:-1], 1)
    parameter = parameter.to(x.device, x.dtype).reshape(-1, 1)
    forward = FusedSparse.apply if torch.is_grad_enabled() else _forward
    return forward(x, parameter, name).to(scores.dtype)


class FusedSparse(Function):
    """Probabilities of (…, width) scores, fp32 or fp64; ``parameter``: (rows, 1) or (1, 1)."""

    @staticmethod
    def forward(ctx, scores: Tensor, parameter: Tensor, name: str) -> Tensor:
        probabilities = _forward(scores, parameter, name)
        ctx.name = name
        ctx.save_for_backward(probabilities, parameter)
        return probabilities

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        probabilities, parameter = ctx.saved_tensors
        wants_parameter = ctx.needs_input_grad[1]
        if LIBRARY.serves(probabilities) and not torch.is_grad_enabled():
            grads = _backward_in_cpp(ctx.name, probabilities, parameter, grad, wants_parameter)
        else:
            grads = _backward_by_kernels(ctx.name, probabilities, parameter, grad, wants_parameter)
        grad_scores, grads_of_rows = grads
        grad_parameter = grads_of_rows.sum_to_size(parameter.shape) if wants_parameter else None
        return grad_scores.view(grad.shape), grad_parameter, None


def _forward(scores: Tensor, parameter: Tensor, name: str) -> Tensor:
    if LIBRARY.serves(scores):
        scores, parameter = scores.contiguous(), parameter.contiguous()
        probabilities = torch.empty_like(scores)
        LIBRARY.functions.sparse_rows(
            *_sizes(name, scores), *_addresses(scores, parameter), parameter.numel() > 1, *_addresses(probabilities)
        )
        return probabilities
    kernels, flat = KERNELS[name], _flat(scores)
    return kernels.forward(flat, *_of_rows(kernels.forward_takes, parameter, flat)).view(scores.shape)


def _backward_in_cpp(
    name: str, probabilities: Tensor, parameter: Tensor, grad: Tensor, wants_parameter: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    grad, parameter, grad_scores = grad.contiguous(), parameter.contiguous(), torch.empty_like(probabilities)
    sizes = _sizes(name, probabilities)
    grads_of_rows = probabilities.new_empty(sizes[1], 1) if wants_parameter else None
    LIBRARY.functions.sparse_rows_backward(
        *sizes, *_addresses(probabilities, grad, parameter), parameter.numel() > 1, *_addresses(grad_scores),
        None if grads_of_rows is None else grads_of_rows.data_ptr(),
    )  # fmt: skip
    return grad_scores, grads_of_rows


def _backward_by_kernels(
    name: str, probabilities: Tensor, parameter: Tensor, grad: Tensor, wants_parameter: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    kernels, rows = KERNELS[name], (_flat(probabilities), _flat(grad))
    parameters = _of_rows(True, parameter, rows[0])

    def run(kernel: Kernel, takes: bool) -> Tensor:
        # uncompiled, autograd can differentiate it again
        return (kernel.eager if torch.is_grad_enabled() else kernel)(*rows, *(parameters if takes else ()))

    grads_of_rows = run(sparse_rows.entmax_rows_backward_of_c, True) if wants_parameter else None
    return run(kernels.backward, kernels.backward_takes), grads_of_rows


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _of_rows(takes: bool, parameter: Tensor, flat: Tensor) -> List[Tensor]:
    return [parameter.expand(len(flat), 1)] if takes else []


def _sizes(name: str, scores: Tensor) -> Tuple[int, int, int, int]:
    """index of the mapping, rows, width, threads"""
    width = scores.size(-1)
    return list(KERNELS).index(name), scores.numel() // width, width, cpp.threads_for(scores)


def _addresses(*tensors: Tensor) -> List[int]:
    return [tensor.data_ptr() for tensor in tensors]
