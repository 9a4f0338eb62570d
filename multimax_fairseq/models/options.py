"""The options of mappings, declared once for translation and language models."""

from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Set, Tuple, Union

from fairseq.dataclass import FairseqDataclass
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf
from torch import nn

from ..kernels.backend import backend, set_backend
from ..mappings import BUILT_IN, MAPPINGS, build_mapping, parse_options
from ..mappings.multimax import TERMS
from ..modules.scale import SCALES
from ..modules.transformer import SPARSE

SITES = ("encoder", "decoder", "cross")
OUTPUT_MAPPINGS = ("softmax", "multimax", *SPARSE)
LOG_MODULATORS = ("site", "module", "none")

Mapping = Tuple[str, Dict[str, Any]]  # the arguments of build_mapping
SOFTMAX: Mapping = ("softmax", {})


class OptionError(CompactHydraException, ValueError):
    """A ValueError that ``fairseq-hydra-train`` shows without fifty lines of traceback."""


@contextmanager
def option_errors() -> Iterator[None]:
    """A decorator that turns each ValueError into an :class:`OptionError`."""
    try:
        yield
    except ValueError as error:
        raise OptionError(str(error)) from error


@dataclass
class MappingOptions(FairseqDataclass):
    """Each field is a field of a Hydra config and, with dashes, an option of ``fairseq-train``."""

    attention_mapping: str = field(
        default="multimax",
        metadata={"help": f"mapping of attention scores to probabilities: {', '.join(MAPPINGS)}"},
    )
    mapping_options: str = field(
        default="",
        metadata={"help": "of a mapping added by @register_mapping: arguments of its class, such as k=8,p=0.5"},
    )
    attention_mapping_sites: str = field(
        default=",".join(SITES),
        metadata={
            "help": "comma-separated attention modules that use --attention-mapping "
            f"({', '.join(SITES)}); the others use softmax"
        },
    )
    attention_scale: str = field(
        default="none",
        metadata={
            "help": "what scores are multiplied with at --attention-mapping-sites, whatever the mapping: none, "
            "learned (one number a module), or log-length (a number a head, times log of the visible keys)"
        },
    )
    output_mapping: str = field(
        default="softmax",
        metadata={
            "help": f"mapping of logits to the vocabulary: {', '.join(OUTPUT_MAPPINGS)}; the last three are trained "
            "with --criterion entmax_loss"
        },
    )
    multimax_order: int = field(default=2, metadata={"help": "order N of MultiMax's modulator: 1 or 2"})
    multimax_terms: str = field(
        default=",".join(TERMS),
        metadata={"help": f"comma-separated sides of the modulator that are learned: {', '.join(TERMS)}"},
    )
    multimax_init: str = field(
        default="normal",
        metadata={
            "help": "start of the modulator: normal (std 0.02, as in the paper), identity (softmax at step 0), or "
            "shaped (steeper below, flatter above)"
        },
    )
    entmax_alpha: str = field(
        default="1.5",
        metadata={"help": "α of entmax: a number in (1, 2], or learned (one a head, one for the vocabulary)"},
    )
    multimax_backend: str = field(
        default="auto",
        metadata={
            "help": "how MultiMax is computed in this run: auto (compiled, where that is possible), compiled, or "
            "eager (plain PyTorch). No checkpoint restores it; fairseq-generate and fairseq-eval-lm take it as "
            "--model-overrides \"{'multimax_backend': 'eager'}\". The environment variable MULTIMAX_BACKEND "
            "overrides it"
        },
    )
    modulator_lr_scale: float = field(
        default=1.0, metadata={"help": "learning rate of the modulators, times that of the other parameters"}
    )
    modulator_weight_decay: Optional[float] = field(
        default=None, metadata={"help": "weight decay of the modulators (default: that of the other parameters)"}
    )
    modulator_clip_norm: Optional[float] = field(
        default=None,
        metadata={
            "help": "clip the gradient of the modulators to this norm, all of them together and apart from "
            "--clip-norm (0: no limit; default: inside --clip-norm)"
        },
    )
    log_modulators: str = field(
        default="site",
        metadata={"help": f"thresholds and gains in the log, of each of: {', '.join(LOG_MODULATORS)}"},
    )


