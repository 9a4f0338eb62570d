"""Two processes that fairseq spawns, as for two GPUs, train like one that takes their batches one after the other."""

import json
import re
import shutil
import sys

import fairseq
import pytest
import torch
from conftest import ROOT, TINY, parse, run
from fairseq import tasks

pytestmark = pytest.mark.slow

TRAINING = [
    *("--arch", "multimax_transformer", "--output-mapping", "multimax", "--modulator-lr-scale", "10", *TINY),
    "--share-decoder-input-output-embed",
    *("--criterion", "chunked_cross_entropy", "--label-smoothing", "0.1", "--clip-norm", "1", "--max-tokens", "500"),
    *("--optimizer", "adam", "--lr", "5e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "10"),
    *("--num-workers", "0", "--log-format", "json", "--log-interval", "1", "--cpu", "--max-epoch", "2"),
    # Both processes draw from the same seed, where one process goes on drawing.
    *("--dropout", "0"),
]

# fairseq starts as many processes as torch counts GPUs; these two compute on the CPU all the same.
TWO_GPUS = """
import torch
if __name__ == "__main__":
    torch.cuda.device_count = lambda: 2
    from fairseq_cli.train import cli_main
    cli_main()
"""

# fairseq gives PyTorch's the name of a GPU.
WITHOUT_DEVICES = """
from fairseq.models import distributed_fairseq_model

class OnCPU(distributed_fairseq_model.DistributedDataParallel):
    def __init__(self, module, device_ids, output_device, **options):
        super().__init__(module, **options)

distributed_fairseq_model.DistributedDataParallel = OnCPU
"""


def train(folder, program, *options):
    """The lines of all updates, and of the validations, in the log; and the log."""
    result = run(*program, *TRAINING, "--save-dir", folder, *options)
    log = result.stderr + result.stdout
    lines = re.findall(r"(train_inner|valid)\W+(\{.*\})", log)
    return *([json.loads(line) for kind, line in lines if kind == wanted] for wanted in ("train_inner", "valid")), log


def assert_same_training(alone, together, folder):
    """Equal losses, gradient norms and numbers of tokens at each update, and equal models at the end."""
    for ours, theirs, fields in zip(alone, together, (["loss", "gnorm"], ["valid_loss", "valid_ppl"])):
        assert len(ours) == len(theirs) > 0
        for line, other in zip(ours, theirs):
            for field in fields:
                # printed with three decimals: one unit in the last, for a sum that is rounded in another order
                assert float(other[field]) == pytest.approx(float(line[field]), abs=1.5e-3, rel=1e-4), field
    for field in ("num_updates", "wpb", "bsz", "lr"):  # the same sentences in each update
        assert [line[field] for line in alone[0]] == [line[field] for line in together[0]]
    states = [torch.load(folder / name / "checkpoint_last.pt")["model"] for name in ("alone", "together")]
    for name, tensor in states[0].items():
        if not name.endswith("_float_tensor"):  # fairseq 0.12.2 never sets it
            # fp32, gradients summed in another order. Adam makes of a gradient near 0 a step of up to lr, whatever
            # its size, so what is left of rounding can be seen in single parameters.
            torch.testing.assert_close(states[1][name], tensor, atol=5e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("backend, attention", [
    ("legacy_ddp", "topk_softmax"),  # a mapping of one's own, in a folder of another name
    pytest.param("pytorch_ddp", "multimax", marks=pytest.mark.skipif(
        fairseq.__version__ == "0.12.2", reason="PyTorch's waits for the parameters that 0.12.2 does not use")),
])  # fmt: skip
def test_two_spawned_processes_train_like_one(backend, attention, corpus, tmp_path):
    _, cfg = parse([corpus / "data-bin", *TRAINING])
    task = tasks.setup_task(cfg.task)
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_tokens=500, required_batch_size_multiple=8, seed=1)
    assert len(batches) % 2, "for the last update of an epoch the second process has to be without a batch"

    shutil.copytree(ROOT / "examples" / "own_mapping", tmp_path / "my_mappings")
    with open(tmp_path / "my_mappings" / "__init__.py", "a") as file:
        file.write(WITHOUT_DEVICES)
    options = [corpus / "data-bin", "--user-dir", tmp_path / "my_mappings", "--attention-mapping", attention]
    *alone, _ = train(tmp_path / "alone", ["fairseq-train"], *options, "--update-freq", 2)
    (tmp_path / "spawn.py").write_text(TWO_GPUS)
    *together, log = train(tmp_path / "together", [sys.executable, tmp_path / "spawn.py"], *options,
                           "--distributed-world-size", 2, "--distributed-backend", "gloo",
                           "--ddp-backend", backend)  # fmt: skip
    assert "distributed init (rank 1)" in log and "'distributed_no_spawn': False" in log
    assert_same_training(alone, together, tmp_path)
    losses = [float(line["loss"]) for line in alone[0]]
    assert len(losses) == len(batches) + 1  # two epochs
    assert losses[0] - losses[-1] > 0.5, "nothing was learned, so equal losses say nothing"
