"""fairseq spawns a process for each GPU: with --user-dir, they train like one process."""

import json
import re
import shutil
import sys

import pytest
from conftest import ROOT, TINY, run

pytestmark = pytest.mark.slow

# fairseq starts as many processes as torch counts GPUs; these two compute on the CPU all the same.
TWO_GPUS = """
import torch
if __name__ == "__main__":
    torch.cuda.device_count = lambda: 2
    from fairseq_cli.train import cli_main
    cli_main()
"""
TRAINING = [
    *("--arch", "multimax_transformer", *TINY, "--dropout", 0, "--cpu", "--num-workers", 0, "--max-tokens", 500),
    *("--optimizer", "adam", "--lr", "5e-3", "--max-update", 8, "--log-format", "json", "--log-interval", 1),
]
TOGETHER = ["--distributed-world-size", 2, "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]


def losses_of(folder, program, *options, **where):
    """Those of eight updates, to the three decimals of the log; and the log."""
    result = run(*program, *TRAINING, "--save-dir", folder, *options, **where)
    log = result.stderr + result.stdout
    lines = [json.loads(line) for line in re.findall(r"train_inner\W+(\{.*\})", log)]
    assert [line["num_updates"] for line in lines] == [str(update) for update in range(1, 9)], log
    return [float(line["loss"]) for line in lines], log


def spawned_losses(folder, *options, **where):
    """Of two processes that fairseq has started."""
    (folder / "spawn.py").write_text(TWO_GPUS)
    program = [sys.executable, folder / "spawn.py"]
    losses, log = losses_of(folder / "together", program, *options, *TOGETHER, **where)
    assert "distributed init (rank 1)" in log and "'distributed_no_spawn': False" in log
    return losses


def test_two_spawned_processes_train_like_one(corpus, tmp_path):
    """With a mapping of one's own, in a folder of another name."""
    shutil.copytree(ROOT / "examples" / "own_mapping", tmp_path / "my_mappings")
    options = ["--user-dir", tmp_path / "my_mappings", "--attention-mapping", "topk_softmax"]
    alone, _ = losses_of(tmp_path / "alone", ["fairseq-train"], corpus / "data-bin", *options, "--update-freq", 2)
    together = spawned_losses(tmp_path, corpus / "data-bin", *options)
    assert together == pytest.approx(alone, abs=1.5e-3) and alone[0] - alone[-1] > 0.3
