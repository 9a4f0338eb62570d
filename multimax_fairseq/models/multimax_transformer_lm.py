"""The Transformer language model, with MultiMax or another mapping in its attention and on the vocabulary."""

import sys
from dataclasses import dataclass

from fairseq import utils
from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from ..kernels.loss import default_chunk_tokens
from .mapped_model import MappedModelMixin
from .options import MappingOptions, with_defaults


@dataclass
class MultimaxTransformerLanguageModelConfig(MappingOptions, TransformerLanguageModelConfig):
    """The options of the stock language model and of mappings."""


@register_model("multimax_transformer_lm", dataclass=MultimaxTransformerLanguageModelConfig)
class MultimaxTransformerLanguageModel(MappedModelMixin, TransformerLanguageModel):
    """fairseq's ``transformer_lm`` with the options of :class:`.options.MappingOptions`."""

    def prepare_for_inference_(self, cfg) -> None:
        """Also makes ``fairseq-eval-lm`` compute logits for one chunk of tokens at a time.

        Stock ``--softmax-batch`` bounds only what follows the output layer, and is unbounded by default. Here it
        also bounds the output layer (see :class:`..modules.MappedDecoder`), and its default is one chunk, except in
        an ensemble, where it also applies to the other models. Commands call ``get_normalized_probs``; a model loaded
        in Python (without --path) may be asked for logits.
        """
        super().prepare_for_inference_(cfg)
        if self.decoder.adaptive_softmax is not None or cfg.common_eval.path is None:
            return
        self.decoder.defers_output_layer = True
        is_alone = len(utils.split_paths(cfg.common_eval.path)) == 1
        if is_alone and cfg.eval_lm.softmax_batch == sys.maxsize:  # the default, not the user's choice
            cfg.eval_lm.softmax_batch = default_chunk_tokens(len(self.decoder.dictionary))


for stock_name in ("transformer_lm_gpt", "transformer_lm_big", "transformer_lm_baevski_wiki103"):
    register_model_architecture("multimax_transformer_lm", f"multimax_{stock_name}")(
        with_defaults(ARCH_CONFIG_REGISTRY[stock_name])
    )
