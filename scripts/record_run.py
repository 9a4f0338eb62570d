#!/usr/bin/env python
"""Writes run.json: the scores of a training run, and everything that they depend on.

    python scripts/record_run.py runs/a --experiment multi30k_de_en

examples/*/run.sh ends with it. The folder holds fairseq-train's checkpoint_best.pt, checkpoint_last.pt and train.log,
and the evaluation's NAME.bleu, NAME.hypotheses and NAME.references (from scripts/score_translation.sh), or
SPLIT.context-WINDOW.eval (the output of fairseq-eval-lm). What the run was is read from the configuration in its
checkpoint. scripts/results_table.py makes tables of such files.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
from settings import UPDATES, mapping_of, settings_of
from texts import read_text
from torch import Tensor

import multimax_fairseq
from multimax_fairseq import tools

FORMAT = 2  # of run.json; results_table.py refuses another one
DISTRIBUTIONS = ("torch", "fairseq", "ve-fairseq", "numpy", "entmax", "sacrebleu", "sentencepiece", "sacremoses",
                 "subword-nmt")
NUMBER = r"\d+(?:\.\d+)?"
SPARSE = ("sparsemax", "entmax15", "entmax")


def validation(folder: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The best checkpoint on validation: its criterion, number of updates, and perplexity."""
    path = folder / "checkpoint_best.pt"
    updates = tools.entry(checkpoint, path, *UPDATES)
    found = {
        "updates": updates,
        "metric": tools.entry(checkpoint, path, "cfg", "checkpoint", "best_checkpoint_metric"),
        "value": float(tools.entry(checkpoint, path, "extra_state", "val_loss")),
    }
    log = folder / "train.log"
    # "epoch 001 | valid on 'valid' subset | loss 4.302 | nll_loss 2.744 | ppl 6.7 | … | num_updates 130 | …"
    of_valid = rf"^.* \| valid on .*? \| loss ({NUMBER}) .*? \| ppl ({NUMBER}) .*\| num_updates {updates}\b"
    for loss, ppl in re.findall(of_valid, read_text(log), re.M) if log.is_file() else ():
        found.update(loss=float(loss), ppl=float(ppl))
    return found


def bleu_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each translation, ``best`` first: BLEU, its signature and the files that it was computed from."""
    scores = {}
    for path in sorted(folder.glob("*.bleu"), key=lambda path: (path.stem != "best", path.stem)):
        text = read_text(path).strip()
        match = re.match(rf"(BLEU\|\S+) = ({NUMBER}) ", text)
        if match is None:
            raise tools.UserError(f"{path} is not what sacrebleu prints: {text[:80]!r}")
        scores[path.stem] = {"bleu": float(match[2]), "signature": match[1], "details": text,
                             "hypotheses": f"{path.stem}.hypotheses", "references": f"{path.stem}.references"}
    return scores


def perplexities(folder: Path, is_sparse: bool) -> dict[str, dict[str, Any]]:
    """Results of fairseq-eval-lm by split and context window, longest first: ``test, context 400``.

    Args:
        is_sparse: the vocabulary's mapping has zeros: fairseq-eval-lm then prints ε-perplexity, another quantity.
    """
    scores = {}
    names = [re.fullmatch(r"(\w+)\.context-(\d+)\.eval", path.name) for path in folder.glob("*.context-*.eval")]
    for name in sorted(filter(None, names), key=lambda name: (name[1], -int(name[2]))):
        path = folder / name[0]
        text = read_text(path)
        loss = re.search(rf"Loss \(base 2\): {NUMBER}, Perplexity: ({NUMBER})\s", text)
        tokens = re.search(r"Evaluated ([\d,]+) tokens", text)
        if loss is None or tokens is None:
            raise tools.UserError(f"{path} is not what fairseq-eval-lm prints of a finite perplexity")
        number = int(tokens[1].replace(",", ""))
        if not number:
            raise tools.UserError(f"{path}: no token was evaluated: is the split empty?")
        kind = "epsilon_perplexity" if is_sparse else "perplexity"
        scores[f"{name[1]}, context {name[2]}"] = {kind: float(loss[1]), "tokens": number, "output": name[0]}
    return scores


def versions() -> dict[str, str]:
    """The versions of everything that a score can depend on."""
    found = {"python": platform.python_version(), "multimax_fairseq": multimax_fairseq.__version__}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """The processor and graphics cards, without names of machines or users."""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def record(folder: Path) -> dict[str, Any]:
    """Everything about a run except the commands that made it.

    Raises:
        UserError: a checkpoint or the scores are missing, or a file is not what it should be.
    """
    best_path, last_path = folder / "checkpoint_best.pt", folder / "checkpoint_last.pt"
    for path in (best_path, last_path):
        if not path.is_file():
            raise tools.UserError(f"{folder} has no {path.name}: train first")
    best = tools.read_checkpoint(best_path)
    cfg = tools.entry(best, best_path, "cfg")
    mapping = mapping_of(tools.entry(cfg, best_path, "model"))
    scores = {**bleu_scores(folder), **perplexities(folder, mapping.get("output_mapping") in SPARSE)}
    if not scores:
        raise tools.UserError(f"{folder} has no scores: neither best.bleu nor a *.context-*.eval")
    found = {
        "scores": scores,
        "validation": validation(folder, best),
        "mapping": mapping,
        "settings": settings_of(cfg),
        "seed": tools.entry(cfg, best_path, "common", "seed"),
        "parameters": count_parameters(best["model"]),
    }
    del best  # one checkpoint at a time: they can be large
    last = tools.read_checkpoint(last_path)
    return {
        **found,
        "updates": tools.entry(last, last_path, *UPDATES),
        "whole_epochs": tools.entry(last, last_path, "extra_state", "train_iterator", "epoch") - 1,  # it is the next
        # from fairseq's checkpoint, so summed over resumed runs, without lost work; of processes, a tensor
        "training_seconds": round(float(tools.entry(last, last_path, "extra_state", "previous_training_time")), 1),
        "versions": versions(),
        "hardware": hardware(),
    }


def count_parameters(state: dict[str, Tensor]) -> int:
    """Shared ones (embeddings and output) count once, fairseq's own marks do not."""
    parameters = (tensor for name, tensor in state.items() if not name.endswith(("version", "_float_tensor")))
    return sum({tensor.data_ptr(): tensor.numel() for tensor in parameters}.values())


def main() -> None:
    parser = tools.ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, help="of the run; run.json is written there")
    parser.add_argument("--experiment", required=True, help="what the table is called that the run belongs to")
    parser.add_argument("--command", help="that started all of it")
    args = parser.parse_args()
    with tools.errors_in_a_line():
        found = record(args.folder)
        whole = {"format": FORMAT, "experiment": args.experiment, "command": args.command, **found}
        text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with tools.replacing(args.folder / "run.json") as file:
            file.write(text.encode(errors="backslashreplace"))
    print(f"wrote {args.folder / 'run.json'}")


if __name__ == "__main__":
    main()
