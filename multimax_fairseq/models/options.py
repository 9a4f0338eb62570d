"""What a user can choose about mappings: declared once, for translation and language models."""

from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Sequence, Tuple

from fairseq.dataclass import FairseqDataclass

from ..mappings import MAPPINGS, build_mapping
from ..mappings.multimax import TERMS

SITES = ("encoder", "decoder", "cross")
OUTPUT_MAPPINGS = ("softmax", "multimax")

Mapping = Tuple[str, Dict[str, Any]]  # the arguments of build_mapping
SOFTMAX: Mapping = ("softmax", {})


@dataclass
class MappingOptions(FairseqDataclass):
    """Each is a field of a Hydra config and, written with dashes, an option of ``fairseq-train``."""

    attention_mapping: str = field(
        default="multimax",
        metadata={"help": f"mapping of attention scores to probabilities: {', '.join(MAPPINGS)}"},
    )
    attention_mapping_sites: str = field(
        default=",".join(SITES),
        metadata={
            "help": "comma-separated attention modules that use --attention-mapping "
            f"({', '.join(SITES)}); the others use softmax"
        },
    )
    output_mapping: str = field(
        default="softmax",
        metadata={"help": f"mapping of logits to the vocabulary: {', '.join(OUTPUT_MAPPINGS)}"},
    )
    multimax_order: int = field(default=2, metadata={"help": "order N of MultiMax's modulator: 1 or 2"})
    multimax_terms: str = field(
        default=",".join(TERMS),
        metadata={"help": f"comma-separated sides of the modulator that are learned: {', '.join(TERMS)}"},
    )
    multimax_init: str = field(
        default="normal",
        metadata={
            "help": "start of the modulator: normal (std 0.02, as in the paper), or identity (softmax at step 0)"
        },
    )
    entmax_alpha: str = field(
        default="1.5", metadata={"help": "α of entmax: a number in (1, 2], or learned (one a head)"}
    )


MAPPING_OPTIONS = tuple(option for option in fields(MappingOptions) if not option.name.startswith("_"))

# Options of fairseq's own architectures that some mappings cannot be combined with.
ARCHITECTURE_OPTIONS = ("encoder_xformers_att_config", "decoder_xformers_att_config", "adaptive_softmax_cutoff")


def with_defaults(architecture: Callable[[Any], None]) -> Callable[[Any], None]:
    """An architecture function that also sets the options of mappings, so that a checkpoint names all of them."""

    def architecture_with_mappings(args: Any) -> None:
        for option in MAPPING_OPTIONS:
            setattr(args, option.name, getattr(args, option.name, option.default))
        architecture(args)

    return architecture_with_mappings


@dataclass(frozen=True)
class MappingChoice:
    """:class:`MappingOptions`, checked, in the form that the modules ask for.

    Attributes:
        attention: the mapping of the attention modules at ``sites``.
        sites: of ``SITES``; softmax everywhere else.
        output: the mapping of the output layer.
    """

    attention: Mapping
    sites: Tuple[str, ...]
    output: Mapping

    @classmethod
    def from_options(cls, args: Any, available_sites: Sequence[str] = SITES) -> "MappingChoice":
        """Check what the user chose, and build each mapping once so that its own checks speak up too.

        Args:
            args: has the attributes of :class:`MappingOptions` (one that is missing has its default) among those
                of its model, as fairseq's namespaces and configs do.
            available_sites: the sites that the model has.

        Raises:
            ValueError: a choice that does not exist or that this model cannot honour, with what to do instead.
        """
        options = Namespace(**{name: getattr(args, name, None) for name in ARCHITECTURE_OPTIONS})
        for option in MAPPING_OPTIONS:
            setattr(options, option.name, getattr(args, option.name, option.default))

        sites = _names("attention-mapping-sites", options.attention_mapping_sites, SITES)
        _check_name("attention-mapping", options.attention_mapping, tuple(MAPPINGS))
        attention = _mapping(options.attention_mapping, options)
        if attention != SOFTMAX:
            _check_attention(options, sites, available_sites)
        _check_output(options)
        output = _mapping(options.output_mapping, options)
        for name, mapping_options in (attention, output):
            build_mapping(name, **mapping_options)
        return cls(attention, sites, output)

    def attention_at(self, site: str) -> Mapping:
        """The mapping of the attention modules at ``site``."""
        return self.attention if site in self.sites else SOFTMAX


def _mapping(name: str, options: Namespace) -> Mapping:
    if name == "multimax":
        terms = _names("multimax-terms", options.multimax_terms, TERMS)
        return name, {"order": options.multimax_order, "init": options.multimax_init, "terms": terms}
    return name, {"alpha": options.entmax_alpha} if name == "entmax" else {}


def _names(flag: str, text: str, choices: Sequence[str]) -> Tuple[str, ...]:
    """The names in a comma-separated list, each one of ``choices``."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        _check_name(flag, name, choices)
    return names


def _check_name(flag: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise ValueError(f"--{flag}: there is no {name!r}; choose from: {', '.join(choices)}")


def _check_attention(options: Namespace, sites: Sequence[str], available_sites: Sequence[str]) -> None:
    if not set(sites) & set(available_sites):
        raise ValueError(
            f"--attention-mapping-sites {','.join(sites)}: this model has none of these; "
            f"choose from: {', '.join(available_sites)}"
        )
    for flag in ("encoder_xformers_att_config", "decoder_xformers_att_config"):
        if getattr(options, flag) is not None:
            raise ValueError(
                f"--{flag.replace('_', '-')}: xFormers has softmax built in; drop this flag, or use "
                "--attention-mapping softmax"
            )


def _check_output(options: Namespace) -> None:
    if options.output_mapping in MAPPINGS and options.output_mapping not in OUTPUT_MAPPINGS:
        raise ValueError(
            f"--output-mapping {options.output_mapping}: a sparse mapping gives most words probability 0, which "
            f"cross-entropy cannot train; choose from: {', '.join(OUTPUT_MAPPINGS)}"
        )
    _check_name("output-mapping", options.output_mapping, OUTPUT_MAPPINGS)
    if options.output_mapping != "softmax" and options.adaptive_softmax_cutoff is not None:
        raise ValueError(
            f"--output-mapping {options.output_mapping}: an adaptive softmax never has the scores of all words; "
            "drop --adaptive-softmax-cutoff (and --criterion adaptive_loss), or use --output-mapping softmax"
        )
