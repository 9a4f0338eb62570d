"""The Transformer language model, with MultiMax or another mapping in its attention and on the vocabulary."""

from dataclasses import dataclass

from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture, transformer_lm
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from ..modules import MappedDecoder
from .mapped_model import MappedModelMixin
from .options import MappingChoice, MappingOptions, with_defaults


@dataclass
class MultimaxTransformerLanguageModelConfig(MappingOptions, TransformerLanguageModelConfig):
    """The options of the stock language model and of mappings."""


@register_model("multimax_transformer_lm", dataclass=MultimaxTransformerLanguageModelConfig)
class MultimaxTransformerLanguageModel(MappedModelMixin, TransformerLanguageModel):
    """fairseq's ``transformer_lm`` with the options of :class:`.options.MappingOptions`."""

    @classmethod
    def build_model(cls, args, task):
        choice = MappingChoice.from_options(args, available_sites=("decoder",))

        def build_decoder(args, *positional, **named):
            cfg = TransformerConfig.from_namespace(args)
            cfg.mapping_choice = choice
            return MappedDecoder(cfg, *positional, **named)

        # The stock build_model names its decoder's class where others ask a method, so the name is lent to ours
        # for as long as it runs: less than it takes to write again what it does about embeddings.
        stock_decoder = transformer_lm.TransformerDecoder
        transformer_lm.TransformerDecoder = build_decoder
        try:
            model = super().build_model(args, task)
        finally:
            transformer_lm.TransformerDecoder = stock_decoder
        model.set_modulator_options(args)
        return model


for stock_name in ("transformer_lm_gpt", "transformer_lm_big", "transformer_lm_baevski_wiki103"):
    register_model_architecture("multimax_transformer_lm", f"multimax_{stock_name}")(
        with_defaults(ARCH_CONFIG_REGISTRY[stock_name])
    )
