"""Mappings of rows of fp32 scores on a CPU, and their gradients, in C++: plain functions, without autograd."""

from pathlib import Path
from typing import Callable, List, Optional, Tuple

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

ARGUMENTS = [cpp.INTEGER] * 4 + [cpp.ADDRESS] * 2 + [cpp.INTEGER] * 2
LIBRARY = cpp.Library(
    Path(__file__).with_name("rows.cpp"),
    {"map_rows": ARGUMENTS + [cpp.ADDRESS] * 2, "map_rows_backward": ARGUMENTS + [cpp.ADDRESS] * 5},
)


def serves(scores: Tensor) -> bool:
    """Whether :func:`forward` takes these scores: some, fp32, on a CPU, where there is a compiler."""
    return LIBRARY.serves(scores) and scores.numel() > 0


def forward(rows: Rows, scores: Tensor) -> Tensor:
    """Probabilities, contiguous, of ``scores``, (…, width)."""
    scores = scores.contiguous()
    probabilities = torch.empty_like(scores)
    _call(LIBRARY.functions.map_rows, Numbers(rows, scores.shape), scores, probabilities)
    return probabilities


def backward(
    rows: Rows, scores: Optional[Tensor], probabilities: Tensor, grad: Tensor
) -> Tuple[Optional[Tensor], ...]:
    """∂L/∂scores, (…, width), and the gradients of ``rows.numbers``, from ∂L/∂probabilities.

    Args:
        scores: for ``multimax``; the backward of the other mappings needs none.
        probabilities: what :func:`forward` returned.
    """
    probabilities, grad = probabilities.contiguous(), grad.contiguous()
    scores = probabilities if scores is None else scores.contiguous()
    numbers, grad_scores = Numbers(rows, grad.shape), torch.empty_like(grad)
    grads = grad.new_empty(numbers.shape)
    _call(LIBRARY.functions.map_rows_backward, numbers, scores, probabilities, grad, grad_scores, grads)
    return (grad_scores, *numbers.gradients(grads))


class Numbers:
    """The numbers of a mapping as the C++ reads them: of row r those at place r // rows_of_each % count.

    Attributes:
        kind: the mapping.
        tensors: thresholds and gains; ε; or c = α − 1.
        shape: in which the C++ writes their gradients; (0,) where they have none.
    """

    def __init__(self, rows: Rows, scores: torch.Size):
        """``scores``: their shape, (…, width)."""
        self.rows, self.kind, self.shape = rows, KINDS[rows.name], (0,)
        self.rows_of_each, self.count = scores[:-1].numel(), 1
        self.tensors = [_as_read(tensor) for tensor in rows.numbers]
        if rows.name == "multimax":
            self.kind += len(self.tensors[0])
            self.shape = (2, *self.tensors[0].shape)
        elif rows.name.startswith("entmax,"):
            self.tensors = [_as_read(rows.numbers[0].double() - 1)]
        elif rows.name == "entmax":
            c = rows.numbers[0].detach().double() - 1  # an α near 1 has few digits of it in fp32
            self.count, self.shape = c.numel(), c.shape
            if c.numel() > 1 and tuple(c.shape[-3:]) == (*scores[-3:-2], 1, 1):
                self.rows_of_each = scores[-2]
            elif c.numel() > 1:
                c = c.expand(*scores[:-1], 1)
                self.rows_of_each, self.count, self.shape = 1, c.numel(), c.shape
            self.tensors = [_as_read(c)]

    def addresses(self) -> List[Optional[int]]:
        return [tensor.data_ptr() for tensor in self.tensors] + [None] * (2 - len(self.tensors))

    def gradients(self, grads: Tensor) -> List[Optional[Tensor]]:
        """The gradients of ``rows.numbers``, from what the C++ has written; None for those of ε and of a fixed α."""
        if self.shape == (0,):
            return [None] * len(self.rows.numbers)
        found = [grads.sum_to_size(self.rows.numbers[0].shape)] if self.rows.name == "entmax" else grads.unbind()
        pairs = zip(found, self.rows.numbers)
        return [grad if number.dtype == grad.dtype else grad.to(number.dtype) for grad, number in pairs]


def _call(function: Callable, numbers: Numbers, *tensors: Tensor) -> None:
    width = tensors[0].size(-1)
    count = tensors[0].numel()
    threads = min(torch.get_num_threads(), max(count // SCORES_PER_THREAD, 1))
    addresses = map(Tensor.data_ptr, tensors)
    function(
        numbers.kind, count // width, width, threads,
        *numbers.addresses(), numbers.rows_of_each, numbers.count, *addresses,
    )  # fmt: skip


def _as_read(number: Tensor) -> Tensor:
    """fp32, contiguous, on the CPU."""
    if number.dtype == torch.float32 and number.is_cpu and number.is_contiguous():
        return number
    return number.detach().to("cpu", torch.float32).contiguous()
