"""What a run was, from the configuration in its checkpoint: for begin_run.py and record_run.py."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

# Fields that change no result: paths, logs, processes that load, when a checkpoint is saved, how search looks.
COMMON = re.compile(r"(memory_efficient_)?(fp16|bf16)(_.*)?|amp(_.*)?|.*loss_scale|on_cpu_convert_precision")
WITHOUT_EFFECT = {
    "data", "num_workers", "data_buffer_size", "dataset_impl", "gen_subset", "shard_id", "num_shards",
    "debug_param_names", "log_modulators", "eval_bleu_print_samples",
}
CHECKPOINT = ("best_checkpoint_metric", "maximize_best_checkpoint_metric", "patience", "finetune_from_model",
              "restore_file")
NAMES_OF_PARTS = ("task", "criterion", "optimizer", "lr_scheduler")
UPDATES = ("optimizer_history", -1, "num_updates")  # where a checkpoint has them
LENGTH = ("max_update", "max_epoch", "stop_time_hours")
MAPPING = ("attention_mapping", "mapping_options", "attention_mapping_sites", "attention_scale", "output_mapping",
           "multimax_order", "multimax_terms", "multimax_init", "entmax_alpha", "modulator_lr_scale")


def plain(part: Any) -> dict[str, Any]:
    """A part of a configuration, also of a namespace, with lists for tuples and without fields that are unset."""
    part = OmegaConf.to_container(part, resolve=True, enum_to_str=True) if OmegaConf.is_config(part) else part
    fields = part if isinstance(part, dict) else vars(part) if part is not None else {}
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    return {key: value for key, value in listed.items() if value is not None}


def dictionary_of(data: str) -> str | None:
    """First digits of the SHA-256 of the dictionaries in a folder of data; None if it has none."""
    files = sorted(Path(data.split(":")[0]).glob("dict*.txt"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:8] if files else None


def settings_of(cfg: Any) -> dict[str, Any]:
    """All settings of a run that can change its result, but for the seed and the mappings, by fairseq's names."""
    parts = {name: plain(part) for name, part in plain(cfg).items()}
    found = {name: parts[name].get("_name") for name in NAMES_OF_PARTS if name in parts}
    model = parts["model"]
    found["arch"] = model.get("arch") or model.get("_name")
    known = set().union(*(part for name, part in parts.items() if name != "model"), found)
    found |= {key: value for key, value in parts["common"].items() if COMMON.fullmatch(key)}
    found |= {key: parts["checkpoint"].get(key) for key in CHECKPOINT}
    found["dictionary"] = dictionary_of(parts["task"].get("data") or "")
    found["distributed_world_size"] = parts["distributed_training"]["distributed_world_size"]
    for name in ("dataset", "optimization", "ema", *NAMES_OF_PARTS):
        found |= parts.get(name, {})
    # The namespace of a model trained by flags holds all flags, those of the other parts too.
    found |= {key: value for key, value in model.items() if key not in known}
    skipped = {*WITHOUT_EFFECT, *MAPPING, "_name", "seed", "no_seed_provided", "scoring", "tokenizer", "bpe"}
    return {key: value for key, value in sorted(found.items()) if key not in skipped and value is not None}


def mapping_of(model: Any) -> dict[str, Any]:
    """The choice of mappings, as far as it has an effect; of fairseq's own: ``{"attention_mapping": "stock"}``."""
    model = plain(model)
    if "attention_mapping" not in model:
        return {"attention_mapping": "stock"}
    found = {key: model[key] for key in MAPPING if key in model}
    used = {found["attention_mapping"], found.get("output_mapping")}
    drop = [] if found.get("mapping_options") else ["mapping_options"]
    if "multimax" not in used:
        drop += ["multimax_order", "multimax_terms", "multimax_init", "modulator_lr_scale"]
    if "entmax" not in used:
        drop += ["entmax_alpha"]
    if (found["attention_mapping"], found.get("attention_scale", "none")) == ("softmax", "none"):
        drop += ["attention_mapping_sites"]
    for key in ("attention_mapping_sites", "multimax_terms"):  # in one order
        if key in found:
            names = found[key] if isinstance(found[key], list) else found[key].split(",")
            found[key] = ",".join(sorted(name.strip() for name in names))
    return {key: value for key, value in found.items() if key not in drop}
