"""What a user can choose about mappings: declared once, for translation and language models."""

from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

from fairseq.dataclass import FairseqDataclass
from omegaconf import OmegaConf

from ..kernels.backend import set_backend
from ..mappings import MAPPINGS, build_mapping
from ..mappings.multimax import TERMS

SITES = ("encoder", "decoder", "cross")
OUTPUT_MAPPINGS = ("softmax", "multimax")
LOG_MODULATORS = ("module", "site", "none")

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
    multimax_backend: str = field(
        default="auto",
        metadata={
            "help": "how MultiMax is computed in this run: auto (compiled, where that is possible), compiled, or "
            "eager (plain PyTorch). No checkpoint restores it; fairseq-generate and fairseq-eval-lm take it as "
            "--model-overrides \"{'multimax_backend': 'eager'}\". The environment variable MULTIMAX_BACKEND "
            "overrides it"
        },
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
        default="module",
        metadata={"help": f"thresholds and gains in the log, of each of: {', '.join(LOG_MODULATORS)}"},
    )


MAPPING_OPTIONS = tuple(option for option in fields(MappingOptions) if not option.name.startswith("_"))

# fairseq's own options for xFormers, by the site whose softmax they replace.
XFORMERS_OPTIONS = {
    "encoder": "encoder_xformers_att_config",
    "decoder": "decoder_xformers_att_config",
    "cross": "encoder_xformers_att_config",
}


def with_defaults(architecture: Callable[[Any], None]) -> Callable[[Any], None]:
    """An architecture function that also sets the options of mappings, so that a checkpoint names all of them."""

    def architecture_with_mappings(args: Any) -> None:
        namespace = args
        if OmegaConf.is_config(args):
            # In omegaconf 2.0 (fairseq 0.12.2) what a config lacks looks like None: work on what it has.
            given = OmegaConf.to_container(args).items()
            namespace = Namespace(**{name: value for name, value in given if value is not None})
            namespace.base_layers = getattr(namespace, "base_layers", 0)  # its trainer asks whether this is > 0
        for option in MAPPING_OPTIONS:
            setattr(namespace, option.name, getattr(namespace, option.name, option.default))
        architecture(namespace)
        for name, value in vars(namespace).items():
            setattr(args, name, value)

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
        """Check what the user chose; a backend, which is the process's and not the model's, is set here.

        Args:
            args: has the attributes of :class:`MappingOptions` (one that is missing has its default) among those
                of its model, as fairseq's namespaces and configs do.
            available_sites: the sites that the model has.

        Raises:
            ValueError: a choice that does not exist or that this model cannot honour, with what to do instead.
        """
        options = Namespace(**{o.name: getattr(args, o.name, o.default) for o in MAPPING_OPTIONS})
        _check_name("attention-mapping", options.attention_mapping, tuple(MAPPINGS))
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
        for name, wanted in arguments.items():  # chosen or not, what is wrong is an error
            build_mapping(name, **wanted)
        if options.attention_mapping != "softmax":
            _check_attention(args, sites, available_sites)
        _check_output(args, options.output_mapping)
        if options.multimax_backend != "auto":  # auto, as of every checkpoint, leaves what this run has chosen
            set_backend(options.multimax_backend)
        return cls(
            attention=(options.attention_mapping, arguments.get(options.attention_mapping, {})),
            sites=sites,
            output=(options.output_mapping, arguments.get(options.output_mapping, {})),
        )

    def attention_at(self, site: str) -> Mapping:
        """The mapping of the attention modules at ``site``."""
        return self.attention if site in self.sites else SOFTMAX


def _names(flag: str, names: Union[str, Sequence[str]], choices: Sequence[str]) -> Tuple[str, ...]:
    """The names in a comma-separated list (or, from a config file, a list), each one of ``choices``."""
    names = tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))
    for name in names:
        _check_name(flag, name, choices)
    return names


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
    if mapping in MAPPINGS and mapping not in OUTPUT_MAPPINGS:
        raise ValueError(
            f"--output-mapping {mapping}: a sparse mapping gives most words probability 0, which cross-entropy "
            f"cannot train; choose from: {', '.join(OUTPUT_MAPPINGS)}"
        )
    _check_name("output-mapping", mapping, OUTPUT_MAPPINGS)
    if mapping != "softmax" and getattr(args, "adaptive_softmax_cutoff", None) is not None:
        raise ValueError(
            f"--output-mapping {mapping}: an adaptive softmax never has the scores of all words; drop "
            "--adaptive-softmax-cutoff (and --criterion adaptive_loss), or use --output-mapping softmax"
        )
