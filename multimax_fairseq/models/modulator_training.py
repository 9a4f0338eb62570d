"""Trains modulators apart from the other parameters: with their own learning rate, weight decay and clipping.

A modulator has a few numbers, which have far to go; their gradient is a sum over all scores of a batch. Settings that
suit matrices do not suit them. All three options are off by default, as in the paper. They change fairseq's update in
places where no model has a say:

- A model marks parameters (:meth:`ModulatorTraining.mark`).
- Every optimizer comes from ``fairseq.optim.build_optimizer``. There, marked parameters get their own parameter
  group. Before each step its learning rate and weight decay are set from those of the others. So neither the choice
  of scheduler nor what a checkpoint or ``--optimizer-overrides`` has set matters.
- fairseq gets subclasses of ``FP16Optimizer`` and ``MemoryEfficientFP16Optimizer``. The first copies the marks to its
  fp32 parameters; both clip gradients that are still scaled.

A checkpoint holds the optimizer's state as if the modulators were not apart, so a resumed run can switch these
options on or off, or change them.
"""

import functools
import math
import weakref
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional, Set, Tuple

import fairseq.optim
import torch
from fairseq.logging import metrics
from fairseq.optim import FairseqOptimizer
from torch import Tensor, nn
from torch.nn import Parameter

MARK = "modulator_training"  # attribute of a modulator's parameter
PART = "part_of_flat_copy"  # attribute of a parameter that is part of a longer one: its FlatPart
PARTS = "modulator_parts"  # attribute of the longer one: its parts

Slices = List[Tuple[int, int]]

# Models in training that loaded a checkpoint; if an optimizer's state is loaded too, ``check_resumed`` checks them.
loaded_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclass
class ModulatorTraining:
    """What a user chose for all modulators of a model.

    Attributes:
        weight_decay: of the modulators; None: that of the other parameters.
        clip_norm: the largest gradient norm of all modulators together, apart from ``--clip-norm``; 0: no limit;
            None: part of ``--clip-norm``, with the other parameters.
        lr_scale: the modulators' learning rate divided by that of the other parameters.
        applied: which of "step" and "clip" an optimizer has applied.
    """

    weight_decay: Optional[float] = None
    clip_norm: Optional[float] = None
    lr_scale: float = 1.0
    applied: Set[str] = field(default_factory=set)

    @classmethod
    def from_options(cls, args: Any) -> "ModulatorTraining":
        """Read ``--modulator-weight-decay``, ``--modulator-clip-norm`` and ``--modulator-lr-scale``.

        Raises:
            ValueError: a number is not finite or negative, or the scale is 0.
        """
        return cls(
            weight_decay=_number(args, "weight_decay", None),
            clip_norm=_number(args, "clip_norm", None),
            lr_scale=_number(args, "lr_scale", 1.0, above_zero=True),
        )

    @property
    def steps_apart(self) -> bool:
        """Whether modulators need a parameter group of their own."""
        return self.weight_decay is not None or self.lr_scale != 1

    @property
    def flags(self) -> List[str]:
        """The options that are not at their defaults."""
        chosen = {
            "--modulator-weight-decay": self.weight_decay is not None,
            "--modulator-clip-norm": self.clip_norm is not None,
            "--modulator-lr-scale": self.lr_scale != 1,
        }
        return [flag for flag, is_chosen in chosen.items() if is_chosen]

    def mark(self, parameters: Iterable[Parameter]) -> None:
        """Mark parameters to be trained this way: modulators, or any few numbers."""
        for parameter in parameters:
            setattr(parameter, MARK, self)

    def check_applied(self) -> None:
        """Raise ValueError if no optimizer has applied a chosen option after an update."""
        wanted = {"step"} if self.steps_apart else set()
        wanted |= {"clip"} if self.clip_norm is not None else set()
        if not wanted <= self.applied:
            raise ValueError(
                f"{', '.join(self.flags)}: the optimizer that training uses does not hold the modulators themselves, "
                "as with --ddp-backend fully_sharded and --zero-sharding os; drop sharding, or these options"
            )


def _number(args: Any, name: str, default: Optional[float], above_zero: bool = False) -> Optional[float]:
    value = getattr(args, f"modulator_{name}", default)
    if value is None and default is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf or (above_zero and number == 0):
        bound = "above 0" if above_zero else "of at least 0"
        raise ValueError(f"--modulator-{name.replace('_', '-')} takes a finite number {bound}; got {value}")
    return number


