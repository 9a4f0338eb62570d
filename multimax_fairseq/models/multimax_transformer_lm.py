"""The Transformer language model, with MultiMax or another mapping in its attention and on the vocabulary."""

from dataclasses import dataclass

from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from .mapped_model import MappedModelMixin
from .options import MappingOptions, with_defaults


@dataclass
class MultimaxTransformerLanguageModelConfig(MappingOptions, TransformerLanguageModelConfig):
    """The options of the stock language model and of mappings."""


@register_model("multimax_transformer_lm", dataclass=MultimaxTransformerLanguageModelConfig)
class MultimaxTransformerLanguageModel(MappedModelMixin, TransformerLanguageModel):
    """fairseq's ``transformer_lm`` with the options of :class:`.options.MappingOptions`."""


for stock_name in ("transformer_lm_gpt", "transformer_lm_big", "transformer_lm_baevski_wiki103"):
    register_model_architecture("multimax_transformer_lm", f"multimax_{stock_name}")(
        with_defaults(ARCH_CONFIG_REGISTRY[stock_name])
    )
