"""Who may compute: the one guard of all kernels.

The formulas are in :mod:`multimax_fairseq.mappings` and :mod:`multimax_fairseq.attention`. Kernels (C++ on a CPU,
Triton on a GPU, PyTorch's compiler for σ of a vocabulary and for losses) compute the same from plain tensors in a
plain context (:func:`is_plain`), unless the environment variable ``MULTIMAX_BACKEND`` says otherwise::

    auto      kernels; where they cannot be compiled the formula, with one warning that says why (the default)
    compiled  kernels; an error where they cannot be compiled
    eager     the formulas, differentiated by autograd
"""

import logging
import os
from contextlib import nullcontext
from typing import Callable, ContextManager, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "compiled", "eager")
ENVIRONMENT_VARIABLE = "MULTIMAX_BACKEND"

# What PyTorch's dispatcher sees in a plain tensor and a plain context. All else stands for somebody who takes part:
# batches of torch.func.vmap, tracers, subclasses, numbers that are zero or negative without being written so.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
PLAIN_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
for _key in "BackendSelect ADInplaceOrView AutogradCPU AutogradCUDA AutocastCPU AutocastCUDA CPU CUDA".split():
    PLAIN_KEYS = PLAIN_KEYS | torch._C.DispatchKeySet(torch._C._parse_dispatch_key(_key))


def _bits(keys: torch._C.DispatchKeySet) -> int:
    """For torch 2.2, whose key sets do not show theirs: all bits where there is a key that is not plain, or none."""
    return -((keys - PLAIN_KEYS).highestPriorityTypeId() != torch._C.DispatchKey.Undefined)


bits = getattr(torch._C.DispatchKeySet, "raw_repr", _bits)
OTHER_BITS = ~bits(PLAIN_KEYS)

is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling  # before torch 2.3

failures: List[str] = []  # why something could not be compiled in this process


def backend() -> str:
    """The backend in force.

    Raises:
        ValueError: the environment variable is not in ``BACKENDS``.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: there is no backend {name!r}; choose from: {', '.join(BACKENDS)}")
    return name


def wants_compiled(*tensors: Tensor) -> bool:
    """Whether a computation on ``tensors`` is to run in other code than its formula, if it can."""
    return (tensors[0].is_cpu or tensors[0].is_cuda) and is_plain(*tensors) and backend() != "eager"


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are nothing but numbers in memory, and nobody is watching what is computed of them.

    Only then may a kernel take their addresses. Tracing, ``torch.compile``, ``torch.func``, forward-mode
    differentiation, fake and other special tensors get the formula, in PyTorch's own operators. It takes some 3 µs.
    """
    if is_compiling() or forward_ad._current_level >= 0:
        return False
    found = bits(torch._C._dispatch_tls_local_include_set())  # of modes: tracers, transforms, dispatch modes
    for tensor in tensors:
        if type(tensor) not in PLAIN_TYPES:
            return False
        found |= bits(torch._C._dispatch_keys(tensor))
    return not found & OTHER_BITS


def gradients_of(
    function: Callable[..., Tensor], inputs: Sequence[Optional[Tensor]], needed: Sequence[bool], grad: Tensor
) -> Tuple[Optional[Tensor], ...]:
    """Autograd's gradients of ``function(*inputs)``, for the backward of a kernel that may not run, or not only once.

    Where grad mode is on, as under ``create_graph=True``, they can be differentiated again. Saved-tensor hooks may
    have made another dtype of the inputs.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if not again:
            inputs = [tensor.detach().requires_grad_() if n else tensor for tensor, n in zip(inputs, needed)]
        wanted = [tensor for tensor, is_needed in zip(inputs, needed) if is_needed]
        output = function(*inputs)
        grad = grad.to(output.dtype)
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=again, allow_unused=True))
    return tuple(next(found) if is_needed else None for is_needed in needed)


def autocast_dtype(tensor: Tensor) -> Optional[torch.dtype]:
    """What autocast makes of ``tensor`` before a product; None where it is off, and for fp64, which it leaves."""
    device = tensor.device.type
    if hasattr(torch, "get_autocast_dtype"):
        is_on = torch.is_autocast_enabled(device)
        return torch.get_autocast_dtype(device) if is_on and tensor.dtype != torch.float64 else None
    is_on = torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()  # before torch 2.4
    if not is_on or tensor.dtype == torch.float64:  # torch.compile cannot ask for the dtype
        return None
    return torch.get_autocast_cpu_dtype() if device == "cpu" else torch.get_autocast_gpu_dtype()


def no_autocast(tensor: Tensor) -> ContextManager:
    """A context without autocast on the device of ``tensor``."""
    return nullcontext() if autocast_dtype(tensor) is None else torch.autocast(tensor.device.type, enabled=False)


def note_failure(reason: str) -> None:
    """Warn, once in a process, that formulas take the place of what cannot be compiled."""
    logger.log(
        logging.INFO if failures else logging.WARNING,
        "MultiMax runs in plain PyTorch, which is slower, as compiling failed: %s (%s=eager says so from the start)",
        reason, ENVIRONMENT_VARIABLE,
    )  # fmt: skip
    failures.append(reason)
