"""The Transformer for translation, with MultiMax or another mapping in each attention module."""

from argparse import ArgumentParser, Namespace
from typing import Set

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.transformer import TransformerConfig, TransformerModel
from omegaconf import OmegaConf

from ..modules import MappedDecoder, MappedEncoder
from .mapped_model import MappedModelMixin
from .options import SITES, MappingChoice, MappingOptions, option_errors, with_defaults


@register_model("multimax_transformer")
class MultimaxTransformerModel(MappedModelMixin, TransformerModel):
    """fairseq's ``transformer`` with the options of :class:`.options.MappingOptions`."""

    @classmethod
    def add_args(cls, parser) -> None:
        super().add_args(parser)
        # No defaults, as in the stock model: the architecture sets what the command line leaves open.
        gen_parser_from_dataclass(parser, MappingOptions(), delete_default=True)

    @classmethod
    @option_errors()
    def build_model(cls, args, task):
        # A copy, as a namespace: fairseq saves the original in the checkpoint, and the stock model cannot add fields
        # to the config of fairseq-hydra-train.
        namespace = Namespace(**(OmegaConf.to_container(args) if OmegaConf.is_config(args) else vars(args)))
        has_cross_attention = not getattr(namespace, "no_cross_attention", False)
        sites = SITES if has_cross_attention else tuple(site for site in SITES if site != "cross")
        namespace.mapping_choice = MappingChoice.from_options(namespace, available_sites=sites)
        model = super().build_model(namespace, task)
        task.output_mapping = namespace.mapping_choice.output[0]  # for the criterion, which is built next
        model.set_mapping_options(namespace, namespace.mapping_choice)
        # The checkpoint has to know how many layers --encoder-layers-to-keep has left.
        args.encoder_layers, args.decoder_layers = namespace.encoder_layers, namespace.decoder_layers
        return model

    @classmethod
    def build_encoder(cls, args, src_dict, embed_tokens):
        return MappedEncoder(TransformerConfig.from_namespace(args), src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args, tgt_dict, embed_tokens):
        cfg = TransformerConfig.from_namespace(args)
        return MappedDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


def known_fields() -> Set[str]:
    """The fields of this model's config: its options, and what fairseq's commands add."""
    parser = ArgumentParser()
    MultimaxTransformerModel.add_args(parser)
    return {action.dest for action in parser._actions} | {"_name", "arch", "base_layers"}


for stock_name in (
    "transformer",
    "transformer_tiny",
    "transformer_iwslt_de_en",
    "transformer_wmt_en_de",
    "transformer_vaswani_wmt_en_de_big",
):
    register_model_architecture("multimax_transformer", f"multimax_{stock_name}")(
        with_defaults(ARCH_CONFIG_REGISTRY[stock_name], known_fields)
    )
