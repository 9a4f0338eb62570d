"""The Transformer for translation, with MultiMax or another mapping in each attention module."""

from argparse import Namespace

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import ARCH_CONFIG_REGISTRY, register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel
from omegaconf import OmegaConf

from .mapped_model import MappedModelMixin
from .options import MappingOptions, with_defaults


@register_model("multimax_transformer")
class MultimaxTransformerModel(MappedModelMixin, TransformerModel):
    """fairseq's ``transformer`` with the options of :class:`.options.MappingOptions`."""

    @classmethod
    def add_args(cls, parser) -> None:
        super().add_args(parser)
        # No defaults, as in the stock model: the architecture sets what the command line leaves open.
        gen_parser_from_dataclass(parser, MappingOptions(), delete_default=True)

    @classmethod
    def build_model(cls, args, task):
        # A copy, as a namespace: fairseq saves the original in the checkpoint, and the stock model cannot add fields
        # to the config of fairseq-hydra-train.
        namespace = Namespace(**(OmegaConf.to_container(args) if OmegaConf.is_config(args) else vars(args)))
        model = super().build_model(namespace, task)
        # The checkpoint has to know how many layers --encoder-layers-to-keep has left.
        args.encoder_layers, args.decoder_layers = namespace.encoder_layers, namespace.decoder_layers
        return model


for stock_name in (
    "transformer",
    "transformer_tiny",
    "transformer_iwslt_de_en",
    "transformer_wmt_en_de",
    "transformer_vaswani_wmt_en_de_big",
):
    register_model_architecture("multimax_transformer", f"multimax_{stock_name}")(
        with_defaults(ARCH_CONFIG_REGISTRY[stock_name])
    )
