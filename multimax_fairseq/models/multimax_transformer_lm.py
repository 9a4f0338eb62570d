"""The Transformer language model, with MultiMax or another mapping in its attention and on the vocabulary."""

import sys
from dataclasses import dataclass

from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture, transformer_lm
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from ..kernels.chunked_loss import default_chunk_tokens
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
        task.output_mapping = choice.output[0]  # for the criterion, which is built next
        model.set_modulator_options(args)
        return model

    def prepare_for_inference_(self, cfg) -> None:
        """Also lets ``fairseq-eval-lm`` have logits of a chunk of tokens at a time only.

        Its ``--softmax-batch`` bounds what comes after the output layer, and is unbounded by default; here it bounds
        the output layer too (see :class:`.MappedDecoder`), and is a chunk by default. Commands ask for probabilities
        by ``get_normalized_probs``; whoever loads a model in Python (and has no --path) may ask it for logits.
        """
        super().prepare_for_inference_(cfg)
        if self.decoder.adaptive_softmax is not None or cfg.common_eval.path is None:
            return
        self.decoder.defers_output_layer = True
        if cfg.eval_lm.softmax_batch == sys.maxsize:  # not the user's
            cfg.eval_lm.softmax_batch = default_chunk_tokens(len(self.decoder.dictionary))


for stock_name in ("transformer_lm_gpt", "transformer_lm_big", "transformer_lm_baevski_wiki103"):
    register_model_architecture("multimax_transformer_lm", f"multimax_{stock_name}")(
        with_defaults(ARCH_CONFIG_REGISTRY[stock_name])
    )
