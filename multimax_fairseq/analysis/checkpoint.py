"""Loads a model and its data from files; errors say what to do."""

import glob
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from fairseq import checkpoint_utils, utils
from fairseq.data import Dictionary, FairseqDataset
from fairseq.tasks import FairseqTask
from torch import nn

from .. import models  # noqa: F401  registers the models, so that fairseq can load them
from .collect import attention_modules
from .files import UserError, read_checkpoint


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and the data to analyse it with.

    Attributes:
        label: its name in figures and tables.
        path: its checkpoint.
        architecture: its ``--arch``.
        indices: the sentences (language model: samples) to analyse, in the order of the split.
    """

    label: str
    path: Path
    architecture: str
    model: nn.Module
    task: FairseqTask
    dataset: FairseqDataset
    indices: List[int]

    @property
    def is_translation(self) -> bool:
        return hasattr(self.model, "encoder") and hasattr(self.model, "decoder")

    @property
    def source_dictionary(self) -> Dictionary:
        return self.task.source_dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.task.target_dictionary


def labels_of(paths: Sequence[Path]) -> List[str]:
    """A short name for each checkpoint: its folder's name, or its path if folder names are not distinct."""
    for name in (lambda path: path.parent.name or path.stem, lambda path: f"{path.parent.name}/{path.stem}", str):
        labels = [name(path.absolute()) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    raise UserError("the same checkpoint is given twice")


def load(path: Path, label: str, data: Path, split: str, max_sentences: int, device: torch.device) -> LoadedModel:
    """Load a checkpoint of fairseq or of this plugin, and a split of the data.

    Raises:
        UserError: the file is no checkpoint; the data does not fit it; the split is missing, empty or damaged; or
            the model has no attention.
    """
    model, cfg, task = load_model(path, data)
    try:
        attention_modules(model)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    dataset = load_split(task, data, split)
    indices = list(range(len(dataset)))[:max_sentences]
    check_sentences(task, dataset, indices, f"the split {split!r} of {data}")
    architecture = str(getattr(cfg.model, "arch", None) or getattr(cfg.model, "_name", None) or type(model).__name__)
    return LoadedModel(label, path, architecture, model.to(device), task, dataset, indices)


def load_model(path: Path, data: Path) -> Tuple[nn.Module, Any, FairseqTask]:
    """Load a checkpoint's model in evaluation mode on the CPU, its configuration, and its task on these data.

    Raises:
        UserError: the file is no checkpoint, or the data does not fit it.
    """
    if not data.is_dir():
        raise UserError(f"there is no folder {data}")
    if os.pathsep in str(data):
        raise UserError(f"{data}: fairseq takes {os.pathsep!r} for what separates folders: give one without it")
    read_checkpoint(path)  # for checks that fairseq does not make
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(str(path), {"data": str(data)})
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], state=state)
    except FileNotFoundError as error:
        raise UserError(
            f"{data} has no dictionary {Path(str(error.filename or error)).name}, which {path} needs: "
            "give the folder that fairseq-preprocess made for this model"
        ) from error
    except Exception as error:
        if "size mismatch" in str(error):
            raise UserError(
                f"the vocabulary of {path} is another one than that of {data}: give the folder that it was trained "
                f"on ({_first_line(error, 'size mismatch')})"
            ) from error
        raise UserError(
            f"{path}: its model cannot be built with the data in {data}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    return model.eval(), cfg, task


def load_split(task: FairseqTask, data: Path, split: str) -> FairseqDataset:
    """Load a split of a task's data.

    Raises:
        UserError: it is missing, empty, or cannot be read.
    """
    # fairseq cannot open a file without tokens, and closing it raises another error
    if any(file.stat().st_size == 0 for file in data.glob(f"{glob.escape(split)}.*bin")):
        raise UserError(f"the split {split!r} of {data} is empty: there is nothing in it")
    try:
        task.load_dataset(split)
    except FileNotFoundError as error:
        splits = sorted({file.name.split(".")[0] for file in data.glob("*.idx")})
        raise UserError(
            f"{data} has no split {split!r} for this model; --split takes one of: {', '.join(splits) or 'none'}"
        ) from error
    except Exception as error:
        raise UserError(
            f"the split {split!r} of {data} cannot be read: {type(error).__name__}: {_first_line(error)}"
        ) from error
    dataset = task.dataset(split)
    if not len(dataset):
        raise UserError(f"the split {split!r} of {data} is empty: there is nothing in it")
    return dataset


def check_sentences(task: FairseqTask, dataset: FairseqDataset, indices: Sequence[int], where: str) -> None:
    """Check that these sentences can be read and that the dictionaries have their words.

    Raises:
        UserError: a file is missing or cut short, or was made with other dictionaries.
    """
    if getattr(dataset, "tgt", dataset) is None:
        raise UserError(f"{where} has no text in the target language: files of it are missing")
    words = {"source": len(task.source_dictionary), "target": len(task.target_dictionary)}
    for index in indices:
        try:
            item = dataset[index]
            sides = {side: item[side] for side in words if item[side] is not None}
            are_known = all(tokens.min() >= 0 and tokens.max() < words[side] for side, tokens in sides.items())
        except Exception as error:  # numpy's, from a memory map
            raise UserError(f"{where} is damaged or cut short: sentence {index} cannot be read") from error
        if not are_known:
            raise UserError(
                f"{where} has words that its dictionary lacks (in sentence {index}): the two are not of one "
                "fairseq-preprocess, or damaged"
            )


def _first_line(error: Exception, containing: str = "") -> str:
    lines = [line.strip() for line in str(error).splitlines() if containing in line and line.strip()]
    return lines[0] if lines else ""


def batches(loaded: LoadedModel, max_tokens: int, device: torch.device) -> Iterator[Dict[str, Any]]:
    """Batches of sentences of similar length on the device: at most ``max_tokens`` tokens, or a single sentence."""
    by_length = sorted(loaded.indices, key=loaded.dataset.num_tokens)
    group: List[int] = []
    for index in by_length:
        if group and (len(group) + 1) * loaded.dataset.num_tokens(index) > max_tokens:
            yield _batch(loaded, group, device)
            group = []
        group.append(index)
    yield _batch(loaded, group, device)


def _batch(loaded: LoadedModel, indices: List[int], device: torch.device) -> Dict[str, Any]:
    sample = loaded.dataset.collater([loaded.dataset[index] for index in indices])
    return utils.apply_to_sample(lambda tensor: tensor.to(device), sample)
