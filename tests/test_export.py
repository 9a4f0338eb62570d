"""docs/export.md: its blocks, run one after another, compute what the model computes."""

import re
import warnings

import pytest
import torch
from conftest import ROOT, save_checkpoint

CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # fp32, sums in another order


@pytest.fixture(scope="module", params=["softmax", "multimax", "sparsemax", "entmax", "evsoftmax"])
def page(request, build, corpus, tmp_path_factory):
    """A folder as the page assumes it, its blocks by heading, and what the first of them has defined."""
    folder = tmp_path_factory.mktemp(request.param)
    built = build("multimax_transformer", "--attention-mapping", request.param)
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.mul_(1.5)  # attention that is not uniform
    save_checkpoint(built, folder / "checkpoints" / "checkpoint_best.pt")
    (folder / "data-bin").symlink_to(corpus / "data-bin")
    parts = re.split(r"^## (.+)$", (ROOT / "docs" / "export.md").read_text(), flags=re.M)
    code = [re.findall(r"```python\n(.*?)```", part, re.S) for part in parts[::2]]
    blocks = dict(zip(["", *parts[1::2]], (found[0] for found in code if found)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = {}
        exec(blocks[""], names)
        yield request.param, blocks, names


@pytest.fixture
def run_block(page, monkeypatch):
    """run_block(heading) → the names that its code has defined, beside those of the first block."""
    _, blocks, names = page

    def run_block(heading):
        known = dict(names)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exec(blocks[heading], known)
        return known

    return run_block


def other_sizes(names):
    """Inputs of another batch: more sentences, of other lengths, with and without padding."""
    words = torch.randint(4, 30, (3, 9))
    source = words.where(torch.arange(9) >= torch.tensor([[0], [2], [5]]), torch.tensor(1))
    return [(names["source"], names["target"]), (source, source.flip(1)), (words, words[:, :1])]


def test_onnx(page, run_block):
    pytest.importorskip("onnx", reason="needs onnx: pip install 'multimax_fairseq[export]'")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'multimax_fairseq[export]'")
    names = run_block("ONNX")
    close = CLOSE | ({"atol": 2e-4} if page[0] == "sparsemax" else {})  # steep: it makes such differences larger
    for source, target in other_sizes(names):
        (logits,) = names["session"].run(None, {"source": source.numpy(), "target": target.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), names["function"](source, target), **close)


def test_tracing(run_block):
    names = run_block("TorchScript")
    loaded = torch.jit.load("model.pt")
    for inputs in other_sizes(names):
        with torch.no_grad():
            logits = loaded(*inputs)
        torch.testing.assert_close(logits, names["function"](*inputs), **CLOSE)


def test_int8(page, run_block, monkeypatch):
    if page[0] == "softmax":
        pytest.skip("fairseq's own attention takes the weights out of its linear layers, and int8 layers have none")
    translator, model = page[2]["translator"], page[2]["model"]
    monkeypatch.setitem(translator.models._modules, "0", model)  # the block replaces it
    run_block("int8")
    quantised = translator.models[0]
    linear = [module for module in quantised.modules() if isinstance(module, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(linear) == 33 and isinstance(translator.translate("der Hund schläft .", beam=5), str)
    source, target = page[2]["source"], page[2]["target"]
    found, expected = (one(source, None, target)[0] for one in (quantised, model))
    # hardly trained, these change which keys take part by what int8 rounds
    most = {"sparsemax": 0.9, "entmax": 0.3, "evsoftmax": 0.9}.get(page[0], 0.1)
    assert 0 < (found - expected).norm() < most * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["multimax"], indirect=True)  # each takes half a minute
def test_compiling(page, run_block):
    names = run_block("torch.compile")
    inputs = other_sizes(names)[0]
    with torch.no_grad():
        torch.testing.assert_close(names["compiled"](*inputs), names["function"](*inputs), **CLOSE)
