"""examples/vision: timm's Vision Transformers with mappings beside the formula, timm's own and the authors' files."""

import argparse
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import pytest
import reference
import torch
from conftest import ROOT, run
from torch.nn import functional as F

from multimax_fairseq.compat import trust_plain_records

# not importorskip: timm is imported by the example, which knows what its torchvision may lack
if any(importlib.util.find_spec(name) is None for name in ("timm", "sklearn")):
    pytest.skip("needs timm and scikit-learn: pip install -c requirements.txt -e .[vision]", allow_module_level=True)

EXAMPLE = ROOT / "examples" / "vision"
# where Python looks for the package
ROOT_FIRST = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
NUM_HEADS = 3
# 2 blocks, 16 patches
TINY = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": NUM_HEADS,
    "num_classes": 5,
    "mlp_ratio": 2.0,
}


@pytest.fixture(scope="module", autouse=True)
def on_path():
    """The example's files are modules; others of their names, such as benchmarks/benchmark.py, come back afterwards."""
    names = [path.stem for path in EXAMPLE.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(EXAMPLE))
    yield
    trust_plain_records()  # timm, and torch's safe_globals, take from torch's list what others have put there
    sys.path.remove(str(EXAMPLE))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture(scope="module")
def vit(on_path):
    return importlib.import_module("multimax_vit")


@pytest.fixture
def timm(vit):
    return importlib.import_module("timm")


@pytest.fixture
def pictures():
    return torch.randn(2, 3, 16, 16)


def randomised(model):
    """The model with weights from a normal, float64: nothing hides behind a zero or a one."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def authors_weights(model):
    """The weights of a model by the names of the authors' file, with flat `ranges` and `ts`."""
    names = {"mapping.thresholds": "ranges", "mapping.gains": "ts"}
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            if name.endswith(ours):
                name, tensor = name.replace(f"output_{ours}", theirs).replace(ours, theirs), tensor.flatten()
        weights[name] = tensor.clone()
    return weights


def written_out(weights, pictures):
    """Logits of pictures, (count, 3, 16, 16), by the formulas: block by block, head by head, query by query.

    ``weights`` are by the authors' names. Where there are no `ranges`, there is softmax.
    """
    w = weights
    size = w["patch_embed.proj.weight"].size(-1)

    def linear(name, x):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def normalise(name, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred**2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def sigma(prefix, scores):
        if f"{prefix}ranges" not in w:
            return scores
        parameters = (w[f"{prefix}{name}"].view(-1, 2).tolist() for name in ("ranges", "ts"))
        return torch.tensor(reference.modulator(scores.tolist(), *parameters), dtype=scores.dtype)

    logits = []
    for picture in pictures:
        patches = [
            picture[:, row : row + size, column : column + size].flatten()
            for row in range(0, picture.size(1), size)
            for column in range(0, picture.size(2), size)
        ]
        x = torch.stack(patches) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
        x = x + w["pos_embed"][0]
        for block in ("blocks.0.", "blocks.1."):
            queries, keys, values = linear(f"{block}attn.qkv", normalise(f"{block}norm1", x)).chunk(3, dim=-1)
            heads = []
            for q, k, v in zip(*(part.chunk(NUM_HEADS, dim=-1) for part in (queries, keys, values))):
                rows = []
                for query in q:
                    scores = sigma(f"{block}attn.", k @ query / math.sqrt(len(query)))
                    weights_of_keys = (scores - scores.max()).exp()
                    rows.append(weights_of_keys / weights_of_keys.sum() @ v)
                heads.append(torch.stack(rows))
            x = x + linear(f"{block}attn.proj", torch.cat(heads, dim=-1))
            hidden = linear(f"{block}mlp.fc1", normalise(f"{block}norm2", x))
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            x = x + linear(f"{block}mlp.fc2", hidden)
        logits.append(sigma("", linear("head", normalise("norm", x).mean(0))))
    return torch.stack(logits)


@pytest.mark.parametrize("output_mapping", ["softmax", "multimax"])
@pytest.mark.parametrize("attention_mapping", ["softmax", "multimax"])
def test_logits_are_the_formula(vit, pictures, attention_mapping, output_mapping):
    model = vit.MultiMaxVisionTransformer(
        attention_mapping=attention_mapping, output_mapping=output_mapping, **TINY
    )
    model = randomised(model)
    expected = written_out(authors_weights(model), pictures.double())
    with torch.no_grad():
        torch.testing.assert_close(model(pictures.double()), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
def test_softmax_is_stock_timm_to_the_last_bit(timm, pictures, fused):
    same = {"global_pool": "avg", "class_token": False, "fc_norm": False}
    timm.layers.set_fused_attn(fused)
    try:
        torch.manual_seed(1)
        stock = timm.create_model("deit_tiny_patch16_224", **same, **TINY)
        torch.manual_seed(1)
        ours = timm.create_model("multimax_deit_tiny_patch16_224", attention_mapping="softmax", **TINY)
    finally:
        timm.layers.set_fused_attn(True)
    ours.load_state_dict(stock.state_dict())
    outputs = [model(pictures) for model in (stock, ours)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.sin().sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), stock.parameters()):
        assert torch.equal(mine.grad, theirs.grad), name


def test_other_weights_start_as_those_of_stock_timm_under_the_same_seed(timm):
    torch.manual_seed(1)
    stock = timm.create_model("deit_tiny_patch16_224", global_pool="avg", class_token=False, fc_norm=False, **TINY)
    torch.manual_seed(1)
    ours = timm.create_model("multimax_deit_tiny_patch16_224", output_mapping="multimax", **TINY).state_dict()
    for name, weight in stock.state_dict().items():
        assert torch.equal(ours[name], weight), name
    added = {name: weight for name, weight in ours.items() if name not in stock.state_dict()}
    assert len(added) == 6 and all(weight.abs().max() > 0 for weight in added.values())


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_three_sizes_have_the_parameters_of_deit_and_eight_more_each_time(timm, size):
    with torch.device("meta"):
        stock = timm.create_model(f"deit_{size}_patch16_224")
        ours = timm.create_model(f"multimax_deit_{size}_patch16_224", output_mapping="multimax")
    of_class_token = 2 * stock.embed_dim  # with its position
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (stock, ours)]
    assert counts[1] == counts[0] - of_class_token + 13 * 8
    assert ours.pretrained_cfg["mean"] == stock.pretrained_cfg["mean"]


