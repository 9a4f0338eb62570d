"""The criterion in fairseq: its numbers are those of the stock criteria, in one process and in two."""

import json
import re
import sys

import fairseq
import pytest
import torch
from conftest import PLUGIN, ROOT, TINY, TINY_LM, parse, run, trained_parameters
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.logging import metrics

from multimax_fairseq.criterions.chunked_cross_entropy import check_output_layer
from multimax_fairseq.kernels.chunked_cross_entropy import chunked_cross_entropy

TIED = ["--share-decoder-input-output-embed"]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "eager")


def criterion(built, *options):
    """The criterion that fairseq-train builds of its options."""
    _, cfg = parse([built.cfg.task.data, "--task", built.cfg.task._name, "--arch", "transformer", *options])
    return built.task.build_criterion(cfg.criterion)


def assert_same_gradients(actual, expected):
    """Sums in fp32 in another order: some, as of a key's bias, are only what rounding leaves of large terms."""
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max().item()
        assert error < 1e-5 * gradient.abs().max().item() + 1e-6 * largest, (name, error, largest)


def losses_and_gradients(built, sample, *options, **forward):
    built.model.zero_grad()
    loss, sample_size, log = criterion(built, *options)(built.model, sample, **forward)
    if loss.requires_grad:
        loss.sum().backward()
    return loss, sample_size, log, {name: p.grad for name, p in trained_parameters(built.model)}


