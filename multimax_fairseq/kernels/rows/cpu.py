"""Mappings of rows of fp32 scores on a CPU, and their gradients, in C++: plain functions, without autograd."""

import ctypes
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import cpp
from . import Rows

# The places in mappings.hpp; multimax has that of softmax and its order more.
KINDS = {
    "softmax": 0, "multimax": 0, "sparsemax": 3, "entmax15": 4, "entmax, fixed": 5, "entmax": 6, "evsoftmax": 7
}  # fmt: skip

# Scores for which one more thread pays, as in PyTorch's own loops.
SCORES_PER_THREAD = 2**15


class Numbers(ctypes.Structure):
    """``Numbers`` of the C++: of row r those at place r // rows_of_each % count.

    Attributes:
        kind: the mapping.
        tensors: thresholds and gains; ε; or c: fp32, contiguous.
    """

    _fields_ = [
        *((name, cpp.ADDRESS) for name in ("first", "second", "grad_first", "grad_second")),
        *((name, cpp.INTEGER) for name in ("rows_of_each", "count")),
    ]

    def __init__(self, rows: Rows, scores: torch.Size):
        """``scores``: their shape, (…, width)."""
        self.name, self.given = rows.name, rows.numbers
        self.kind, self.rows_of_each, self.count = KINDS[rows.name], scores[:-1].numel(), 1
        self.tensors = [*map(_as_read, rows.numbers)]
        if rows.name == "multimax":
            self.kind += len(self.tensors[0])
        elif rows.name == "entmax" and self.tensors[0].numel() > 1:
            (c,) = self.tensors
            if tuple(c.shape[-3:]) == (*scores[-3:-2], 1, 1):
                self.rows_of_each = scores[-2]
            else:
                self.rows_of_each, self.tensors = 1, [_as_read(c.expand(*scores[:-1], 1))]
            self.count = self.tensors[0].numel()

    def new_gradients(self) -> List[Tensor]:
        """Where the C++ is to write the gradients of ``tensors``, for mappings that have some."""
        return [*map(torch.empty_like, self.tensors)] if self.name in ("multimax", "entmax") else []

    def located(self, grads: Sequence[Tensor] = ()) -> "Numbers":
        """Itself, with addresses as they are now: FSDP moves parameters between forward and backward."""
        self.first, self.second, *_ = *map(Tensor.data_ptr, self.tensors), None, None
        if grads:
            self.grad_first, self.grad_second, *_ = *map(Tensor.data_ptr, grads), None
        return self

    def gradients(self, found: Sequence[Tensor]) -> Tuple[Optional[Tensor], ...]:
        """The gradients of ``rows.numbers``, from what the C++ has written; None for those of ε and of a fixed α."""
        if not found:
            return (None,) * len(self.given)
        if self.name == "entmax":
            return (found[0].sum_to_size(self.given[0].shape),)
        return tuple(found)


ARGUMENTS = [cpp.INTEGER, ctypes.POINTER(Numbers)] + [cpp.INTEGER] * 3
LIBRARY = cpp.Library(
    Path(__file__).with_name("rows.cpp"),
    {"map_rows": ARGUMENTS + [cpp.ADDRESS] * 2, "map_rows_backward": ARGUMENTS + [cpp.ADDRESS] * 4},
)


def forward(numbers: Numbers, scores: Tensor) -> Tensor:
    """Probabilities, contiguous, of ``scores``, (…, width), not empty, which ``LIBRARY`` serves."""
    scores = scores.contiguous()
    probabilities = torch.empty_like(scores)
    _call(LIBRARY.functions.map_rows, numbers.located(), scores, probabilities)
    return probabilities


def backward(numbers: Numbers, scores: Tensor, probabilities: Tensor, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    """∂L/∂scores, (…, width), and the gradients of ``rows.numbers``, from ∂L/∂probabilities.

    Args:
        scores: what :func:`forward` got; only ``multimax`` reads them.
        probabilities: what :func:`forward` returned.
    """
    scores, probabilities, grad = map(_as_read, (scores, probabilities, grad))
    grad_scores, grads = torch.empty_like(grad), numbers.new_gradients()
    _call(LIBRARY.functions.map_rows_backward, numbers.located(grads), scores, probabilities, grad, grad_scores)
    return (grad_scores, *numbers.gradients(grads))


def _call(function: Callable, numbers: Numbers, *tensors: Tensor) -> None:
    count, width = tensors[0].numel(), tensors[0].size(-1)
    threads = min(torch.get_num_threads(), max(count // SCORES_PER_THREAD, 1))
    function(numbers.kind, numbers, count // width, width, threads, *map(Tensor.data_ptr, tensors))


def _as_read(tensor: Tensor) -> Tensor:
    """fp32, contiguous, on the CPU."""
    if tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous():
        return tensor
    return tensor.detach().to("cpu", torch.float32).contiguous()
