"""Attention by any mapping in plain PyTorch, by blocks, on any device.

A block has the scores of some sentences, all of their heads, and some queries, against all the keys that these may
see. The backward computes it again: one more forward, but nothing of size length² is kept, and no work is done on
scores that the causal mask hides.

Source of the idea: Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021.
"""

from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import get_device_states, set_device_states

from ..backend import gradients_of, is_plain, no_autocast
from ..scores import compute_dtype

# Up to so many scores the whole matrix is computed. On a GPU a block takes some seven launches, and must fill it for
# long to pay: in half precision they are 64 MiB, kept two or three times, 2 GiB in twelve layers.
WHOLE = {"cpu": 2**20, "cuda": 2**25}
# Scores in a block: 2 MiB in fp32, of which the mapping has several. A GPU needs large blocks to be filled.
SCORES = {"cpu": 2**19, "cuda": 2**26}
# Queries in a block, at most. A causal block wastes queries²/2 scores on its diagonal.
QUERIES = {"cpu": 64, "cuda": 512}


class Problem(NamedTuple):
    """What is computed of query, key, value, mask and the mapping's tensors.

    Attributes:
        formula: :func:`multimax_fairseq.attention.weights`.
        mapping: (scores, *tensors) → probabilities.
    """

    formula: Callable[..., Tensor]
    mapping: Callable[..., Tensor]
    is_causal: bool
    dropout: float

    def weights(self, products: Tensor, mask: Optional[Tensor], *tensors: Tensor, first: int) -> Tensor:
        return self.formula(products, lambda x: self.mapping(x, *tensors), mask, self.is_causal, self.dropout, first)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *others: Optional[Tensor], first: int = 0
    ) -> Tensor:
        return self.weights(query @ key.transpose(-2, -1), *others, first=first) @ value

    def add_gradients_(
        self, sums: Sequence[Optional[Tensor]], needed: Sequence[bool], grad: Tensor, first: int, query: Tensor,
        key: Tensor, value: Tensor, *others: Optional[Tensor],
    ) -> None:  # fmt: skip
        """Adds to ``sums`` the gradients of a block; what has the size of keys and values in place."""
        computed = []

        def weights(*inputs: Optional[Tensor]) -> Tensor:
            computed.append(self.weights(*inputs, first=first))
            return computed[0]

        inputs = query @ key.transpose(-2, -1), *others
        grad_products, *grads = gradients_of(weights, inputs, (True, *needed[3:]), grad @ value.transpose(-2, -1))
        _add_product_(sums[0], grad_products, key)
        _add_product_(sums[1], grad_products.transpose(-2, -1), query)
        _add_product_(sums[2], computed[0].detach().transpose(-2, -1), grad)
        for total, part in zip(sums[3:], grads):
            if part is not None:
                total += part


def pay(query: Tensor, key: Tensor) -> bool:
    """Whether the matrix of scores is too large to be kept."""
    batch, heads, tgt_len, _ = query.shape
    return batch * heads * tgt_len * key.size(2) > WHOLE.get(query.device.type, WHOLE["cuda"])


def attend(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor], *tensors: Tensor
) -> Tensor:
    """``problem(query, key, value, mask, *tensors)`` by blocks; arguments as in :func:`.attend_by`.

    The mask and the ``tensors`` of the mapping get gradients, too; src_len of the mask may be 1.
    """
    return _Blocks.apply(problem, query, key, value, mask, *tensors)


class _Blocks(Function):
    """See :func:`attend`."""

    @staticmethod
    def forward(ctx, problem: Problem, *tensors: Optional[Tensor]) -> Tensor:
        query, _, value, *_ = tensors
        ctx.problem = problem
        # of the generators that dropout, and a mapping of one's own, may draw from
        ctx.state, ctx.states_of_devices = torch.get_rng_state(), get_device_states(query)
        ctx.save_for_backward(*tensors)
        output = query.new_empty(*query.shape[:-1], value.size(-1))
        for at in _blocks(problem, *tensors[:2]):
            output[at[0], :, at[1]] = problem(*_parts(at, *tensors), first=at[1].start)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        problem, tensors, needed = ctx.problem, list(ctx.saved_tensors), ctx.needs_input_grad[1:]
        tensors[:3] = (tensor.to(grad.dtype) for tensor in tensors[:3])  # saved-tensor hooks may have changed it
        if torch.is_grad_enabled() or not is_plain(grad):
            if problem.dropout:
                raise RuntimeError("attention with dropout has no gradients of gradients: leave out its dropout")
            return None, *gradients_of(problem, tensors, needed, grad)
        sums = [torch.zeros_like(t, dtype=compute_dtype(t.dtype)) if n else None for t, n in zip(tensors, needed)]
        query = tensors[0]
        with torch.random.fork_rng([query.device] if query.is_cuda else []), no_autocast(query):
            torch.set_rng_state(ctx.state)
            set_device_states(*ctx.states_of_devices)
            for at in _blocks(problem, *tensors[:2]):
                upstream, first = grad[at[0], :, at[1]], at[1].start
                problem.add_gradients_(_parts(at, *sums), needed, upstream, first, *_parts(at, *tensors))
        return None, *(s if s is None else s.to(tensor.dtype) for s, tensor in zip(sums, tensors))


def _blocks(problem: Problem, query: Tensor, key: Tensor) -> Iterator[Tuple[slice, slice, slice]]:
    """The sentences, queries and keys of each block."""
    (batch, heads, tgt_len, _), src_len, device = query.shape, key.size(2), query.device.type
    size = SCORES.get(device, SCORES["cuda"]) // (heads * src_len)
    queries = max(min(QUERIES.get(device, QUERIES["cuda"]), tgt_len, size), 1)
    sentences = min(max(size // queries, 1), batch)
    for some in range(0, batch, sentences):
        for start in reversed(range(0, tgt_len, queries)):  # causal blocks then fit into what larger ones have freed
            end = min(start + queries, src_len) if problem.is_causal else src_len
            yield slice(some, some + sentences), slice(start, start + queries), slice(0, end)


def _parts(at: Tuple[slice, ...], query: Any, key: Any, value: Any, mask: Any, *tensors: Any) -> List:
    """Views of what belongs to a block, of tensors that are there."""
    sentences, queries, keys = at
    if mask is not None:
        for dim, some in zip((0, 2, 3), at):
            if mask.size(dim) > 1:
                mask = mask.narrow(dim, some.start, min(some.stop, mask.size(dim)) - some.start)
    pairs = (query, queries), (key, keys), (value, keys)
    return [*(t if t is None else t[sentences, :, some] for t, some in pairs), mask, *tensors]


def _add_product_(total: Optional[Tensor], left: Tensor, right: Tensor) -> None:
    """Adds left · right, of (batch, heads, …) each, to ``total``, in place where they have one dtype."""
    if total is not None and left.dtype == total.dtype:
        for part, *factors in zip(total, left, right):
            part.baddbmm_(*factors)
    elif total is not None:
        total += left @ right
