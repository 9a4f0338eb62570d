"""Compiled or eager: where the kernels of :mod:`.kernels` run.

``torch.compile`` makes one function of each, C++ on a CPU and Triton on a GPU, for all shapes. It is on by default
where there is a compiler for it; the choice is, first to last, that of the environment variable ``MULTIMAX_BACKEND``,
of :func:`set_backend` (``--multimax-backend``), and ``auto``::

    auto      compiled; eager, with one warning that says why, where compiling fails
    compiled  compiled; an error where that fails
    eager     plain PyTorch
"""

import functools
import logging
import os
import time
import types
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "compiled", "eager")
ENVIRONMENT_VARIABLE = "MULTIMAX_BACKEND"
COMPILED_DEVICES = ("cpu", "cuda")

# What makes Inductor fuse these kernels into one loop over a row: computing σ twice takes less time than writing it
# to memory and reading it back, and a product and a sum are one instruction.
INDUCTOR_OPTIONS = {
    "realize_opcount_threshold": 10_000,
    "realize_cpu_opcount_threshold": 10_000,
    "realize_reads_threshold": 100,
    "realize_acc_reads_threshold": 1_000,
    "realize_cpu_acc_reads_threshold": 1_000,
    "cpp.enable_floating_point_contract_flag": "fast",
}

# The shape that kernels are compiled for: two different numbers (of equal ones the compiler takes note), large enough
# for Inductor to share the rows among threads. It serves every other shape too, but for the rows of a vocabulary:
# more than 4,096 scores Inductor sums up in another way, in a kernel of its own.
EXAMPLE_ROWS, EXAMPLE_WIDTH = 3_072, 160
WIDE, WIDE_EXAMPLE = 4_096, 4_128

# Scores in a block where a kernel runs eagerly on a CPU: 512 KiB in fp32. Of the tensors of that size some three are
# in use at a time, which fit into a cache of 2 MiB.
EAGER_BLOCK = 2**17

_is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling  # before torch 2.3

compile_seconds: Dict[str, float] = {}  # of this process, by kernel, all its dtypes together

_chosen = "auto"
_failure = ""  # why compiling is not tried again


def set_backend(name: str) -> None:
    """Choose the backend of this process, unless the environment variable has.

    Raises:
        ValueError: ``name``, or what the environment variable says, is not of ``BACKENDS``.
    """
    global _chosen
    _chosen = _checked(name, "--multimax-backend")
    backend()


def backend() -> str:
    """The backend in force.

    Raises:
        ValueError: what the environment variable says is not of ``BACKENDS``.
    """
    return _checked(os.environ.get(ENVIRONMENT_VARIABLE) or _chosen, ENVIRONMENT_VARIABLE)


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: there is no backend {name!r}; choose from: {', '.join(BACKENDS)}")
    return name


class Kernel:
    """A function of rows of scores, (rows, width), that is compiled when it is first called.

    Its first argument has that shape; others have it too, or (rows, 1), and the last two are thresholds and gains.
    """

    def __init__(self, function: Callable[..., Any]):
        functools.update_wrapper(self, function)
        self.eager = function
        self._compiled: Dict[Tuple, Callable[..., Any]] = {}

    def compiles(self, scores: Tensor) -> bool:
        """Whether a call with these ``scores`` runs compiled.

        Rows of one score, and single rows, stay eager: there is little to compute, and the compiler would make a
        kernel of their own for them.
        """
        return (
            min(scores.shape) > 1
            and scores.device.type in COMPILED_DEVICES
            and backend() != "eager"
            and not (_failure and backend() == "auto")
            and not torch.jit.is_tracing()
            and not _is_compiling()  # whoever compiles a whole model has the formula
        )

    def __call__(self, *arguments: Tensor) -> Any:
        if self.compiles(arguments[0]):
            return self._run_compiled(arguments)
        return self.eager(*arguments)

    def over_rows(self, rows: Sequence[Tensor], parameters: Sequence[Tensor]) -> List[Any]:
        """Results for tensors of one shape, (…, width): of all rows together, or of blocks of them where eager."""
        width = rows[0].shape[-1]
        flat = [tensor.reshape(-1, width) for tensor in rows]
        if self.compiles(flat[0]):
            return [self._run_compiled((*flat, *parameters))]
        if flat[0].device.type != "cpu":
            return [self.eager(*flat, *parameters)]
        blocks = zip(*(tensor.split(max(EAGER_BLOCK // width, 1)) for tensor in flat))
        return [self.eager(*block, *parameters) for block in blocks]

    def _run_compiled(self, arguments: Sequence[Tensor]) -> Any:
        gains = arguments[-1]
        variant = arguments[0].dtype, arguments[0].device, gains.dtype, len(gains)
        compiled = self._compiled.get(variant)
        if compiled is None:
            compiled = self._compiled[variant] = self._compile(arguments)
        # .data: the compiler would take note of what a tensor is a view of, and make a kernel for each kind
        return compiled(*(tensor.data for tensor in arguments))

    def _compile(self, arguments: Sequence[Tensor]) -> Callable[..., Any]:
        global _failure
        logger.info("compiling %s; PyTorch keeps it for the next run", self.__name__)
        start = time.perf_counter()
        try:
            known = torch._inductor.list_options()
            options = {name: value for name, value in INDUCTOR_OPTIONS.items() if name in known}
            compiled = torch.compile(_copy(self.eager), dynamic=True, options=options)
            *rows, thresholds, gains = arguments
            compiled(*(_example(tensor, *rows[0].shape) for tensor in rows), thresholds.data, gains.data)
        except Exception as error:
            if backend() == "compiled":
                raise
            _failure = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning(
                "MultiMax runs in plain PyTorch, which is slower, as compiling it failed: %s "
                "(--multimax-backend eager, or %s=eager, says so from the start)", _failure, ENVIRONMENT_VARIABLE
            )
            return self.eager
        seconds = time.perf_counter() - start
        compile_seconds[self.__name__] = compile_seconds.get(self.__name__, 0.0) + seconds
        logger.info("compiled %s in %.1f s", self.__name__, seconds)
        return compiled


def kernel(function: Callable[..., Any]) -> Kernel:
    """Decorator: see :class:`Kernel`."""
    return Kernel(function)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as an object of its own: PyTorch limits how often it compiles one for other dtypes."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _example(tensor: Tensor, rows: int, width: int) -> Tensor:
    """A tensor in the place of an argument, of the shape to compile for."""
    if tensor.shape == (rows, width):
        return tensor.new_zeros(EXAMPLE_ROWS, EXAMPLE_WIDTH if width <= WIDE else WIDE_EXAMPLE)
    if tensor.shape == (rows, 1):
        return tensor.new_zeros(EXAMPLE_ROWS, 1)
    return tensor.data
