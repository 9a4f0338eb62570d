"""fairseq on current torch and numpy."""

import argparse
import io
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import PLUGIN, ROOT, TINY, run, save_checkpoint
from fairseq import checkpoint_utils
from fairseq.distributed.utils import _split_tensors_from_obj
from omegaconf import OmegaConf

from multimax_fairseq import compat


def test_what_checkpoints_hold_can_be_loaded_and_what_is_unsafe_cannot(build, tmp_path):
    """What --eval-bleu leaves there, too, in the form in which one process sends it another, through torch.load."""
    path = save_checkpoint(build("multimax_transformer_lm"), tmp_path / "a.pt")
    counts = [numpy.arange(4, dtype=dtype) for dtype in ("int64", "float32", "float64")]
    state = {**checkpoint_utils.load_checkpoint_to_cpu(str(path)), "args": argparse.Namespace(arch="x")}
    tensors, file = [], io.BytesIO()
    torch.save(_split_tensors_from_obj({**state, "counts": counts}, tensors), file)
    file.seek(0)
    loaded = torch.load(file)
    assert OmegaConf.is_config(loaded["cfg"]) and loaded["cfg"] == state["cfg"] and tensors
    assert loaded["args"] == state["args"]
    assert all(a.dtype == b.dtype and (a == b).all() for a, b in zip(loaded["counts"], counts))
    if not hasattr(torch.serialization, "add_safe_globals"):
        pytest.skip("this torch loads whatever a file holds")
    torch.save({"code": eval}, tmp_path / "unsafe.pt")
    with pytest.raises(Exception, match="weights_only|WeightsUnpickler"):
        torch.load(tmp_path / "unsafe.pt")


def test_both_datasets_that_need_numpy_compat_build(build, batch):
    for mode in ("eos", "complete", "none"):
        built = build("multimax_transformer_lm", "--sample-break-mode", mode, "--tokens-per-sample", 64)
        built.task.load_dataset("valid")  # token_block_dataset
        assert (len(built.task.dataset("valid")) == 60) == (mode == "eos") and batch(built, "valid")["ntokens"] > 0
    built = build("multimax_transformer", "--num-batch-buckets", 3)
    built.task.load_dataset("valid")  # language_pair_dataset
    lengths = [length for _, length in built.task.dataset("valid").buckets]
    assert 1 < len(lengths) <= 2 * 3 and lengths == sorted(lengths)  # 3 of each language, or the longer of the two


REPLACED = """
import sys, types, numpy
import fairseq.tasks, fairseq.trainer, fairseq.models, fairseq.criterions, fairseq.optim, fairseq.data
import fairseq.options, fairseq.sequence_generator, fairseq.sequence_scorer, fairseq.checkpoint_utils

def names():
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] in ("fairseq", "fairseq_cli") and module is not None:
            for name, value in list(vars(module).items()):
                found[module_name, name] = value
                if isinstance(value, type) and value.__module__ == module_name:
                    found.update(((f"{module_name}.{value.__qualname__}", key), v) for key, v in vars(value).items())
    return found

before, numpy_before = names(), vars(numpy).copy()
import multimax_fairseq.models
after = names()
assert vars(numpy) == numpy_before  # as other libraries see it
changed = {key for key in before if key[1][:2] != "__" or key[1] == "__init__" if after.get(key) is not before[key]}
print(*sorted(".".join(key) for key in changed if not isinstance(before[key], (dict, set, list))))
"""


def test_percentiles_of_old_numpy_are_of_the_values():
    assert compat.OldNumpy("numpy").percentile([1, 2, 4, 8], 40, interpolation="lower") == 2


def test_what_is_replaced_in_fairseq_is_in_the_list():
    """Every name of every module and class of fairseq that an import changes; at most 5; documented."""
    changed = run("python", "-c", REPLACED).stdout.splitlines()[-1].split()
    table = (ROOT / "docs" / "how-it-is-built.md").read_text().partition("## What is replaced")[2]
    listed = set(re.findall(r"`(fairseq\.[\w.]+)`", table))
    assert 2 <= len(changed) <= 5 and set(changed) <= listed


def test_the_root_logger_stays_as_it_is_and_a_command_starts_without_warnings(corpus):
    code = "import logging, multimax_fairseq.models; root = logging.getLogger(); print(root.level, root.handlers)"
    result = run(sys.executable, "-c", code)
    assert (result.stdout, result.stderr) == ("30 []\n", "")
    command = [Path(sys.executable).parent / "fairseq-train", corpus / "data-bin", "--user-dir", PLUGIN, "--arch",
               "multimax_transformer", *TINY, "--optimizer", "adam", "--max-tokens", 500, "--max-update", 1,
               "--no-save", "--cpu", "--num-workers", 0, "--disable-validation"]  # fmt: skip
    log = run(*command)
    assert not re.search("hydra|deprecat", log.stdout.split("begin training")[0] + log.stderr, re.I), log.stderr
