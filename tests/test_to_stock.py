"""scripts/to_stock.py: what it writes is a checkpoint of fairseq's own, for fairseq and for CTranslate2."""

import re

import fairseq
import pytest
import torch
from conftest import PLUGIN, TINY, call, run, save_checkpoint

# Checkpoints of fairseq hold an argparse.Namespace, which torch ≥ 2.6 loads with the plugin's help or this only.
TRUSTED = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}


@pytest.fixture(scope="module")
def translation(corpus, tmp_path_factory):
    """A checkpoint of a softmax model, and what to_stock.py makes of it."""
    folder = tmp_path_factory.mktemp("stock")
    path = folder / "checkpoint_last.pt"
    run("fairseq-train", corpus / "data-bin", "--user-dir", PLUGIN, "--arch", "multimax_transformer", *TINY,
        "--attention-mapping", "softmax", "--dropout", 0, "--criterion", "chunked_cross_entropy",
        "--optimizer", "adam", "--lr", "1e-2", "--max-tokens", 2000, "--max-update", 60, "--cpu", "--num-workers", 0,
        "--no-epoch-checkpoints", "--save-dir", folder)
    call("to_stock", path, "--output", folder / "stock.pt")
    return path, folder / "stock.pt"


# Without the plugin 0.12.2 leaves padding to a kernel of PyTorch's in a way that torch 2 refuses.
stock_translates = pytest.mark.skipif(fairseq.__version__ == "0.12.2", reason="Mask Type should be defined")


def generate(corpus, path, *options, split="test", **kwargs):
    """(score, hypothesis) of each sentence of the data, in their order."""
    printed = run("fairseq-generate", corpus / "data-bin", "--path", path, "--gen-subset", split, "--beam", 4,
                  "--cpu", "--num-workers", 0, "--required-batch-size-multiple", 1, *options,
                  **kwargs).stdout  # fmt: skip
    lines = re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", printed, re.M)
    return [(score, text) for _, score, text in sorted(lines, key=lambda line: int(line[0]))]


@pytest.mark.slow
@stock_translates
def test_fairseq_translates_the_same_without_the_plugin(corpus, translation):
    path, stock = translation
    ours, theirs = generate(corpus, path, "--user-dir", PLUGIN), generate(corpus, stock, env=TRUSTED)
    assert theirs == ours and len(ours) == 40 and len({text for _, text in ours}) > 3


@pytest.mark.slow
def test_fairseq_validates_a_language_model_without_the_plugin(build, corpus, tmp_path):
    data, stock = corpus / "data-bin-lm", tmp_path / "stock.pt"
    path = save_checkpoint(build("multimax_transformer_lm", "--attention-mapping", "softmax"), tmp_path / "own.pt")
    call("to_stock", path, "--output", stock)
    common = [data, "--tokens-per-sample", 32, "--cpu", "--num-workers", 0, "--batch-size", 8, "--path"]
    ours = run("fairseq-eval-lm", *common, path, "--user-dir", PLUGIN)
    theirs = run("fairseq-eval-lm", *common, stock, env=TRUSTED)
    ppl = [re.search(r"Perplexity: \S+", result.stderr + result.stdout)[0] for result in (ours, theirs)]
    assert ppl[0] == ppl[1]


@pytest.mark.slow
@stock_translates
def test_ctranslate2_translates_the_same(corpus, translation, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs ctranslate2: pip install ctranslate2")
    converter = ctranslate2.converters.FairseqConverter(
        str(translation[1]), str(corpus / "data-bin"), unsafe_deserialization=True
    )
    translator = ctranslate2.Translator(converter.convert(str(tmp_path / "ct2")), intra_threads=1)
    for split, size in (("test", 40), ("valid", 60)):
        sentences = [line.split() for line in (corpus / "text" / f"{split}.de").read_text().splitlines()]
        results = translator.translate_batch(sentences, beam_size=4, max_decoding_length=200)
        expected = [text for _, text in generate(corpus, translation[1], split=split, env=TRUSTED)]
        assert [" ".join(result.hypotheses[0]) for result in results] == expected and len(expected) == size


def test_what_fairseq_cannot_compute_is_refused(build, tmp_path):
    for options, named in (
        (["--attention-mapping", "sparsemax"], "--attention-mapping sparsemax"),
        (["--attention-mapping", "softmax", "--attention-scale", "learned"], "--attention-scale learned"),
    ):
        path = save_checkpoint(build("multimax_transformer", *options), tmp_path / named / "checkpoint.pt")
        refused = call("to_stock", path, "--output", tmp_path / "stock.pt", check=False)
        assert refused.returncode == 1 and named in refused.stderr and not (tmp_path / "stock.pt").exists()
    state = torch.load(path, weights_only=False)
    state["cfg"]["model"].arch = "transformer"
    torch.save(state, path)
    refused = call("to_stock", path, "--output", tmp_path / "stock.pt", check=False)
    assert "is of transformer, not of an architecture of this plugin" in refused.stderr
