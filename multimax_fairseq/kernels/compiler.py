"""PyTorch's compiler, Inductor: one function of rows for all shapes, C++ on a CPU and Triton on a GPU."""

import functools
import logging
import threading
import time
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from .backend import backend, note_failure, wants_compiled

logger = logging.getLogger(__name__)

# These make Inductor fuse a kernel into one loop over a row: computing σ twice is faster than writing it to memory
# and reading it back. The last one makes a product and a sum one instruction.
INDUCTOR_OPTIONS = {
    "realize_opcount_threshold": 10_000,
    "realize_cpu_opcount_threshold": 10_000,
    "realize_reads_threshold": 100,
    "realize_acc_reads_threshold": 1_000,
    "realize_cpu_acc_reads_threshold": 1_000,
    "cpp.enable_floating_point_contract_flag": "fast",
}

# Kernels are compiled for this shape and serve every other: two different numbers (the compiler would specialise on
# equal ones), large enough for Inductor to share the rows among threads. Rows of more than 4,096 scores, as of a
# vocabulary, have a kernel of their own, as Inductor sums them in another way.
EXAMPLE_ROWS, EXAMPLE_WIDTH = 3_072, 160
WIDE, WIDE_EXAMPLE = 4_096, 4_128
PARAMETERS = 2  # last arguments, which keep their shape
MOST_SCORES = 2**31 - 1  # up to here a GPU's kernel counts in 32 bits

_failure = ""  # why compiling is not tried again
_lock = threading.RLock()  # PyTorch traces in one thread at a time


class Kernel:
    """A function of rows of scores, (rows, width), that is compiled when it is first called; a decorator.

    Its first argument has that shape; others have it too, or (rows, 1), or a fixed one. The last two, thresholds
    and gains, say, have no rows. What it writes to must be contiguous.

    Its graph is traced and compiled here, not by ``torch.compile``, which checks at every call whether its kernel
    still fits. Those checks take twice the time of the rest of a call, and more than softmax of short rows. Here each
    combination of dtypes, devices, order and number of threads has a kernel, which fits every shape.
    """

    def __init__(self, function: Callable[..., Any]):
        functools.update_wrapper(self, function)
        self.eager = function
        self._compiled: Dict[Tuple, Callable[..., Any]] = {}

    def compiles(self, scores: Tensor, *others: Tensor) -> bool:
        """Whether a call with these arguments runs compiled.

        Rows of one score, and single rows, stay eager: there is little to compute, and the compiler would make
        another kernel for them.
        """
        return (
            min(scores.shape) > 1
            and scores.numel() <= MOST_SCORES
            and wants_compiled(scores, *others)
            and not (_failure and backend() == "auto")
        )

    def __call__(self, *arguments: Tensor) -> Any:
        if self.compiles(*arguments):
            return self._run_compiled(arguments)
        return self.eager(*arguments)

    def _run_compiled(self, arguments: Sequence[Tensor]) -> Any:
        kinds = [(tensor.dtype, tensor.device) for tensor in arguments]
        shapes = tuple(tensor.shape for tensor in arguments[-PARAMETERS:])
        variant = (*kinds, *shapes, arguments[0].size(1) > WIDE, torch.get_num_threads())
        compiled = self._compiled.get(variant)
        if compiled is None:
            with _lock:
                compiled = self._compiled[variant] = self._compiled.get(variant) or self._compile(arguments)
        return compiled(*(tensor.contiguous() for tensor in arguments))

    def _compile(self, arguments: Sequence[Tensor]) -> Callable[..., Any]:
        global _failure
        logger.info("compiling %s; PyTorch keeps it for the next run", self.__name__)
        start = time.perf_counter()
        try:
            compiled = compile_function(self.eager, _examples(arguments))
        except Exception as error:
            if backend() == "compiled":
                raise
            _failure = str(error).strip().partition("\n")[0] or type(error).__name__
            note_failure(_failure)
            return self.eager
        logger.info("compiled %s in %.1f s", self.__name__, time.perf_counter() - start)
        return compiled


def compile_function(function: Callable[..., Any], examples: Sequence[Tensor]) -> Callable[..., Any]:
    """``function`` by Inductor, for contiguous tensors like ``examples``, with any number of rows and any width."""
    import torch._inductor  # here: it takes a second, and may not be needed
    from torch.fx.experimental.proxy_tensor import make_fx

    device = examples[0].device.type
    # activation checkpointing counts what is saved, and must not count what tracing saves
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.no_grad(), torch.autocast(device, enabled=False), hooks:
        graph = make_fx(function, tracing_mode="symbolic")(*examples)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        known = torch._inductor.list_options()
        options = {name: value for name, value in INDUCTOR_OPTIONS.items() if name in known}
        options["cpp.threads"] = torch.get_num_threads()  # else PyTorch's cache may return one for another number
        return torch._inductor.compile(graph, inputs, options=options)


def _examples(arguments: Sequence[Tensor]) -> List[Tensor]:
    """Zeros in place of the arguments, in the shapes to compile for."""
    shape = arguments[0].shape
    example_width = EXAMPLE_WIDTH if shape[1] <= WIDE else WIDE_EXAMPLE
    examples = {shape: (EXAMPLE_ROWS, example_width), (shape[0], 1): (EXAMPLE_ROWS, 1)}
    return [tensor.new_zeros(examples.get(tensor.shape, tensor.shape)) for tensor in arguments[:-PARAMETERS]] + [
        torch.zeros_like(tensor) for tensor in arguments[-PARAMETERS:]
    ]