@pytest.mark.parametrize(
    "mapping, options",
    [
        ("multimax", {"order": 1}),
        ("sparsemax", {}),
        ("entmax15", {}),
        ("entmax", {"alpha": "learned"}),
        ("evsoftmax", {}),
    ],
)
def test_every_mapping_trains(vit, pictures, mapping, options):
    model = vit.MultiMaxVisionTransformer(attention_mapping=mapping, attention_options=options, **TINY)
    seen = []
    with vit.recording(model, lambda *attention: seen.append(attention)):
        F.cross_entropy(model(pictures), torch.tensor([1, 2])).backward()
    assert [block for block, *_ in seen] == [0, 1]
    for block, scores, probabilities in seen:
        assert scores.shape == probabilities.shape == (2, NUM_HEADS, 16, 16)
        torch.testing.assert_close(probabilities, model.blocks[block].attn.mapping(scores))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, NUM_HEADS, 16))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if mapping == "entmax":
        assert model.blocks[0].attn.mapping.alpha.shape == (NUM_HEADS,)


def test_recording_softmax_changes_nothing_and_ends(vit, pictures):
    model = vit.MultiMaxVisionTransformer(attention_mapping="softmax", **TINY).eval()
    seen = []
    with torch.no_grad():
        before = model(pictures)
        with vit.recording(model, lambda *attention: seen.append(attention)):
            torch.testing.assert_close(model(pictures), before)
        assert torch.equal(model(pictures), before)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0][2], seen[0][1].softmax(-1))


@pytest.mark.parametrize("mask", ["causal", "bool", "added"])
def test_masks_are_those_of_timms_attention(vit, mask):
    from timm.layers import Attention

    from multimax_fairseq.mappings import build_mapping

    stock = Attention(12, num_heads=NUM_HEADS).double()
    mapped = Attention(12, num_heads=NUM_HEADS).double()
    mapped.load_state_dict(stock.state_dict())
    mapped = vit.MappedAttention.adopt(mapped, build_mapping("multimax", init="identity"))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    seen = torch.rand(7, 7) < 0.5
    seen |= torch.eye(7, dtype=torch.bool)
    given = {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": seen},
        "added": {"attn_mask": torch.randn(7, 7, dtype=torch.float64)},
    }[mask]
    torch.testing.assert_close(mapped(x, **given), stock(x, **given), atol=1e-12, rtol=1e-12)