def install() -> None:
    """Make every optimizer that fairseq builds handle marked parameters; does nothing the second time."""
    build = fairseq.optim.build_optimizer
    if hasattr(build, MARK):
        return

    @functools.wraps(build)
    def build_optimizer(cfg, params, *args, **kwargs) -> FairseqOptimizer:
        optimizer = build(cfg, _with_parts(params), *args, **kwargs)
        for part in _parts_of(optimizer):
            part.optimizer.register_load_state_dict_pre_hook(_check_loaded_models)
        separate_modulators(optimizer)
        return optimizer

    setattr(build_optimizer, MARK, True)
    fairseq.optim.build_optimizer = build_optimizer
    for wrapper in (FP16Optimizer, MemoryEfficientFP16Optimizer):
        setattr(fairseq.optim, wrapper.__name__, wrapper)


def _parts_of(optimizer: FairseqOptimizer) -> Iterable[FairseqOptimizer]:
    """The optimizer, or the parts of ``--optimizer composite``."""
    return getattr(optimizer, "optimizers", {"": optimizer}).values()


def _check_loaded_models(*_: Any) -> None:
    while loaded_models:
        loaded_models.pop().check_resumed()


def separate_modulators(optimizer: FairseqOptimizer) -> None:
    """Apply their :class:`ModulatorTraining` to the modulators among an optimizer's parameters.

    Without any choice it only logs their gradient norm (``modulator_gnorm``).

    Raises:
        ValueError: a weight decay is chosen, and the optimizer has none.
    """
    for part in _parts_of(optimizer):
        modulators = [parameter for parameter in part.params if hasattr(parameter, MARK)]
        if not modulators:
            continue
        training: ModulatorTraining = getattr(modulators[0], MARK)
        layout = SavedLayout(part.optimizer, training)
        if training.steps_apart:
            _separate_steps(part, modulators, training)
        if training.steps_apart or any(hasattr(parameter, PART) for parameter in modulators):
            layout.install()
    _clip_apart(optimizer, list(optimizer.params))


def _separate_steps(optimizer: FairseqOptimizer, modulators: List[Parameter], training: ModulatorTraining) -> None:
    """Put the modulators into the last parameter group; before each step it is set from the first group."""
    if training.weight_decay is not None and "weight_decay" not in optimizer.optimizer.defaults:
        raise ValueError(
            f"--modulator-weight-decay: {type(optimizer).__name__} has no weight decay; drop it, or choose another "
            "--optimizer"
        )
    for group in optimizer.optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if not hasattr(parameter, MARK)]
    optimizer.optimizer.add_param_group({"params": modulators})

    def set_group(torch_optimizer, args, kwargs) -> None:
        others, group = torch_optimizer.param_groups[0], torch_optimizer.param_groups[-1]
        group["lr"] = others["lr"] * training.lr_scale
        if training.weight_decay is not None:
            group["weight_decay"] = training.weight_decay
        training.applied.add("step")

    optimizer.optimizer.register_step_pre_hook(set_group)


# ---------------------------------------------------------------------- the state of an optimizer in a checkpoint


@dataclass
class FlatPart:
    """One part of a flat copy of many parameters: the modulators, or the others.

    Attributes:
        flat: ``FP16Optimizer``'s tensor: first the others, then the modulators.
        slices: the places of this part's numbers, in their order, if ``flat`` were in model order.
    """

    flat: Tensor
    slices: Slices

    def cut(self, value: Any) -> Any:
        """This part's share of a value in the state of the whole."""
        if not torch.is_tensor(value) or value.numel() != self.flat.numel():
            return value
        return torch.cat([value[start:stop] for start, stop in self.slices])

    def join(self, value: Any, whole: Any) -> Any:
        """Put this part's share back; ``whole`` is the result of the part before, or None."""
        lengths = [stop - start for start, stop in self.slices]
        if not torch.is_tensor(value) or value.numel() != sum(lengths):
            return value
        whole = value.new_zeros(self.flat.numel()) if whole is None else whole
        for (start, stop), piece in zip(self.slices, value.split(lengths)):
            whole[start:stop] = piece
        return whole


