"""Two processes that share the batches of an update train like one that takes them one after the other."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import fairseq
import pytest
import torch
from conftest import PLUGIN, TINY, parse, run
from fairseq import tasks

pytestmark = pytest.mark.slow

TRAINING = [
    *("--arch", "multimax_transformer", "--output-mapping", "multimax", "--modulator-lr-scale", "10", *TINY),
    "--share-decoder-input-output-embed",
    *("--criterion", "chunked_cross_entropy", "--label-smoothing", "0.1", "--clip-norm", "1"),
    *("--optimizer", "adam", "--lr", "5e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "10"),
    *("--num-workers", "0", "--log-format", "json", "--log-interval", "1", "--cpu"),
    # Both processes draw from the same seed, where one process goes on drawing.
    *("--dropout", "0"),
]
TOGETHER = ["--distributed-world-size", 2, "--distributed-no-spawn", "--distributed-backend", "gloo"]

BACKENDS = ["legacy_ddp"]
if fairseq.__version__ != "0.12.2":  # whose unused parameters PyTorch's waits for
    BACKENDS.append("pytorch_ddp")

# fairseq gives PyTorch's the name of a GPU.
WITHOUT_DEVICES = """
from fairseq.models import distributed_fairseq_model
import multimax_fairseq.models

class OnCPU(distributed_fairseq_model.DistributedDataParallel):
    def __init__(self, module, device_ids, output_device, **options):
        super().__init__(module, **options)

distributed_fairseq_model.DistributedDataParallel = OnCPU
"""


def train(*options):
    """The lines of all updates, and of the validations, in the log."""
    result = run("fairseq-train", *options)
    lines = re.findall(r"(train_inner|valid)\W+(\{.*\})", result.stderr + result.stdout)
    return [[json.loads(line) for kind, line in lines if kind == wanted] for wanted in ("train_inner", "valid")]


def assert_same_training(alone, together, folders):
    """Equal losses, gradient norms and numbers of tokens at each update, and equal models at the end."""
    for (ours, theirs), fields in zip(zip(alone, together), (["loss", "gnorm"], ["valid_loss", "valid_ppl"])):
        assert len(ours) == len(theirs) > 0
        for line, other in zip(ours, theirs):
            for field in fields:
                # printed with three decimals: one unit in the last, for a sum that is rounded in another order
                assert float(other[field]) == pytest.approx(float(line[field]), abs=1.5e-3, rel=1e-4), field
    for field in ("num_updates", "wpb", "bsz", "lr"):  # the same sentences in each update
        assert [line[field] for line in alone[0]] == [line[field] for line in together[0]]
    states = [torch.load(folder / "checkpoint_last.pt")["model"] for folder in folders]
    for name, tensor in states[0].items():
        if not name.endswith("_float_tensor"):  # fairseq 0.12.2 never sets it
            # fp32, gradients summed in another order. Adam makes of a gradient near 0 a step of up to lr, whatever
            # its size, so what is left of rounding can be seen in single parameters.
            torch.testing.assert_close(states[1][name], tensor, atol=5e-4, rtol=1e-3, msg=name)


def test_two_processes_train_like_one_with_twice_the_update_frequency(corpus, tmp_path):
    data = [corpus / "data-bin", "--max-tokens", 500]
    _, cfg = parse([*data, *TRAINING])
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_tokens=500, required_batch_size_multiple=8, seed=1)
    assert len(batches) % 2, "for the last update of an epoch the second process has to be without a batch"

    (tmp_path / "on_cpu").mkdir()
    (tmp_path / "on_cpu" / "__init__.py").write_text(WITHOUT_DEVICES)
    options = [*data, *TRAINING, "--max-epoch", 2, "--save-dir"]
    alone = train(*options, tmp_path / "alone", "--user-dir", PLUGIN, "--update-freq", 2)
    for backend in BACKENDS:
        both = [*options, tmp_path / backend, "--user-dir", tmp_path / "on_cpu", *TOGETHER, "--ddp-backend", backend,
                "--distributed-init-method", f"file://{tmp_path}/{backend}-store", "--distributed-rank"]
        with ThreadPoolExecutor() as pool:
            together, _ = pool.map(train, *zip([*both, 0], [*both, 1]))
        assert_same_training(alone, together, [tmp_path / "alone", tmp_path / backend])
    losses = [float(line["loss"]) for line in alone[0]]
    assert len(losses) == len(batches) + 1  # two epochs
    assert losses[0] - losses[-1] > 0.5, "nothing was learned, so equal losses say nothing"