MAPPING_OPTIONS = tuple(option for option in fields(MappingOptions) if not option.name.startswith("_"))

# fairseq's own options for xFormers, by the site whose softmax they replace.
XFORMERS_OPTIONS = {
    "encoder": "encoder_xformers_att_config",
    "decoder": "decoder_xformers_att_config",
    "cross": "encoder_xformers_att_config",
}


def with_defaults(
    architecture: Callable[[Any], None], known_fields: Optional[Callable[[], Set[str]]] = None
) -> Callable[[Any], None]:
    """Wrap an architecture function so that it also sets the mapping options: a checkpoint then names all of them.

    Args:
        architecture: fairseq's.
        known_fields: returns the fields of the model's config, for a model without a dataclass: fairseq does not
            check its fields, so other fields raise ValueError here.
    """

    @option_errors()
    def architecture_with_mappings(args: Any) -> None:
        namespace = args
        if OmegaConf.is_config(args):
            # In omegaconf 2.0 (fairseq 0.12.2) a missing field reads as None, so work on those that exist.
            given = OmegaConf.to_container(args)
            if known_fields is not None and not {option.name for option in MAPPING_OPTIONS} <= given.keys():
                check_fields(given, known_fields() | vars(_defaults_of(architecture)).keys())  # not a checkpoint's
            namespace = Namespace(**{name: value for name, value in given.items() if value is not None})
            namespace.base_layers = getattr(namespace, "base_layers", 0)  # its trainer asks whether this is > 0
        for option in MAPPING_OPTIONS:
            setattr(namespace, option.name, getattr(namespace, option.name, option.default))
        architecture(namespace)
        for name, value in vars(namespace).items():
            setattr(args, name, value)

    return architecture_with_mappings


def _defaults_of(architecture: Callable[[Any], None]) -> Namespace:
    namespace = Namespace()
    architecture(namespace)
    return namespace


def check_fields(given: Dict[str, Any], known: Set[str]) -> None:
    """Raise ValueError if a config has a field that is not ``known``, or a mapping option that is null."""
    for name in given:
        if name not in known:
            nearest = get_close_matches(name.replace("-", "_"), sorted(known), n=1, cutoff=0)
            raise ValueError(f"model.{name}: the model has no such field; the nearest one is model.{nearest[0]}")
    for option in MAPPING_OPTIONS:
        if option.name in given and given[option.name] is None and option.default is not None:
            raise ValueError(f"model.{option.name}: null is no value; leave it out for the default, {option.default}")