class SavedLayout:
    """Saves and loads an optimizer's state as if its modulators were not apart.

    Create it before they are separated; install it after.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, training: ModulatorTraining):
        self.optimizer, self.training = optimizer, training
        self.numbers: Dict[Any, int] = {}  # of parameters; a flat copy stands for its parts
        self.groups = []
        for group in optimizer.param_groups:
            wholes = dict.fromkeys(self._whole(parameter) for parameter in group["params"])
            self.groups.append(list(range(len(self.numbers), len(self.numbers) + len(wholes))))
            for whole in wholes:
                self.numbers[whole] = len(self.numbers)

    @staticmethod
    def _whole(parameter: Parameter) -> Tensor:
        return getattr(parameter, PART).flat if hasattr(parameter, PART) else parameter

    def _parameters(self) -> List[Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def install(self) -> None:
        self.optimizer.register_state_dict_post_hook(lambda _, state: self.to_saved(state))
        self.optimizer.register_load_state_dict_pre_hook(lambda _, state: self.from_saved(state))
        self.optimizer.register_load_state_dict_post_hook(lambda _: self.keep_precision())
        # fairseq's own handling of precision assumes that the parameters are in the order of the saved state.
        self.optimizer.disable_mem_eff_fp16_loading_hack = True

    def to_saved(self, state: Dict[str, Any]) -> Dict[str, Any]:
        entries: Dict[int, Dict[str, Any]] = {}
        for number, parameter in enumerate(self._parameters()):
            if number in state["state"]:
                entry, part = state["state"][number], getattr(parameter, PART, None)
                whole = entries.setdefault(self.numbers[self._whole(parameter)], {})
                for name, value in entry.items():
                    whole[name] = value if part is None else part.join(value, whole.get(name))
        groups = [{**group, "params": numbers} for group, numbers in zip(state["param_groups"], self.groups)]
        return {**state, "state": entries, "param_groups": groups}

    def from_saved(self, state: Dict[str, Any]) -> Dict[str, Any]:
        saved = state["param_groups"]
        self.entries: Dict[int, Dict[str, Any]] = state["state"]
        if [len(group["params"]) for group in saved] != list(map(len, self.groups)):
            return state  # version 0.1 wrote the groups as they were; torch reports anything else
        ids = [number for group in saved for number in group["params"]]
        self.entries = {}
        for number, parameter in enumerate(self._parameters()):
            entry = state["state"].get(ids[self.numbers[self._whole(parameter)]])
            if entry is not None:
                part = getattr(parameter, PART, None)
                self.entries[number] = {k: v if part is None else part.cut(v) for k, v in entry.items()}
        of_modulators = dict(saved[0])
        if "lr_old" in of_modulators:  # of nag: the last step's learning rate
            of_modulators["lr_old"] *= self.training.lr_scale
        groups, start = [], 0
        for saved_group, group in zip([*saved, of_modulators], self.optimizer.param_groups):
            stop = start + len(group["params"])
            groups.append({**saved_group, "params": list(range(start, stop))})
            start = stop
        return {**state, "state": self.entries, "param_groups": groups}

    def keep_precision(self) -> None:
        """Undo torch's cast of the state to its parameter's dtype, which loses digits in half precision."""
        for number, parameter in enumerate(self._parameters()):
            if parameter.dtype in (torch.float16, torch.bfloat16) and number in self.entries:
                self.optimizer.state[parameter] = {
                    name: value.to(parameter.device) if torch.is_tensor(value) else value
                    for name, value in self.entries[number].items()
                }
        del self.entries


# ---------------------------------------------------------------------- clipping


def _clip_apart(optimizer: FairseqOptimizer, parameters: List[Parameter]) -> None:
    """Make ``optimizer.clip_grad_norm`` handle the marked parameters among those it steps."""
    if any(hasattr(parameter, MARK) for parameter in parameters):
        optimizer.clip_grad_norm = functools.partial(
            _clip_grad_norm, optimizer, parameters, optimizer.clip_grad_norm
        )


def _clip_grad_norm(
    optimizer: FairseqOptimizer,
    parameters: List[Parameter],
    clip: Callable[..., Tensor],
    max_norm: float,
    aggregate_norm_fn: Optional[Callable[[Tensor], Tensor]] = None,
) -> Tensor:
    """The optimizer's ``clip_grad_norm``; also logs the modulators' gradient norm, and clips it if asked to.

    In half precision gradients are scaled; clipping changes the factor that later multiplies them.

    Returns:
        the norm that fairseq logs as ``gnorm``: of all parameters, or without the modulators if they have their own
        clip. A norm that is not finite is returned too: fairseq stops at it.

    Raises:
        OverflowError: in fp16, a gradient is not finite; fairseq then lowers its scale.
    """
    if hasattr(optimizer, "_sync_fp16_grads_to_fp32"):
        optimizer._sync_fp16_grads_to_fp32()
    modulators = [parameter for parameter in parameters if hasattr(parameter, MARK)]
    training: ModulatorTraining = getattr(modulators[0], MARK)
    kept = [parameter.grad for parameter in modulators]
    gradients = [gradient for gradient in kept if gradient is not None]
    if not gradients:  # layer drop has left out all layers with modulators
        training.applied.add("clip")
        return clip(max_norm, aggregate_norm_fn)
    factor = getattr(optimizer, "_multiply_factor", 1.0)
    norm = torch.stack([gradient.detach().float().norm() for gradient in gradients]).norm() * factor
    if training.clip_norm is None:
        result = clip(max_norm, aggregate_norm_fn)
    else:
        if getattr(optimizer, "scaler", None) is not None:
            optimizer.scaler.check_overflow(norm.item())
        for parameter in modulators:
            parameter.grad = None
        try:
            result = clip(max_norm, aggregate_norm_fn)
        finally:
            for parameter, gradient in zip(modulators, kept):
                parameter.grad = gradient
        own = (training.clip_norm / (norm + 1e-6)).clamp(max=1) if training.clip_norm > 0 else 1.0
        _multiply(optimizer, parameters, own * factor / getattr(optimizer, "_multiply_factor", 1.0))
        training.applied.add("clip")
        result = torch.where(norm.isfinite(), result, norm)
    metrics.log_scalar("modulator_gnorm", norm, priority=410, round=3)
    return result


def _multiply(optimizer: FairseqOptimizer, parameters: List[Parameter], ratio: Any) -> None:
    """Multiply the modulators' gradients by ``ratio``, relative to the others'.

    Scaled fp16 gradients are near the largest fp16 number, so none may grow: there the others shrink instead.
    """
    grows = any(parameter.dtype == torch.float16 for parameter in parameters) and ratio > 1
    if grows:
        optimizer._multiply_factor = optimizer._multiply_factor * float(ratio)
        ratio = 1 / ratio
    for parameter in parameters:
        if parameter.grad is not None and hasattr(parameter, MARK) != grows:
            parameter.grad.mul_(ratio)


# ---------------------------------------------------------------------- half precision


class ClipsApart:
    """Put before fairseq's half-precision wrapper: the wrapper, not the wrapped optimizer, clips modulators."""

    wrapped_name: str  # attribute that holds the wrapped optimizer

    @classmethod
    def build_optimizer(cls, cfg, params, **kwargs) -> FairseqOptimizer:
        optimizer = super().build_optimizer(cfg, params, **kwargs)
        wrapped = getattr(optimizer, cls.wrapped_name)
        vars(wrapped).pop("clip_grad_norm", None)
        _clip_apart(optimizer, list(wrapped.params))
        return optimizer


