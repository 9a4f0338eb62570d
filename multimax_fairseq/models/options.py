"""The options of mappings: those of the classes in :mod:`..mappings`, and what a model does with them."""

from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from difflib import get_close_matches
from typing import Any, Callable, Dict, Iterator, Sequence, Tuple, Union

import torch
from fairseq.dataclass import FairseqDataclass
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from ..mappings import BUILT_IN, MAPPINGS, SPARSE, arguments_of, build_mapping, parse_options
from ..modules.scale import SCALES

SITES = ("encoder", "decoder", "cross")
OUTPUT_MAPPINGS = ("softmax", "multimax", *SPARSE)
LOG_MODULATORS = ("site", "module", "none")


class OptionError(CompactHydraException, ValueError):
    """A ValueError that ``fairseq-hydra-train`` shows without fifty lines of traceback."""


@contextmanager
def option_errors() -> Iterator[None]:
    """A decorator that turns each ValueError into an :class:`OptionError`."""
    try:
        yield
    except ValueError as error:
        raise OptionError(str(error)) from error


# The options of the package's own mappings, as their classes declare them.
OWN_OPTIONS = {name: getattr(MAPPINGS[name], "options", {}) for name in MAPPINGS}


def option(default: Any, text: str) -> Any:
    """A dataclass's field, of which fairseq makes a flag with this help."""
    return field(default=default, metadata={"help": text})


def _own_fields() -> Iterator[Tuple[str, type, Any]]:
    """The fields of a dataclass for ``OWN_OPTIONS``; an argument that also takes words is a string."""
    for mapping, options in OWN_OPTIONS.items():
        for name, (argument, text) in options.items():
            known = arguments_of(MAPPINGS[mapping])[argument]
            kind = known.annotation if known.annotation in (int, float, str) else str
            yield name, kind, option(kind(known.default), text)


@dataclass
class MappingOptions(make_dataclass("OwnOptions", _own_fields(), bases=(FairseqDataclass,))):
    """Each field is a field of a Hydra config and, with dashes, an option of ``fairseq-train``."""

    attention_mapping: str = option(
        "multimax", f"mapping of attention scores to probabilities: {', '.join(MAPPINGS)}"
    )
    mapping_options: str = option(
        "", "of a mapping added by @register_mapping: arguments of its class, such as k=8,p=0.5"
    )
    attention_mapping_sites: str = option(
        ",".join(SITES),
        f"comma-separated attention modules that use --attention-mapping ({', '.join(SITES)}); the others use "
        "softmax",
    )
    attention_scale: str = option(
        "none",
        "what scores are multiplied with at --attention-mapping-sites, whatever the mapping: none, learned (one "
        "number a module), or log-length (a number a head, times log of the visible keys)",
    )
    output_mapping: str = option(
        "softmax",
        f"mapping of logits to the vocabulary: {', '.join(OUTPUT_MAPPINGS)}; the last three are trained with "
        "--criterion entmax_loss",
    )
    log_modulators: str = option("site", f"thresholds and gains in the log, of each of: {', '.join(LOG_MODULATORS)}")


MAPPING_OPTIONS = tuple(option for option in fields(MappingOptions) if not option.name.startswith("_"))
DEFAULTS = {option.name: option.default for option in MAPPING_OPTIONS}

# Options of version 0.2.0 that are gone, and what a checkpoint says where they were not used.
GONE = {"modulator_weight_decay": None, "modulator_clip_norm": None, "multimax_backend": "auto"}