def test_attention_dropout_acts_in_training_alone(vit, pictures):
    model = vit.MultiMaxVisionTransformer(attn_drop_rate=0.5, **TINY)
    with torch.no_grad():
        assert not torch.equal(model(pictures), model(pictures))
        model.eval()
        assert torch.equal(model(pictures), model(pictures))


def test_a_timm_that_attends_in_another_way_is_noticed(vit, pictures, monkeypatch):
    model = vit.MultiMaxVisionTransformer(**TINY)
    monkeypatch.setattr(vit.Attention, "forward", lambda self, x, **kwargs: x)
    with pytest.raises(RuntimeError, match="mapping was not called"):
        model(pictures)


def test_mappings_numbers_do_not_decay(vit):
    from timm.optim import create_optimizer_v2

    model = vit.MultiMaxVisionTransformer(output_mapping="multimax", **TINY)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in decayed]
    assert "blocks.0.mlp.fc1.weight" in names
    assert not [name for name in names if "mapping" in name]


def test_wrong_options(vit):
    with pytest.raises(ValueError, match="choose from: softmax, multimax, sparsemax"):
        vit.MultiMaxVisionTransformer(attention_mapping="hardmax", **TINY)
    with pytest.raises(ValueError, match="softmax or multimax; got 'sparsemax'"):
        vit.MultiMaxVisionTransformer(output_mapping="sparsemax", **TINY)
    with pytest.raises(TypeError, match="no option alpha"):
        vit.MultiMaxVisionTransformer(attention_options={"alpha": 2}, **TINY)
    with pytest.raises(ValueError, match="not into DiffAttention"):
        vit.MultiMaxVisionTransformer(**{**TINY, "num_heads": 2}, attn_layer="diff")


# Checkpoints


@pytest.mark.parametrize("output_mapping", ["softmax", "multimax"])
@pytest.mark.parametrize("layout", ["weights", "training script"])
def test_authors_checkpoint(vit, pictures, tmp_path, layout, output_mapping):
    model = vit.MultiMaxVisionTransformer(qkv_bias=False, output_mapping=output_mapping, **TINY)
    weights = authors_weights(randomised(model).float())
    assert weights["blocks.1.attn.ts"].shape == (4,) and ("ranges" in weights) == (output_mapping == "multimax")
    path = tmp_path / "checkpoint.pth"
    saved = weights
    if layout == "training script":
        saved = {"model": {f"module.{name}": weight for name, weight in weights.items()}, "epoch": 3, "optimizer": {}}
        if hasattr(torch.serialization, "safe_globals"):  # torch 2.5: it can be told that options are harmless
            saved["args"] = argparse.Namespace(lr=5e-4, model="deit_small_patch16_224")
    torch.save(saved, path)
    loaded = vit.load_authors_checkpoint(path, num_heads=NUM_HEADS)
    assert not loaded.training
    with torch.no_grad():
        logits = loaded.double()(pictures.double())
    torch.testing.assert_close(
        logits, written_out({k: v.double() for k, v in weights.items()}, pictures.double()), atol=1e-10, rtol=1e-10
    )


