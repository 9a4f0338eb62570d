"""Loads a model and its data from files; errors say what to do."""

from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy
import torch

from .. import models  # noqa: F401  first, as it imports fairseq quietly; it registers the models

# isort: split
from fairseq import checkpoint_utils, utils
from fairseq.data import FairseqDataset
from fairseq.tasks import FairseqTask
from torch import nn

from ..tools import UserError, read_checkpoint, reason_of


def load_model(path: Path, data: Path) -> Tuple[nn.Module, Any, FairseqTask]:
    """Load a checkpoint's model in evaluation mode on the CPU, its configuration, and its task on these data.

    Raises:
        UserError: the file is no checkpoint, or the data does not fit it.
    """
    if not data.is_dir():
        raise UserError(f"there is no folder {data}")
    read = partial(checkpoint_utils.load_checkpoint_to_cpu, str(path), {"data": str(data)})
    state = read_checkpoint(path, read)  # with checks that fairseq does not make
    try:
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], state=state)
    except Exception as error:
        raise UserError(
            f"the model of {path} cannot be built with the data in {data}: give the folder that fairseq-preprocess "
            f"made for it ({reason_of(error)})"
        ) from error
    return model.eval(), cfg, task


def load_split(task: FairseqTask, data: Path, split: str, most: Optional[int] = None) -> FairseqDataset:
    """Load a split of a task's data, and check that its first sentences (None: all) can be read.

    Raises:
        UserError: files are missing, empty or cut short, or were made with other dictionaries.
    """
    where = f"the split {split!r} of {data}"
    try:
        task.load_dataset(split)
    except FileNotFoundError as error:
        splits = sorted({file.name.split(".")[0] for file in data.glob("*.idx")})
        raise UserError(
            f"{data} has no split {split!r} for this model; --split takes one of: {', '.join(splits) or 'none'}"
        ) from error
    except Exception as error:
        raise UserError(f"{where} cannot be read: {reason_of(error)}") from error
    dataset = task.dataset(split)
    if not len(dataset):
        raise UserError(f"{where} is empty: there is nothing in it")
    if getattr(dataset, "tgt", dataset) is None:
        raise UserError(f"{where} has no text in the target language: files of it are missing")
    words = {"source": len(task.source_dictionary), "target": len(task.target_dictionary)}
    for index in range(len(dataset))[:most]:
        try:
            item = dataset[index]
            sides = {side: item[side] for side in words if item[side] is not None}
            are_known = all(tokens.min() >= 0 and tokens.max() < words[side] for side, tokens in sides.items())
        except Exception:  # numpy's, from a memory map
            are_known = False
        if not are_known:
            raise UserError(
                f"{where} is damaged, cut short, or not of the fairseq-preprocess that made its dictionary: sentence "
                f"{index} cannot be read"
            )
    return dataset


def fitting(
    task: FairseqTask, dataset: FairseqDataset, indices: Sequence[int], fit: Sequence[nn.Module], where: str
) -> List[int]:
    """The sentences that are no longer than the models' positions (``--max-source-positions`` …).

    Raises:
        UserError: there are none.
    """
    longest = utils.resolve_max_positions(task.max_positions(), *(model.max_positions() for model in fit))
    taken, _ = dataset.filter_indices_by_size(numpy.array(indices), longest)
    if not len(taken):
        raise UserError(f"all sentences of {where} are longer than the positions of the model, {longest}")
    return taken.tolist()


def batches(
    dataset: FairseqDataset, indices: Sequence[int], max_tokens: int, device: torch.device
) -> Iterator[Dict[str, Any]]:
    """Batches of sentences of similar length on the device: at most ``max_tokens`` tokens, or a single sentence."""
    ordered = numpy.array(sorted(indices, key=dataset.num_tokens))
    for group in dataset.batch_by_size(ordered, max_tokens=max(max_tokens, dataset.num_tokens(ordered[-1]))):
        sample = dataset.collater([dataset[index] for index in group])
        yield utils.apply_to_sample(lambda tensor: tensor.to(device), sample)
