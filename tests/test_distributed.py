"""Two processes that share the batches of an update train like one that takes them one after the other."""

import json
import re
import socket
import subprocess

import pytest
import torch
from conftest import PLUGIN, TINY, environment, parse, run
from fairseq import tasks

pytestmark = pytest.mark.slow

TRAINING = [
    *("--user-dir", PLUGIN, "--arch", "multimax_transformer", "--output-mapping", "multimax", *TINY),
    *("--criterion", "chunked_cross_entropy", "--label-smoothing", "0.1", "--clip-norm", "1"),
    *("--optimizer", "adam", "--lr", "5e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "10"),
    *("--num-workers", "0", "--log-format", "json", "--log-interval", "1", "--cpu"),
    # Both processes draw from the same seed, where one process goes on drawing.
    *("--dropout", "0"),
]
# fairseq's own way to start processes counts graphics cards, so each gets its rank here; its c10d is tied to these
# cards, too, and its legacy_ddp is not.
TOGETHER = ["--distributed-world-size", "2", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp",
            "--distributed-no-spawn"]  # fmt: skip


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def updates(log):
    """The lines of all updates in a log, and of the validations."""
    lines = re.findall(r"\| (train_inner|valid) \| (\{.*\})", log)
    return [[json.loads(line) for kind, line in lines if kind == wanted] for wanted in ("train_inner", "valid")]


def train_alone(*command):
    result = run(*command)
    return updates(result.stderr + result.stdout)


def train_together(*command):
    """The same command in two processes; what the first one logs."""
    address = ["--distributed-init-method", f"tcp://127.0.0.1:{free_port()}"]
    commands = [[*command, *TOGETHER, *address, "--distributed-rank", rank] for rank in (0, 1)]
    processes = [
        subprocess.Popen([str(part) for part in command], text=True, env=environment(),
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for command in commands
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return updates(outputs[0])


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

    command = ["fairseq-train", *data, *TRAINING, "--max-epoch", 2, "--save-dir"]
    alone = train_alone(*command, tmp_path / "alone", "--update-freq", 2)
    together = train_together(*command, tmp_path / "together")
    assert_same_training(alone, together, [tmp_path / "alone", tmp_path / "together"])
    losses = [float(line["loss"]) for line in alone[0]]
    assert len(losses) == len(batches) + 1  # two epochs
    assert losses[0] - losses[-1] > 0.5, "nothing was learned, so equal losses say nothing"
