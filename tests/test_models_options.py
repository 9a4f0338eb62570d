"""What a user can choose, and what happens when the choice is wrong."""

from argparse import Namespace

import pytest
import torch
from hydra._internal.utils import run_and_report
from omegaconf import OmegaConf

from multimax_fairseq.mappings import MAPPINGS
from multimax_fairseq.models import MultimaxTransformerLanguageModel, MultimaxTransformerModel
from multimax_fairseq.models import options as of_models
from multimax_fairseq.models.options import SITES, mapped_sites, with_defaults


def choose(**options):
    """The options as the model has them, checked."""
    args = Namespace(**{"encoder_layers": 6, **options})
    of_models.check_options(args)
    return args


def in_words(**options):
    return of_models.describe(Namespace(**{"encoder_layers": 6, "attention_mapping": "multimax", **options}))


def test_the_defaults_are_those_of_the_documentation():
    options, arguments = of_models.completed(choose()), {"order": 2, "init": "normal", "terms": "below,above"}
    assert (options.attention_mapping, options.output_mapping) == ("multimax", "softmax")
    assert of_models.chosen_arguments("multimax", options) == {**arguments, "lr_scale": 1.0}
    assert mapped_sites(choose()) == SITES


@pytest.mark.parametrize("options, message", [
    ({"attention_scale": "sqrt"}, "--attention-scale.*'sqrt'.*none, learned, log-length"),
    ({"log_modulators": "layer"}, "--log-modulators.*'layer'.*site, module, none"),
    ({"attention_mapping": "softmin"}, "--attention-mapping.*'softmin'.*multimax.*evsoftmax"),
    ({"attention_mapping_sites": "encoder,output"}, "--attention-mapping-sites.*'output'.*encoder, decoder, cross"),
    ({"attention_mapping_sites": ""}, "--attention-mapping-sites.*''"),
    ({"output_mapping": "evsoftmax"}, "--output-mapping.*'evsoftmax'.*sparsemax, entmax15, entmax"),
    ({"output_mapping": "softmin"}, "--output-mapping.*'softmin'.*softmax, multimax"),
    ({"output_mapping": "multimax", "adaptive_softmax_cutoff": "10,20"}, "adaptive-softmax-cutoff"),
    ({"attention_mapping": "softmax", "modulator_lr_scale": 9}, "^--modulator-lr-scale 9: this model has no"),
    ({"multimax_order": 3}, "orders 1, 2; got 3"),
    ({"entmax_alpha": "9"}, r"\(1, 2\] or 'learned'"),  # chosen or not, it is wrong
    ({"attention_mapping_sites": "cross", "no_cross_attention": True}, "choose from: encoder, decoder$"),
    ({"attention_mapping_sites": "encoder", "encoder_layers": None}, "choose from: decoder$"),
])  # fmt: skip
def test_a_wrong_choice_says_what_to_choose(options, message):
    with pytest.raises(ValueError, match=message):
        choose(**options)


def lays_seven(args):
    args.layers = getattr(args, "layers", 7)


@pytest.mark.parametrize("options, chosen", [
    ({"attention_mapping": "sparsemax", "attention_mapping_sites": "encoder, cross"}, ["encoder", "cross"]),
    ({"attention_mapping_sites": ["encoder", "cross"]}, ["encoder", "cross"]),  # of a config file
    ({"attention_mapping": "softmax", "adaptive_softmax_cutoff": "9"}, []),
    ({"attention_mapping": "sparsemax", "output_mapping": "multimax", "modulator_lr_scale": 9}, list(SITES)),
    ({"attention_mapping": "softmax", "attention_scale": "learned", "no_cross_attention": True}, list(SITES[:2])),
    ({"attention_mapping": "softmax", "attention_mapping_sites": "encoder", "encoder_layers": None}, []),
    *(({"attention_mapping": name}, list(SITES) if name != "softmax" else []) for name in MAPPINGS),
], ids=str)  # fmt: skip
def test_other_sites_have_softmax_and_choosing_draws_nothing(options, chosen):
    state = torch.get_rng_state()
    assert mapped_sites(choose(**options)) == tuple(chosen)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_architecture_completes_what_is_given():
    """By the command line, and by a config with gaps, where a checkpoint may have what nobody knows any more."""
    args = Namespace(attention_mapping="entmax", layers=2)
    with_defaults(lays_seven)(args)
    assert (args.attention_mapping, args.multimax_order, args.layers) == ("entmax", 2, 2)
    cfg = OmegaConf.create({"entmax_alpha": 1.3, "layers": None, "from_an_earlier_version": 1})
    with_defaults(lays_seven)(cfg)
    assert (cfg.layers, cfg.entmax_alpha, cfg.attention_mapping_sites) == (7, 1.3, ",".join(SITES))


@pytest.mark.parametrize("model", [MultimaxTransformerModel, MultimaxTransformerLanguageModel])
def test_hydra_shows_a_wrong_choice_without_a_trace(model, capsys):
    with pytest.raises(SystemExit):
        run_and_report(lambda: model.build_model(Namespace(attention_mapping="softmin"), None))
    message, *rest = capsys.readouterr().err.splitlines()
    assert message.startswith("--attention-mapping: there is no 'softmin'")
    assert rest == ["", "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."]


def test_mappings_in_words():
    stock = {"--attention-mapping": "softmax", "--attention-scale": "none", "--output-mapping": "softmax"}
    assert of_models.describe(Namespace(encoder_layers=6)) == stock  # fairseq's own model
    for same in [{}, {"attention_mapping_sites": "decoder"}, {"multimax_init": "shaped"}, {"modulator_lr_scale": 2}]:
        assert in_words(attention_mapping="softmax", **same) == stock
    assert in_words(attention_mapping="entmax", attention_mapping_sites="cross,decoder") == {
        **stock, "--attention-mapping": "entmax alpha=1.5 in cross, decoder",
    }  # fmt: skip
    scaled = in_words(attention_mapping="softmax", attention_scale="learned")
    assert scaled["--attention-scale"] == "learned" and scaled["--attention-mapping"].startswith("softmax in cross")
    assert in_words(output_mapping="multimax")["--output-mapping"] == "multimax order=2 terms=above,below"
    own = in_words(attention_mapping="topk", mapping_options="k=8")
    assert own["--attention-mapping"] == "topk k=8 in cross, decoder, encoder"
    for one, other in [
        ({"entmax_alpha": "1.5"}, {"entmax_alpha": 1.5}),
        ({"attention_mapping": "multimax", "multimax_terms": "above,below"}, {"attention_mapping": "multimax"}),
        ({"output_mapping": "multimax"}, {"output_mapping": "multimax", "multimax_init": "shaped",
                                          "modulator_lr_scale": 10, "log_modulators": "none"}),
        ({"attention_mapping_sites": "cross,encoder,cross"}, {"attention_mapping_sites": ["encoder", "cross"]}),
    ]:
        same = [in_words(**{"attention_mapping": "entmax", **options}) for options in (one, other)]
        assert same[0] == same[1]
    of_lm = {"encoder_layers": None}
    assert in_words(**of_lm, attention_mapping_sites="decoder") == in_words(**of_lm)
