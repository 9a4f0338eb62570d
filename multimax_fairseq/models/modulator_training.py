"""How modulators are trained apart from the other parameters: weight decay, clipping, and the norm of their gradient.

A modulator's gradient is a sum over all scores of a batch. Two options keep it, and the weight decay meant for
matrices, from doing harm; both are off by default, as in the paper. They need a place inside fairseq's update that no
model is asked about: between the gradients and the step of whatever ``--optimizer`` was chosen. Every path to an
optimizer leads through ``fairseq.optim.build_optimizer``, so that is where this looks for parameters that a model has
marked, puts them into a parameter group of their own, and adds to the one optimizer's ``clip_grad_norm``.
"""

import functools
from dataclasses import dataclass
from typing import Any, Callable, Iterable, List, Optional

import fairseq.optim
import torch
from fairseq.logging import metrics
from fairseq.optim import FairseqOptimizer
from torch import Tensor
from torch.nn import Parameter

MARK = "modulator_training"  # the attribute of a parameter that is a modulator's


@dataclass
class ModulatorTraining:
    """What a user chose for all modulators of a model.

    Attributes:
        weight_decay: of the modulators; None: that of the other parameters.
        clip_norm: the largest norm of the gradient of all modulators together, which then has no part in
            ``--clip-norm``; 0: no limit; None: inside ``--clip-norm`` with the other parameters.
        is_applied: an optimizer that holds the modulators has been built.
    """

    weight_decay: Optional[float] = None
    clip_norm: Optional[float] = None
    is_applied: bool = False

    @classmethod
    def from_options(cls, args: Any) -> "ModulatorTraining":
        """Read ``--modulator-weight-decay`` and ``--modulator-clip-norm``.

        Raises:
            ValueError: a negative number.
        """
        numbers = {}
        for name in ("weight_decay", "clip_norm"):
            number = getattr(args, f"modulator_{name}", None)
            if number is not None and not number >= 0:
                raise ValueError(f"--modulator-{name.replace('_', '-')} takes a number of at least 0; got {number}")
            numbers[name] = number
        return cls(**numbers)

    def mark(self, parameters: Iterable[Parameter]) -> None:
        """Say of parameters that they are modulators', for :func:`separate_modulators`."""
        for parameter in parameters:
            setattr(parameter, MARK, self)

    def check_applied(self) -> None:
        """Raise where a choice would be ignored.

        Raises:
            ValueError: the optimizer that training uses does not hold the modulators themselves.
        """
        if self.is_applied or (self.weight_decay is None and self.clip_norm is None):
            return
        raise ValueError(
            "--modulator-weight-decay and --modulator-clip-norm do not go with --fp16, --bf16 or sharding, where the "
            "optimizer works on copies of the parameters: use --amp or full precision, or drop them"
        )


def install() -> None:
    """Let every optimizer that fairseq builds see to marked parameters; does nothing the second time."""
    build = fairseq.optim.build_optimizer
    if not hasattr(build, "__wrapped__"):

        @functools.wraps(build)
        def build_optimizer(cfg, params, *args, **kwargs) -> FairseqOptimizer:
            optimizer = build(cfg, params, *args, **kwargs)
            separate_modulators(optimizer)
            return optimizer

        fairseq.optim.build_optimizer = build_optimizer


def separate_modulators(optimizer: FairseqOptimizer) -> None:
    """Give the modulators among an optimizer's parameters what their :class:`ModulatorTraining` says.

    Where it says nothing, all that is added is the norm of their gradient in the log (``modulator_gnorm``). In half
    precision the gradient is scaled by a factor that is not known here: nothing is done.

    Raises:
        ValueError: a weight decay is chosen, and the optimizer has none.
    """
    half = (torch.float16, torch.bfloat16)
    modulators = [p for p in optimizer.params if hasattr(p, MARK) and p.dtype not in half]
    if not modulators:
        return
    training: ModulatorTraining = getattr(modulators[0], MARK)
    if training.weight_decay is not None:
        _set_weight_decay(optimizer, modulators, training.weight_decay)
    optimizer.clip_grad_norm = functools.partial(_clip_grad_norm, optimizer.clip_grad_norm, modulators, training)
    training.is_applied = True


def _set_weight_decay(optimizer: FairseqOptimizer, modulators: List[Parameter], weight_decay: float) -> None:
    if "weight_decay" not in optimizer.optimizer.defaults:
        raise ValueError(
            f"--modulator-weight-decay: {type(optimizer).__name__} has no weight decay; drop it, or choose another "
            "--optimizer"
        )
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if not hasattr(parameter, MARK)]
    optimizer.optimizer.add_param_group({"params": modulators, "weight_decay": weight_decay})


def _clip_grad_norm(
    clip_others: Callable[..., Tensor],
    modulators: List[Parameter],
    training: ModulatorTraining,
    max_norm: float,
    aggregate_norm_fn: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tensor:
    """The optimizer's ``clip_grad_norm``, which logs the norm of the modulators' gradient and clips it if asked to.

    Returns:
        the norm that fairseq logs as ``gnorm``: of all parameters, or of all but the modulators where these have
        their own clip. One that is not finite is passed on, as fairseq stops at it.
    """
    gradients = [parameter.grad for parameter in modulators if parameter.grad is not None]
    if not gradients:
        return clip_others(max_norm, aggregate_norm_fn)
    norm = torch.stack([gradient.detach().float().norm() for gradient in gradients]).norm()
    metrics.log_scalar("modulator_gnorm", norm, priority=410, round=3)
    if training.clip_norm is None:
        return clip_others(max_norm, aggregate_norm_fn)
    kept = [parameter.grad for parameter in modulators]
    for parameter in modulators:
        parameter.grad = None
    try:
        norm_of_others = clip_others(max_norm, aggregate_norm_fn)
    finally:
        for parameter, gradient in zip(modulators, kept):
            parameter.grad = gradient
    if training.clip_norm > 0:
        coefficient = (training.clip_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(coefficient)
    return torch.where(norm.isfinite(), norm_of_others, norm)