@dataclass(frozen=True)
class MappingChoice:
    """:class:`MappingOptions`, checked, in the form that the modules use.

    Attributes:
        attention: the mapping of the attention modules at ``sites``.
        sites: some of ``SITES``; all others have softmax.
        output: the mapping of the output layer.
        scale: the ``--attention-scale`` at ``sites``.
    """

    attention: Mapping
    sites: Tuple[str, ...]
    output: Mapping
    scale: str = "none"

    @classmethod
    def from_options(cls, args: Any, available_sites: Sequence[str] = SITES) -> "MappingChoice":
        """Check the user's choices. Also sets the backend, which belongs to the process, not to the model.

        Args:
            args: fairseq's namespace or config of the model, with the attributes of :class:`MappingOptions`; a
                missing one has its default.
            available_sites: the sites that the model has.

        Raises:
            ValueError: a choice does not exist, or this model cannot honour it; says what to do instead.
        """
        options = Namespace(**{o.name: getattr(args, o.name, o.default) for o in MAPPING_OPTIONS})
        _check_name("attention-mapping", options.attention_mapping, tuple(MAPPINGS))
        _check_name("attention-scale", options.attention_scale, tuple(SCALES))
        _check_name("log-modulators", options.log_modulators, LOG_MODULATORS)
        sites = _names("attention-mapping-sites", options.attention_mapping_sites, SITES)
        arguments = {
            "multimax": {
                "order": options.multimax_order,
                "init": options.multimax_init,
                "terms": _names("multimax-terms", options.multimax_terms, TERMS),
            },
            "entmax": {"alpha": options.entmax_alpha},
        }
        own = parse_options(options.attention_mapping, options.mapping_options)
        if options.attention_mapping not in BUILT_IN:
            arguments[options.attention_mapping] = own
        for name, wanted in arguments.items():  # a wrong option is an error even if it is not used
            build_mapping(name, **wanted)
        if (options.attention_mapping, options.attention_scale) != ("softmax", "none"):
            _check_attention(args, sites, available_sites)
        _check_output(args, options.output_mapping)
        if options.entmax_alpha != "learned":
            arguments["entmax"]["alpha"] = float(options.entmax_alpha)
        if options.multimax_backend != "auto":  # auto, as in every checkpoint, keeps this run's choice
            set_backend(options.multimax_backend)
        backend()  # or an error, if the environment names none
        return cls(
            attention=(options.attention_mapping, arguments.get(options.attention_mapping, {})),
            sites=tuple(site for site in sites if site in available_sites),
            scale=options.attention_scale,
            output=(options.output_mapping, arguments.get(options.output_mapping, {})),
        )

    def is_stock_at(self, site: str) -> bool:
        """Whether the attention modules at ``site`` stay fairseq's own."""
        return self.attention_at(site) == SOFTMAX and self.scale_at(site) == "none"

    def build_output(self) -> Optional[nn.Module]:
        """The module of the output layer's mapping; None for softmax."""
        return None if self.output == SOFTMAX else build_mapping(self.output[0], **self.output[1])

    def describe(self) -> Dict[str, str]:
        """The mappings that the weights are trained for, in words, by flag."""

        def words(mapping: Mapping) -> str:
            name, options = mapping
            return " ".join([name, *(f"{key}={value}" for key, value in sorted(options.items()) if key != "init")])

        sites = "" if all(map(self.is_stock_at, SITES)) else f" in {', '.join(sorted(self.sites))}"
        return {
            "--attention-mapping": words(self.attention) + sites,
            "--attention-scale": self.scale,
            "--output-mapping": words(self.output),
        }

    def attention_at(self, site: str) -> Mapping:
        """The mapping of the attention modules at ``site``."""
        return self.attention if site in self.sites else SOFTMAX

    def scale_at(self, site: str) -> str:
        """The ``--attention-scale`` of the attention modules at ``site``."""
        return self.scale if site in self.sites else "none"


def _names(flag: str, names: Union[str, Sequence[str]], choices: Sequence[str]) -> Tuple[str, ...]:
    """The names in a comma-separated list (from a config file: a list), in the order of ``choices``."""
    names = tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))
    for name in names:
        _check_name(flag, name, choices)
    return tuple(name for name in choices if name in names)


def _check_name(flag: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise ValueError(f"--{flag}: there is no {name!r}; choose from: {', '.join(choices)}")


def _check_attention(args: Any, sites: Sequence[str], available_sites: Sequence[str]) -> None:
    if not set(sites) & set(available_sites):
        raise ValueError(
            f"--attention-mapping-sites {','.join(sites)}: this model has none of these; "
            f"choose from: {', '.join(available_sites)}"
        )
    for site in sites:
        if getattr(args, XFORMERS_OPTIONS[site], None) is not None:
            raise ValueError(
                f"--{XFORMERS_OPTIONS[site].replace('_', '-')}: xFormers has softmax built in; drop this flag, or "
                f"leave {site} out of --attention-mapping-sites"
            )


def _check_output(args: Any, mapping: str) -> None:
    _check_name("output-mapping", mapping, OUTPUT_MAPPINGS)
    if mapping != "softmax" and getattr(args, "adaptive_softmax_cutoff", None) is not None:
        raise ValueError(
            f"--output-mapping {mapping}: an adaptive softmax never has the scores of all words; drop "
            "--adaptive-softmax-cutoff (and --criterion adaptive_loss; take another --arch if it has one built in), "
            "or use --output-mapping softmax"
        )