def test_authors_checkpoint_has_64_numbers_a_head(vit, tmp_path):
    model = vit.MultiMaxVisionTransformer(**{**TINY, "embed_dim": 192, "num_heads": 1}, qkv_bias=True)
    torch.save(authors_weights(model), tmp_path / "checkpoint.pth")
    loaded = vit.load_authors_checkpoint(tmp_path / "checkpoint.pth")
    assert loaded.blocks[0].attn.num_heads == 3 and loaded.blocks[0].attn.qkv.bias is not None


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_files_that_are_not_the_authors_checkpoints(vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = authors_weights(vit.MultiMaxVisionTransformer(**TINY))
    first_order = {k: v[:2] if k.endswith((".ts", ".ranges")) else v for k, v in weights.items()}
    stock = {k: v for k, v in weights.items() if not k.endswith((".ts", ".ranges"))}
    for saved, message in [
        ({"model": weights, "args": Harmful()}, "could run code"),
        ([1, 2], "no dictionary of weights"),
        (stock, "checkpoint_path"),
        (first_order, "another version"),
        ({**weights, "cls_token": torch.zeros(1, 1, 12)}, "another version"),
    ]:
        torch.save(saved, "checkpoint.pth")
        with pytest.raises(ValueError, match=message):
            vit.load_authors_checkpoint("checkpoint.pth")
    assert not Path("harmed").exists()


def test_stock_checkpoint_starts_as_softmax(timm, pictures, tmp_path):
    stock = timm.create_model("deit_tiny_patch16_224", **TINY).eval()
    torch.save(stock.state_dict(), tmp_path / "stock.pth")
    ours = timm.create_model(
        "multimax_deit_tiny_patch16_224",
        class_token=True,
        global_pool="token",
        output_mapping="multimax",
        checkpoint_path=str(tmp_path / "stock.pth"),
        **TINY,
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures), stock(pictures), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("img_size", [16, 32])
def test_stock_checkpoint_with_a_class_token_in_a_model_without(timm, tmp_path, img_size):
    # for the 64 patches of 32 pixels timm resamples the positions of 16
    stock = timm.create_model("deit_tiny_patch16_224", **TINY)
    torch.save({"model": stock.state_dict()}, tmp_path / "stock.pth")
    ours = timm.create_model(
        "multimax_deit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "stock.pth"), "num_classes": 5},
        **{**TINY, "img_size": img_size},
    ).eval()
    averaged = timm.create_model(
        "deit_tiny_patch16_224", global_pool="avg", class_token=False, fc_norm=False, **{**TINY, "img_size": img_size}
    ).eval()
    weights = {k: v for k, v in stock.state_dict().items() if k not in ("cls_token", "pos_embed")}
    positions = stock.pos_embed[:, 1:]
    if img_size == 32:
        positions = timm.layers.resample_abs_pos_embed(positions, new_size=(8, 8), num_prefix_tokens=0)
    averaged.load_state_dict({**weights, "pos_embed": positions})
    pictures = torch.randn(2, 3, img_size, img_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(pictures), averaged(pictures), atol=1e-6, rtol=1e-5)


def test_own_checkpoint_keeps_its_numbers_and_a_part_of_them_is_an_error(vit):
    model = randomised(vit.MultiMaxVisionTransformer(output_mapping="multimax", **TINY))
    other = vit.MultiMaxVisionTransformer(output_mapping="multimax", **TINY).double()
    other.load_state_dict(model.state_dict())
    for name, weight in other.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    part = {name: weight for name, weight in model.state_dict().items() if name != "blocks.1.attn.mapping.gains"}
    with pytest.raises(RuntimeError, match="blocks.1.attn.mapping.gains"):
        other.load_state_dict(part)


# What can be seen


@pytest.mark.parametrize("class_token", [True, False])
def test_rollout_maps(vit, pictures, class_token):
    figures = importlib.import_module("figures")
    pool = {"class_token": True, "global_pool": "token"} if class_token else {}
    model = randomised(vit.MultiMaxVisionTransformer(**TINY, **pool)).float()
    seen = []
    with torch.no_grad(), vit.recording(model, lambda *attention: seen.append(attention[2])):
        model(pictures)
    tokens = 16 + class_token
    flow = torch.eye(tokens).expand(2, -1, -1)
    for attention in seen:
        flow = (attention.mean(1) + torch.eye(tokens)) / 2 @ flow
    expected = flow[:, 0, 1:] if class_token else flow.mean(1)
    maps = figures.rollout_maps(model, pictures)
    assert maps.shape == (2, 4, 4)
    torch.testing.assert_close(maps.flatten(1), expected)


def test_digits_from_training_to_figures(tmp_path, monkeypatch, capsys):
    train = importlib.import_module("train")
    command = [sys.executable, str(EXAMPLE / "train.py"), "--epochs", "1", "--batch-size", "256"]
    command += ["--out", str(tmp_path), "--mappings", "softmax,multimax"]
    result = run(*command, env=ROOT_FIRST)
    table = (tmp_path / "table.md").read_text()
    assert table == result.stdout and "| multimax | 1 | " in table
    runs = json.loads((tmp_path / "results.json").read_text())
    assert [(run["attention_mapping"], run["seed"]) for run in runs] == [("softmax", 1), ("multimax", 1)]
    assert all(len(run["sparsity"]) == 3 and 0 < min(run["sparsity"]) for run in runs)
    for figure in ("rollout.png", "metrics.png"):
        assert (tmp_path / figure).stat().st_size > 10_000

    # what is there is not trained again, and another seed joins it
    monkeypatch.setattr(train, "train", lambda model, *rest: None)
    monkeypatch.setattr(sys, "argv", [*command[1:-1], "softmax", "--seeds", "1,2"])
    train.main()
    assert "±" in capsys.readouterr().out
    again = json.loads((tmp_path / "results.json").read_text())
    assert [run for run in again if run["seed"] == 1] == runs and len(again) == 3

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--lr", "1"])
    with pytest.raises(SystemExit, match="another lr: choose another --out"):
        train.main()


def test_digits_are_the_same_for_everyone_and_shifts_move_them(on_path):
    train = importlib.import_module("train")
    pictures, classes, test_pictures, test_classes = train.digits()
    assert pictures.shape == (1297, 1, 8, 8) and test_pictures.shape == (500, 1, 8, 8)
    assert pictures.min() == -1 and pictures.max() == 1
    assert test_classes.bincount().min() >= 48
    point = torch.full((200, 1, 8, 8), -1.0)
    point[:, :, 4, 4] = 1
    rows, columns = (train.shifted(point)[:, 0] == 1).nonzero()[:, 1:].T
    assert set(zip(rows.tolist(), columns.tolist())) == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mappings", "softmax,hardmax"], "no mapping 'hardmax'; choose from"),
        (["--seeds", "one"], "whole numbers"),
        (["--epochs", "0"], "1 or more"),
    ],
)
def test_wrong_arguments(on_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("train").parse(arguments)
    assert message in capsys.readouterr().err


def test_benchmark(vit, monkeypatch, capsys):
    benchmark = importlib.import_module("benchmark")
    timed = {benchmark.BASELINE: Times([1, 2, 6]), "other": Times([2, 6, 6])}
    monkeypatch.setattr(benchmark, "models", lambda size: timed)
    monkeypatch.setattr(benchmark, "step", lambda model, *rest: model.next())
    threads = torch.get_num_threads()
    benchmark.main(["--size", "tiny", "--batch-size", "1", "--rounds", "2", "--threads", str(threads)])
    # the first of each warms up; then 6 / 2 and 6 / 6, whose median is 2
    assert "| other | 6000 | 6000 | 2.000 |" in capsys.readouterr().out
    monkeypatch.undo()
    models = benchmark.models("tiny")
    assert [model.blocks[0].attn.fused_attn for model in models.values()] == [True, False, True]
    assert all(benchmark.step(model, torch.randn(1, 3, 224, 224), torch.tensor([1])) > 0 for model in models.values())
    first, *others = (model.patch_embed.proj.weight for model in models.values())
    assert all(torch.equal(first, other) for other in others)


class Times(torch.nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.next = iter(seconds).__next__


def test_a_script_that_knows_timm_alone_trains_the_model(tmp_path):
    """As timm's train.py does, with its options, its configuration of data and its optimizer."""
    (tmp_path / "train.py").write_text(
        """
import argparse
import torch
from timm import create_model, utils
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
args = parser.parse_args()
model = create_model(args.model, num_classes=2, img_size=32, depth=2, **args.model_kwargs)
config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
for _ in range(2):
    pictures = torch.randn(2, *config["input_size"]) * torch.tensor(config["std"])[:, None, None]
    loss = torch.nn.functional.cross_entropy(model(pictures), torch.tensor([0, 1]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(type(model.output_mapping).__name__, model.blocks[0].attn.mapping.order, loss.item())
"""
    )
    command = [sys.executable, EXAMPLE / "multimax_vit.py", tmp_path / "train.py"]
    command += ["--model", "multimax_deit_tiny_patch16_224", "--model-kwargs"]
    command += ["attention_mapping=multimax", "attention_options={'order': 1}", "output_mapping=multimax"]
    *described, loss = run(*command, env=ROOT_FIRST).stdout.split()
    assert described == ["MultiMax", "1"] and math.isfinite(float(loss))


def test_a_script_that_is_not_there(vit):
    with pytest.raises(SystemExit, match="usage"):
        vit.main(["nowhere.py"])
