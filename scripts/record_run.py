#!/usr/bin/env python
"""Writes run.json: the scores of a training run, and everything that they depend on.

    python scripts/record_run.py runs/multi30k_de_en/multimax-seed1 --experiment multi30k_de_en

examples/*/run.sh calls it when a model is scored. The folder holds fairseq-train's checkpoint_best.pt,
checkpoint_last.pt and train.log, and the evaluation's NAME.bleu and NAME.hypotheses for `best` and `average` (from
scripts/score_translation.sh), or SPLIT.context-WINDOW.eval (the output of fairseq-eval-lm). Settings are read from
the checkpoint where possible, not from the command line. scripts/results_table.py makes tables of such files.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import multimax_fairseq
from multimax_fairseq.tools import (
    ArgumentParser,
    UserError,
    entry,
    errors_in_a_line,
    read_checkpoint,
    replacing,
)

FORMAT = 1  # of run.json; a reader can refuse another one
DISTRIBUTIONS = ("torch", "fairseq", "ve-fairseq", "numpy", "entmax", "sacrebleu", "sentencepiece", "sacremoses",
                 "subword-nmt")  # fmt: skip
OPTIONS = ("attention_mapping", "attention_mapping_sites", "output_mapping", "multimax_order", "multimax_terms",
           "multimax_init", "entmax_alpha", "attention_scale", "modulator_lr_scale", "mapping_options")  # fmt: skip


def option(model: Any, name: str) -> Any:
    """An option of the model, from its checkpoint's namespace or (fairseq-hydra-train) config."""
    return model.get(name) if hasattr(model, "get") else getattr(model, name, None)


def mapping_of(model: Any) -> dict[str, Any]:
    """The choice of mappings by flag name; for fairseq's own model ``attention_mapping`` is ``stock``."""
    choice = {name: option(model, name) for name in OPTIONS}
    return choice if choice["attention_mapping"] else {"attention_mapping": "stock"}


def learned_parameters(state: dict[str, Tensor]) -> dict[str, dict[str, list]]:
    """What the mappings have learned, by module.

    Args:
        state: the parameters of a checkpoint by name.

    Returns:
        by module: ``thresholds`` and ``gains``, both (order, 2), or ``alpha_logits``, (heads,), or of a scale ``t``,
        (1,), or ``s``, (heads,), with six decimals.
    """
    learned: dict[str, dict[str, list]] = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if parameter in ("thresholds", "gains", "alpha_logits") or module.endswith("_attn.scale"):
            learned.setdefault(module, {})[parameter] = tensor.double().mul(1e6).round().div(1e6).tolist()
    return learned


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8. Remove it, and evaluate again") from None


def updates_of(checkpoint: dict[str, Any], path: Path) -> int:
    """The number of updates before the checkpoint was saved."""
    return entry(checkpoint, path, "optimizer_history", -1, "num_updates")