@pytest.mark.parametrize("arch, options", [
    ("transformer", TIED),
    ("transformer_lm", []),
    ("multimax_transformer", ["--output-mapping", "multimax"]),
    ("multimax_transformer", ["--output-mapping", "multimax", "--multimax-terms", "above", *TIED]),
    ("multimax_transformer_lm", ["--output-mapping", "multimax", "--multimax-order", "1", *TIED]),
])  # fmt: skip
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_the_stock_criterion(smoothing, arch, options, build, batch):
    built = build(arch, *options)
    sample = batch(built)
    sample["target"][0, -3:] = sample["target"][3, -1] = built.task.target_dictionary.pad()
    smooth = ["--label-smoothing", smoothing]
    expected = losses_and_gradients(built, sample, "--criterion", "label_smoothed_cross_entropy", *smooth)
    actual = losses_and_gradients(
        built, sample, "--criterion", "chunked_cross_entropy", *smooth, "--chunk-tokens", 50
    )
    assert actual[1] == expected[1] and actual[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert float(actual[2][name]) == pytest.approx(float(value), rel=1e-6), name
    assert_same_gradients(actual[3], expected[3])


def test_losses_of_each_token_are_those_of_the_stock_criterion(build, batch):
    built = build("multimax_transformer", "--output-mapping", "multimax")
    sample = batch(built)
    results = [
        losses_and_gradients(built, sample, "--criterion", f"{name}cross_entropy", "--label-smoothing", 0.1,
                             reduce=False)[0].flatten()
        for name in ("label_smoothed_", "chunked_")
    ]  # fmt: skip
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_the_log_is_that_of_the_stock_criteria(build, batch):
    built = build("multimax_transformer_lm")
    values = {}
    for name in ("cross_entropy", "label_smoothed_cross_entropy", "chunked_cross_entropy"):
        outputs = [losses_and_gradients(built, batch(built, split), "--criterion", name)[2]
                   for split in ("valid", "test")]  # fmt: skip
        with metrics.aggregate(new_root=True) as log:
            CRITERION_REGISTRY[name].reduce_metrics(outputs)
        values[name] = log.get_smoothed_values()
    assert values["chunked_cross_entropy"] == pytest.approx(values["label_smoothed_cross_entropy"], abs=2e-3)
    for name, value in values["cross_entropy"].items():
        assert values["chunked_cross_entropy"][name] == pytest.approx(value, abs=1e-2 if name == "ppl" else 2e-3)


@pytest.mark.parametrize("average", [[], ["--sentence-avg"]])
def test_sample_size(average, build, batch):
    built = build("multimax_transformer")
    sample = batch(built)
    sizes = [losses_and_gradients(built, sample, "--criterion", f"{name}cross_entropy", *average)[1]
             for name in ("", "chunked_")]  # fmt: skip
    assert sizes[0] == sizes[1] == (8 if average else sample["ntokens"])


def test_no_gradient_is_computed_where_none_is_asked_for(build, batch, monkeypatch):
    built = build("multimax_transformer_lm")
    sample = batch(built)
    expected = losses_and_gradients(built, sample, "--criterion", "chunked_cross_entropy")[0]
    tensor_part = sys.modules[chunked_cross_entropy.__module__]
    monkeypatch.setattr(tensor_part, "cross_entropy_rows_", None)
    with torch.no_grad():
        loss, *_ = criterion(built, "--criterion", "chunked_cross_entropy")(built.model, sample)
    torch.testing.assert_close(loss, expected.detach(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("options, message", [
    (["--ddp-backend", "fully_sharded"], "FSDP"),
    (["--find-unused-parameters"], "--ddp-backend legacy_ddp, or drop this flag"),
    (["--label-smoothing", "1.5"], "--label-smoothing"),
    (["--chunk-tokens", "-5"], "--chunk-tokens"),
])  # fmt: skip
def test_options_that_cannot_work(options, message, build):
    with pytest.raises(ValueError, match=message):
        criterion(build("multimax_transformer"), "--criterion", "chunked_cross_entropy", *options)


def test_unused_parameters_may_be_found_by_fairseqs_own_ddp(build):
    criterion(build("multimax_transformer"), "--criterion", "chunked_cross_entropy", "--find-unused-parameters",
              "--ddp-backend", "legacy_ddp")  # fmt: skip


def test_an_adaptive_softmax_is_refused(build, batch):
    built = build("multimax_transformer_lm", "--adaptive-softmax-cutoff", "20,50")
    with pytest.raises(ValueError, match="--criterion adaptive_loss"):
        losses_and_gradients(built, batch(built), "--criterion", "chunked_cross_entropy")


def test_a_model_without_a_plain_projection_is_refused(build):
    model = build("multimax_transformer").model
    check_output_layer(model)
    with pytest.raises(ValueError, match="Transformer whose output layer is a linear projection"):
        check_output_layer(model.encoder)

    class Scaled(type(model.decoder)):
        def output_layer(self, features):
            return 2 * super().output_layer(features)

    model.decoder.__class__ = Scaled
    with pytest.raises(ValueError, match="Scaled is not known"):
        check_output_layer(model)


TRAINING = [
    *("--user-dir", PLUGIN, "--optimizer", "adam", "--lr", "5e-3", "--lr-scheduler", "inverse_sqrt", "--cpu"),
    *("--warmup-updates", "20", "--max-tokens", "500", "--num-workers", "0", "--max-epoch", "1", "--seed", "1"),
    *("--log-format", "json", "--log-interval", "5", "--no-save", "--output-mapping", "multimax"),
]


def train(data, arch, *options):
    """The last logged line of training and of validation, as dictionaries."""
    size = [*TINY_LM, "--task", "language_modeling", "--tokens-per-sample", 64] if "_lm" in arch else TINY
    result = run("fairseq-train", data, "--arch", arch, *size, *TRAINING, *options)
    lines = re.findall(r"\| (train|valid) \| (\{.*\})", result.stderr + result.stdout)
    return {kind: json.loads(line) for kind, line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("arch, data, stock, options", [
    ("multimax_transformer", "data-bin", "label_smoothed_cross_entropy", ["--label-smoothing", "0.1", *TIED]),
    ("multimax_transformer_lm", "data-bin-lm", "cross_entropy", ["--update-freq", "3"]),
])  # fmt: skip
def test_training_logs_the_losses_of_the_stock_criterion(arch, data, stock, options, corpus):
    expected = train(corpus / data, arch, "--criterion", stock, *options)
    actual = train(corpus / data, arch, "--criterion", "chunked_cross_entropy", "--chunk-tokens", 64, *options)
    compared = 0
    for kind in ("train", "valid"):
        for name in ("loss", "nll_loss", "ppl"):
            if f"{kind}_{name}" in expected[kind]:
                compared += 1
                assert float(actual[kind][f"{kind}_{name}"]) == pytest.approx(
                    float(expected[kind][f"{kind}_{name}"]), rel=2e-3
                )
    assert compared >= 4
    assert float(actual["train"]["train_gnorm"]) == pytest.approx(float(expected["train"]["train_gnorm"]), rel=0.02)


TWO_PROCESSES = f"""
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import fairseq
import multimax_fairseq
from conftest import TINY, parse, trained_parameters
from fairseq import tasks
from fairseq.distributed import LegacyDistributedDataParallel, ModuleProxyWrapper


def gradients(data, criterion, ranks, wrap=None):
    "Of the second of two updates, on the sentences of these ranks."
    _, cfg = parse([data, "--arch", "multimax_transformer", *TINY, "--output-mapping", "multimax", "--dropout", 0,
                    "--criterion", criterion, "--share-decoder-input-output-embed", "--label-smoothing", 0.1])
    task = tasks.setup_task(cfg.task)
    task.load_dataset("test")
    dataset, criterion = task.dataset("test"), task.build_criterion(cfg.criterion)
    torch.manual_seed(1)
    model = task.build_model(cfg.model)
    wrapped = ModuleProxyWrapper(wrap(model)) if wrap else model  # as fairseq wraps it, but for the name of a GPU
    for step in range(2):
        model.zero_grad()
        for rank in ranks:
            sample = dataset.collater([dataset[index] for index in range(8 * step + rank, 8 * step + 8, 2)])
            loss, *_ = criterion(wrapped, sample)
            loss.backward()
        if hasattr(wrapped, "all_reduce_grads"):
            wrapped.all_reduce_grads()
    return {{name: parameter.grad for name, parameter in trained_parameters(model)}}


def work(rank, data, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
    wraps = {{"legacy_ddp": lambda model: LegacyDistributedDataParallel(model, torch.distributed.group.WORLD)}}
    if fairseq.__version__ != "0.12.2":  # whose unused parameters PyTorch's waits for
        wraps["pytorch_ddp"] = DistributedDataParallel
    for name, wrap in wraps.items():
        result = gradients(data, "chunked_cross_entropy", (rank,), wrap)
        if rank == 0:
            torch.save({{name: 2 * mean for name, mean in result.items()}}, f"{{folder}}/{{name}}.pt")


if __name__ == "__main__":
    data, folder = sys.argv[1:]
    torch.multiprocessing.spawn(work, (data, folder), nprocs=2)
    torch.save(gradients(data, "label_smoothed_cross_entropy", (0, 1)), f"{{folder}}/one.pt")
"""


@pytest.mark.slow
def test_two_processes_get_the_gradients_of_one(corpus, tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    run(sys.executable, script, corpus / "data-bin", tmp_path)
    expected = torch.load(tmp_path / "one.pt")
    backends = ["legacy_ddp"] if fairseq.__version__ == "0.12.2" else ["legacy_ddp", "pytorch_ddp"]
    for backend in backends:
        assert_same_gradients(torch.load(tmp_path / f"{backend}.pt"), expected)


HYDRA = """
common: {{user_dir: {plugin}, cpu: true, log_format: json, seed: 1}}
task: {{_name: language_modeling, data: {data}, tokens_per_sample: 64}}
criterion: {{_name: chunked_cross_entropy, label_smoothing: 0.1, chunk_tokens: 32}}
dataset: {{max_tokens: 1000, num_workers: 0}}
optimization: {{lr: [0.005], max_update: 2}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: inverse_sqrt, warmup_updates: 20}}
checkpoint: {{save_dir: {folder}}}
model: {{_name: multimax_transformer_lm, decoder_layers: 1, decoder_embed_dim: 16, decoder_ffn_embed_dim: 16,
         decoder_attention_heads: 2, decoder_input_dim: 16, decoder_output_dim: 16}}
"""


@pytest.mark.slow
def test_a_config_file(corpus, tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        HYDRA.format(plugin=PLUGIN, data=corpus / "data-bin-lm", folder=tmp_path / "run")
    )
    result = run("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "tiny", cwd=tmp_path)
    saved = torch.load(tmp_path / "run" / "checkpoint_last.pt")["cfg"]["criterion"]
    assert (saved["label_smoothing"], saved["chunk_tokens"]) == (0.1, 32), result.stderr
