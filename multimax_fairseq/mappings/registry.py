"""The table of mappings: names, classes, and classes of one's own."""

import inspect
from typing import Any, Callable, Dict, Type, TypeVar

from torch import nn

from .exponential import EvSoftmax, Softmax
from .modulator import MultiMax
from .sparse import Entmax, Entmax15, Sparsemax

MAPPINGS = {
    "softmax": Softmax,
    "multimax": MultiMax,
    "sparsemax": Sparsemax,
    "entmax15": Entmax15,
    "entmax": Entmax,
    "evsoftmax": EvSoftmax,
}


BUILT_IN = frozenset(MAPPINGS)  # these may have command-line options of their own: the ``options`` of their classes
SPARSE = ("sparsemax", "entmax15", "entmax")  # these give a probability of exactly 0 in training, too
TYPES = (int, float, str, bool)  # of the arguments of a registered class

Module = TypeVar("Module", bound=Type[nn.Module])


def register_mapping(name: str) -> Callable[[Module], Module]:
    """Class decorator: registers a module of yours as a mapping with a name.

    The module gets scores, (…, width), and returns probabilities over the last dimension, of the same shape and
    dtype; absent scores come as ``ABSENT``, and get probability 0 whatever it returns. Its constructor takes ``int``,
    ``float``, ``str`` or ``bool`` arguments, annotated and with a default. An argument ``num_heads`` gets the number
    of heads, for mappings with parameters per head: scores of attention are (bsz, num_heads, tgt_len, src_len).

    ``--attention-mapping name --mapping-options "argument=value,…"`` then chooses it, and a checkpoint remembers it.
    To load the checkpoint, import the file with the class first, as ``--user-dir`` does.

    Raises:
        ValueError: the name is taken by another class, or is not an identifier.
        TypeError: not a subclass of ``nn.Module``, or an argument without a default or not of these types.
    """

    def register(module: Module) -> Module:
        if not name.isidentifier():
            raise ValueError(f"a mapping's name has letters, digits and _ only; got {name!r}")
        there = MAPPINGS.get(name)
        if there is not None and (there.__module__, there.__qualname__) != (module.__module__, module.__qualname__):
            raise ValueError(f"there is a mapping {name!r} already ({there.__module__}.{there.__qualname__})")
        if not (isinstance(module, type) and issubclass(module, nn.Module)):
            raise TypeError(f"mapping {name!r}: register a class of nn.Module, not {module!r}")
        for argument in arguments_of(module).values():
            if argument.name != "num_heads" and (
                argument.annotation not in TYPES or argument.default is argument.empty
            ):
                raise TypeError(
                    f"mapping {name!r}: its argument {argument.name!r} needs a default, and one of the types "
                    f"{', '.join(kind.__name__ for kind in TYPES)}"
                )
        MAPPINGS[name] = module
        return module

    return register


def arguments_of(module: Type[nn.Module]) -> Dict[str, inspect.Parameter]:
    """The arguments of a mapping's class, by name; none where it has no constructor of its own."""
    arguments = inspect.signature(module, eval_str=True).parameters
    return {name: a for name, a in arguments.items() if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)}


def parse_options(name: str, text: str) -> Dict[str, Any]:
    """The arguments of a registered mapping from a command line: ``k=8,temperature=0.5``.

    Raises:
        ValueError: there is no such mapping, it has no such argument, or a value is not of its type.
    """
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    check_name(name)
    if name in BUILT_IN and pairs:
        raise ValueError(
            f"{name} has options of its own (see python -m multimax_fairseq --help), and no --mapping-options; "
            f"got {text!r}"
        )
    known = {} if name in BUILT_IN else arguments_of(MAPPINGS[name])
    known.pop("num_heads", None)
    options = {}
    for key, _, value in pairs:
        key, value = key.strip(), value.strip()
        if key not in known:
            raise ValueError(f"--mapping-options: {name} has no {key!r}; it takes: {', '.join(known) or 'none'}")
        kind = known[key].annotation
        try:
            options[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            message = f"--mapping-options: {key} of {name} is of type {kind.__name__}; got {value!r}"
            raise ValueError(message) from None
    return options


def check_name(name: str) -> None:
    """Raises ValueError where no mapping has this name."""
    if name not in MAPPINGS:
        raise ValueError(f"there is no mapping {name!r}; choose from: {', '.join(MAPPINGS)}")


def build_mapping(name: str, **options: Any) -> nn.Module:
    """The module of a mapping, over the last dimension of scores.

    Args:
        name: a key of ``MAPPINGS``.
        options: arguments of the module's class: ``order``, ``init``, ``terms`` of ``multimax``; ``alpha``,
            ``num_heads`` of ``entmax``.

    Raises:
        ValueError: no mapping has this name, or an option's value is wrong.
        TypeError: the mapping has no such option.
    """
    check_name(name)
    known = arguments_of(MAPPINGS[name])
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it takes: {', '.join(known) or 'none'}")
    return MAPPINGS[name](**options)