def validation(folder: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The best checkpoint on validation: its criterion, number of updates, and perplexity."""
    path = folder / "checkpoint_best.pt"
    updates = updates_of(checkpoint, path)
    found = {
        "updates": updates,
        "metric": entry(checkpoint, path, "cfg", "checkpoint", "best_checkpoint_metric"),
        "value": entry(checkpoint, path, "extra_state", "val_loss"),
    }
    log = folder / "train.log"
    for line in read_text(log).splitlines() if log.is_file() else ():
        # "epoch 001 | valid on 'valid' subset | loss 4.302 | nll_loss 2.744 | ppl 6.7 | … | num_updates 130 | …"
        fields = dict(part.split(" ", 1) for part in line.split(" | ") if part.count(" ") == 1)
        if " | valid on " in line and fields.get("num_updates") == str(updates):
            found.update({name: float(fields[name]) for name in ("loss", "ppl") if is_number(fields.get(name))})
    return found


def is_number(text: str | None) -> bool:
    return re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", text or "") is not None and math.isfinite(float(text))


def bleu_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """For ``best`` and ``average``, if scored: BLEU, its signature and the files that it was computed from."""
    scores = {}
    for name in ("best", "average"):
        path = folder / f"{name}.bleu"
        if path.is_file():
            text = read_text(path).strip()
            match = re.match(r"(BLEU\|\S+) = (\d+(?:\.\d+)?) ", text)
            if match is None:
                raise UserError(f"{path} is not what sacrebleu prints: {text[:80]!r}")
            scores[name] = {"bleu": float(match[2]), "signature": match[1], "details": text,
                            "hypotheses": f"{name}.hypotheses", "references": "references"}  # fmt: skip
    return scores


def perplexities(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of fairseq-eval-lm by split and context window, longest first: ``test, context 400``."""
    scores = {}
    names = [re.fullmatch(r"(\w+)\.context-(\d+)\.eval", path.name) for path in folder.glob("*.context-*.eval")]
    for name in sorted(filter(None, names), key=lambda name: (name[1], -int(name[2]))):
        path = folder / name[0]
        text = read_text(path)
        loss = re.search(r"Loss \(base 2\): (\S+), Perplexity: (\S+)", text)
        tokens = re.search(r"Evaluated ([\d,]+) tokens", text)
        if loss is None or tokens is None or not (is_number(loss[1]) and is_number(loss[2])):
            raise UserError(f"{path} is not what fairseq-eval-lm prints of a finite perplexity")
        number = int(tokens[1].replace(",", ""))
        if not number:
            raise UserError(f"{path}: no token was evaluated, so its perplexity says nothing: is the split empty?")
        scores[f"{name[1]}, context {name[2]}"] = {
            "perplexity": float(loss[2]),
            "bits_per_token": float(loss[1]),
            "tokens": number,
        }
    return scores


def versions() -> dict[str, str]:
    """The versions of everything that a score can depend on."""
    found = {"python": platform.python_version(), "multimax_fairseq": multimax_fairseq.__version__}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
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
            raise UserError(f"{folder} has no {path.name}: train first")
    scores = {**bleu_scores(folder), **perplexities(folder)}
    if not scores:
        raise UserError(f"{folder} has no scores: neither best.bleu nor a *.context-*.eval")
    best = read_checkpoint(best_path)
    found = {
        "scores": scores,
        "validation": validation(folder, best),
        "mapping": mapping_of(entry(best, best_path, "cfg", "model")),
        "seed": entry(best, best_path, "cfg", "common", "seed"),
        "processes": entry(best, best_path, "cfg", "distributed_training", "distributed_world_size"),
        "tokens_per_batch": entry(best, best_path, "cfg", "dataset", "max_tokens"),
        "update_freq": list(entry(best, best_path, "cfg", "optimization", "update_freq")),
        "parameters": sum(tensor.numel() for tensor in unique_storage(best["model"])),
        "learned": learned_parameters(best["model"]),
    }
    del best  # one checkpoint at a time: they can be large
    last = read_checkpoint(last_path)
    return {
        **found,
        "updates": updates_of(last, last_path),
        # the iterator's epoch is the next one
        "whole_epochs": entry(last, last_path, "extra_state", "train_iterator", "epoch") - 1,
        # from fairseq's checkpoint, so summed over resumed runs, without lost work
        "training_seconds": round(entry(last, last_path, "extra_state", "previous_training_time"), 1),
        "versions": versions(),
        "hardware": hardware(),
    }


def unique_storage(state: dict[str, Tensor]) -> list[Tensor]:
    """The parameters, shared ones (embeddings and output) counted once, without fairseq's own marks."""
    by_storage = {
        tensor.data_ptr(): tensor for name, tensor in state.items() if not name.endswith(("version", "_float_tensor"))
    }
    return list(by_storage.values())


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, help="of the run; run.json is written there")
    parser.add_argument("--experiment", required=True, help="what the table is called that the run belongs to")
    parser.add_argument("--smoke", action="store_true", help="made-up data: the scores mean nothing")
    parser.add_argument("--command", help="that started all of it")
    parser.add_argument("--train-command", help="the command of fairseq-train")
    args = parser.parse_args()
    with errors_in_a_line():
        found = record(args.folder)
        commands = {"command": args.command, "train_command": args.train_command}
        whole = {"format": FORMAT, "experiment": args.experiment, "smoke": args.smoke, **found, **commands}
        with replacing(args.folder / "run.json") as file:
            text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            file.write(text.encode(errors="backslashreplace"))
    print(f"wrote {args.folder / 'run.json'}")


if __name__ == "__main__":
    main()
