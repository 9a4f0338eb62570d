"""examples/vision: timm's Vision Transformers with mappings beside the formula, timm's own and the authors' files."""

import importlib.util
import math

import pytest
import reference
import torch
from conftest import ROOT, call, load_script, rows_of
from torch.nn import functional as F

from multimax_fairseq.compat import trust_plain_records

# not importorskip: timm is imported by the example, which knows what its torchvision may lack
if any(importlib.util.find_spec(name) is None for name in ("timm", "sklearn")):
    pytest.skip("needs timm and scikit-learn: pip install -c requirements.txt -e .[vision]", allow_module_level=True)

TINY = dict(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5, mlp_ratio=2)


@pytest.fixture(scope="module")
def vit():
    yield load_script("multimax_vit")
    trust_plain_records()  # timm takes from torch's list what others have put there


def authors_weights(model):
    """Random weights by the names of the authors' file, with flat `ranges` and `ts`."""
    names, weights = {"mapping.thresholds": "ranges", "mapping.gains": "ts"}, {}
    for name, tensor in model.state_dict().items():
        tensor = torch.randn_like(tensor) / 2  # nothing hides behind a zero or a one
        for ours, theirs in names.items():
            if name.endswith(ours):
                name, tensor = name.replace(f"output_{ours}", theirs).replace(ours, theirs), tensor.flatten()
        weights[name] = tensor
    return weights


def written_out(w, pictures):
    """Logits of pictures, (count, 3, 16, 16), by the formulas: block by block, head by head, query by query."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def normalise(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def sigma(prefix, scores):
        if f"{prefix}ranges" not in w:
            return scores
        parameters = (w[f"{prefix}{name}"].view(-1, 2).tolist() for name in ("ranges", "ts"))
        return torch.tensor(reference.modulator(scores.tolist(), *parameters), dtype=scores.dtype)

    logits = []
    for picture in pictures:
        patches = F.conv2d(picture, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
        x = patches.flatten(1).T + w["pos_embed"][0]
        for block in ("blocks.0.", "blocks.1."):
            queries, keys, values = linear(f"{block}attn.qkv", normalise(f"{block}norm1", x)).chunk(3, dim=-1)
            heads = []
            for q, k, v in zip(*(part.chunk(3, dim=-1) for part in (queries, keys, values))):
                rows = [sigma(f"{block}attn.", k @ query / math.sqrt(len(query))).exp() for query in q]
                heads.append(torch.stack([row / row.sum() @ v for row in rows]))
            x = x + linear(f"{block}attn.proj", torch.cat(heads, dim=-1))
            x = x + linear(f"{block}mlp.fc2", F.gelu(linear(f"{block}mlp.fc1", normalise(f"{block}norm2", x))))
        logits.append(sigma("", linear("head", normalise("norm", x).mean(0))))
    return torch.stack(logits)


@pytest.mark.parametrize("attention_mapping, output_mapping", [
    ("multimax", "softmax"), ("multimax", "multimax"), ("softmax", "multimax")])
@pytest.mark.parametrize("layout", ["weights", "training script"])
def test_the_authors_checkpoint_computes_the_formula(vit, tmp_path, layout, attention_mapping, output_mapping):
    model = vit.MultiMaxVisionTransformer(
        qkv_bias=False, attention_mapping=attention_mapping, output_mapping=output_mapping, **TINY)
    weights, pictures = authors_weights(model), torch.randn(2, 3, 16, 16).double()
    saved = {"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3} if layout != "weights" else weights
    torch.save(saved, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="a width of 12, no multiple of DeiT's 64 numbers a head: give num_heads="):
        vit.load_authors_checkpoint(tmp_path / "checkpoint.pth")
    loaded = vit.load_authors_checkpoint(tmp_path / "checkpoint.pth", num_heads=3)
    expected = written_out({k: v.double() for k, v in weights.items()}, pictures)
    torch.testing.assert_close(loaded.double()(pictures), expected, atol=1e-10, rtol=1e-10)


def test_other_files_are_refused(vit, tmp_path):
    stock = {"pos_embed": torch.ones(1)}
    for saved, message in ((stock, "it is no model of the authors'"), ([1], "no dictionary of weights"),
                           ({"model": ROOT}, "holds more than weights")):
        torch.save(saved, tmp_path / "x")
        with pytest.raises(ValueError, match=message):
            vit.load_authors_checkpoint(tmp_path / "x")


def test_softmax_is_stock_timm_to_the_last_bit(vit):
    from timm.models import create_model

    averaged = {"global_pool": "avg", "class_token": False, "fc_norm": False}
    stock = create_model("deit_tiny_patch16_224", img_size=32, **averaged).eval()
    ours = create_model("multimax_deit_tiny_patch16_224", attention_mapping="softmax", img_size=32).eval()
    ours.load_state_dict(stock.state_dict())
    pictures = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours(pictures), stock(pictures))
    ours = create_model("multimax_deit_tiny_patch16_224", output_mapping="multimax", img_size=32)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters()) + 8 * 13
    assert {name for name in ours.no_weight_decay() if "mapping" in name} == {
        name for name, _ in ours.named_parameters() if "mapping." in name}


@pytest.mark.slow
def test_digits_from_training_to_the_table(vit, tmp_path, capsys):
    """Every mapping trains; what is there is not trained again."""
    train, options = load_script("train"), ["--epochs", 3, "--out", tmp_path]
    rows = rows_of(call(train, *options).stdout)
    assert list(rows)[0] == "attention" and len(rows) == 7
    assert all(float(cells[1]) > 20 for name, cells in rows.items() if name != "attention")  # chance is 10 %
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert rows_of(call(train, *options).stdout) == rows
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert "is of a run with other settings" in call(train, *options, "--lr", 1, check=False).stderr
    assert "there is no mapping 'x'" in call(train, "--mappings", "x", check=False).stderr