def with_defaults(architecture: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap fairseq's architecture function so that it also sets the mapping options, which a checkpoint then names.

    A config without a dataclass, whose fields fairseq does not check, raises ValueError where one is misspelt.
    """

    @option_errors()
    def architecture_with_mappings(args: Any) -> None:
        namespace = args
        if OmegaConf.is_config(args):
            # In omegaconf 2.0 (fairseq 0.12.2) a missing field reads as None, so work on those that exist.
            given = OmegaConf.to_container(args)
            for name in given.keys() - DEFAULTS.keys():
                for option in get_close_matches(name.replace("-", "_"), DEFAULTS, n=1, cutoff=0.75):
                    raise ValueError(f"model.{name}: there is no such field; the nearest one is model.{option}")
            namespace = Namespace(**{name: value for name, value in given.items() if value is not None})
            namespace.base_layers = getattr(namespace, "base_layers", 0)  # its trainer asks whether this is > 0
        vars(namespace).update(vars(completed(namespace)))
        architecture(namespace)
        for name, value in vars(namespace).items():
            setattr(args, name, value)

    return architecture_with_mappings


def check_options(args: Any) -> None:
    """Check the user's choices; draws no random numbers that anybody else would see.

    Args:
        args: fairseq's namespace or config of the model, with the attributes of :class:`MappingOptions`; a missing
            one has its default.

    Raises:
        ValueError: a choice does not exist, or this model cannot honour it; says what to do instead.
    """
    options = completed(args)
    for flag, names, choices in (
        ("attention-mapping", [options.attention_mapping], MAPPINGS),
        ("attention-mapping-sites", _split(options.attention_mapping_sites), SITES),
        ("attention-scale", [options.attention_scale], SCALES),
        ("output-mapping", [options.output_mapping], OUTPUT_MAPPINGS),
        ("log-modulators", [options.log_modulators], LOG_MODULATORS),
    ):
        for name in names:
            if name not in choices:
                raise ValueError(f"--{flag}: there is no {name!r}; choose from: {', '.join(choices)}")
    if options.output_mapping != "softmax" and getattr(args, "adaptive_softmax_cutoff", None) is not None:
        raise ValueError(
            f"--output-mapping {options.output_mapping}: an adaptive softmax never has the scores of all words; "
            "drop --adaptive-softmax-cutoff (and --criterion adaptive_loss; take another --arch if it has one "
            "built in), or use --output-mapping softmax"
        )
    mapped_sites(args)  # for its error
    if options.modulator_lr_scale != 1 and "multimax" not in (options.attention_mapping, options.output_mapping):
        raise ValueError(
            f"--modulator-lr-scale {options.modulator_lr_scale}: this model has no modulators; use "
            "--attention-mapping multimax or --output-mapping multimax, or drop it"
        )
    parse_options(options.attention_mapping, options.mapping_options)
    with torch.random.fork_rng(devices=[]):
        for name in {*BUILT_IN, options.attention_mapping}:  # a wrong option is an error even if it is not used
            build_mapping(name, **chosen_arguments(name, options))


def describe(args: Any) -> Dict[str, str]:
    """The mappings that a model's weights are trained for, in words, by flag.

    Args:
        args: any model's namespace or config, as a checkpoint has it; without :class:`MappingOptions` it is softmax.
    """
    if getattr(args, "attention_mapping", None) is None:
        args = Namespace(attention_mapping="softmax")
    options = completed(args)

    def words(name: str) -> str:
        if name not in BUILT_IN:
            return f"{name} {options.mapping_options}".strip()
        may_change = getattr(MAPPINGS[name], "may_change", ())
        fixed = {argument: _split(value) for argument, value in chosen_arguments(name, options).items()
                 if argument not in may_change}  # fmt: skip
        return " ".join([name, *(f"{argument}={','.join(sorted(value))}" for argument, value in fixed.items())])

    sites = sorted(mapped_sites(args))
    return {
        "--attention-mapping": f"{words(options.attention_mapping)} in {', '.join(sites)}" if sites else "softmax",
        "--attention-scale": options.attention_scale,
        "--output-mapping": words(options.output_mapping),
    }


def mapped_sites(args: Any) -> Tuple[str, ...]:
    """The sites at which the model that has these options does not have fairseq's own attention.

    Raises:
        ValueError: the model has none of the sites that were chosen.
    """
    options, available = completed(args), SITES
    if (options.attention_mapping, options.attention_scale) == ("softmax", "none"):
        return ()
    if getattr(args, "encoder_layers", None) is None:
        available = ("decoder",)
    elif getattr(args, "no_cross_attention", False):
        available = SITES[:2]
    chosen = _split(options.attention_mapping_sites)
    sites = tuple(site for site in available if site in chosen)
    if not sites:
        raise ValueError(
            f"--attention-mapping-sites {','.join(chosen)}: this model has none of these; "
            f"choose from: {', '.join(available)}"
        )
    return sites


def completed(args: Any) -> Namespace:
    """The mapping options of ``args``; those that it has not have their defaults."""
    return Namespace(**{name: getattr(args, name, default) for name, default in DEFAULTS.items()})


def chosen_arguments(name: str, options: Any) -> Dict[str, Any]:
    """The arguments that ``options`` give the mapping of a name."""
    if name not in BUILT_IN:
        return parse_options(name, options.mapping_options)
    return {argument: getattr(options, option) for option, (argument, _) in OWN_OPTIONS[name].items()}


def _split(names: Union[str, Sequence[str]]) -> Sequence[str]:
    """The parts of a comma-separated list; from a config file: of a list."""
    parts = str(names).split(",") if isinstance(names, (str, int, float)) else names
    return [str(part).strip() for part in parts]