class FP16Optimizer(ClipsApart, fairseq.optim.FP16Optimizer):
    """fairseq's, whose fp32 copies keep the marks of the originals."""

    wrapped_name = "fp32_optimizer"

    @classmethod
    def build_fp32_params(cls, args, params, flatten=True):
        """As fairseq's; ``flatten`` also moves modulators to the end of ``params``, the list that fairseq keeps."""
        marked = [parameter for parameter in params if hasattr(parameter, MARK)]
        if not marked:
            return super().build_fp32_params(args, params, flatten)
        training: ModulatorTraining = getattr(marked[0], MARK)
        if not flatten:
            copies = super().build_fp32_params(args, params, flatten)
            training.mark(copy for copy, parameter in zip(copies, params) if hasattr(parameter, MARK))
            return copies
        slices: Tuple[Slices, Slices] = ([], [])
        stop = 0
        for parameter in params:
            start, stop = stop, stop + parameter.numel()
            slices[hasattr(parameter, MARK)].append((start, stop))
        params.sort(key=lambda parameter: hasattr(parameter, MARK))
        copies = super().build_fp32_params(args, params, flatten)
        for flat in copies.values():
            setattr(flat, PARTS, _cut(flat, *slices, training))
        return copies


class MemoryEfficientFP16Optimizer(ClipsApart, fairseq.optim.MemoryEfficientFP16Optimizer):
    """fairseq's, which has no copies."""

    wrapped_name = "wrapped_optimizer"


def _cut(flat: Parameter, of_others: Slices, of_modulators: Slices, training: ModulatorTraining) -> List[Parameter]:
    """Split a flat copy into the others and the modulators: parameters that share its memory and its gradient's."""
    parts = []
    stop = 0
    for slices in filter(None, (of_others, of_modulators)):
        start, stop = stop, stop + sum(b - a for a, b in slices)
        part = Parameter(flat.data[start:stop])
        part.grad = flat.grad[start:stop]
        setattr(part, PART, FlatPart(flat, slices))
        parts.append(part)
    training.mark(parts[-1:])
    return parts


def _with_parts(params: Iterable[Any]) -> List[Any]:
    """The parameters for ``fairseq.optim.build_optimizer``, with each flat copy replaced by its parts."""
    params = list(params)
    if not all(isinstance(copies, dict) for copies in params):
        return params
    return [part for copies in params for flat in copies.values() for part in getattr(flat, PARTS, [flat])]
