"""What a run accepts to go on from: all pairs of mappings, and checkpoints of other versions."""

import logging
from argparse import Namespace

import pytest
import torch
from conftest import save_checkpoint
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from multimax_fairseq.models.checkpoints import checks_mappings

MODELS = [
    ["transformer_lm"],
    ["multimax_transformer_lm", "--attention-mapping", "softmax"],
    ["multimax_transformer_lm"],
    ["multimax_transformer_lm", "--multimax-order", "1"],
    ["multimax_transformer_lm", "--attention-mapping", "sparsemax"],
    ["multimax_transformer_lm", "--attention-mapping", "entmax15"],
    ["multimax_transformer_lm", "--attention-mapping", "entmax", "--entmax-alpha", "learned"],
    ["multimax_transformer_lm", "--attention-mapping", "softmax", "--attention-scale", "learned"],
    ["multimax_transformer_lm", "--attention-mapping", "softmax", "--output-mapping", "entmax15"],
]


def test_each_pair_of_mappings(build, tmp_path):
    """A run goes on with the same alone. A new one from its weights loads all that the models share, and no more."""
    training = ["--optimizer", "adam", "--lr", "1", "--cpu"]
    trained = [build(arch, *options, *training, seed=number) for number, (arch, *options) in enumerate(MODELS)]
    paths = [str(save_checkpoint(old, tmp_path / f"{number}.pt")) for number, old in enumerate(trained)]
    for now, (arch, *options) in enumerate(MODELS):
        new = build(arch, *options, *training, seed=9)
        trainer = Trainer(new.cfg, new.task, new.model, new.task.build_criterion(new.cfg.criterion))
        for before, (old, path) in enumerate(zip(trained, paths)):
            if now == before or {now, before} == {0, 1}:  # softmax is fairseq's own
                trainer.load_checkpoint(path)
            else:
                with pytest.raises(ValueError, match=r"^--\S+: .*\.pt was trained with .* --finetune-from-model"):
                    trainer.load_checkpoint(path)
                trainer.load_checkpoint(path, reset_optimizer=True, reset_lr_scheduler=True)
            there, found = (dict(run.model.named_parameters()) for run in (old, new))
            shared = [name for name in found if name in there and there[name].shape == found[name].shape]
            assert len(shared) > 20 and all(torch.equal(found[name], there[name]) for name in shared)


def load(path, model):
    trainer = Namespace(cfg=Namespace(model=model), get_model=lambda: torch.nn.Linear(1, 1))
    return checks_mappings(lambda *args: args[1:])(trainer, str(path))


@pytest.mark.parametrize("arch", ["multimax_transformer", "multimax_transformer_lm"])
def test_options_of_the_last_version_that_are_gone(arch, build, tmp_path, caplog):
    built = build(arch)
    path = save_checkpoint(built, tmp_path / "a.pt")
    state = torch.load(path)
    model = state["cfg"]["model"]
    (model if isinstance(model, dict) else vars(model)).update(
        modulator_weight_decay=0.0, modulator_clip_norm=None, multimax_backend="eager"
    )
    torch.save(state, path)
    with caplog.at_level(logging.WARNING, "multimax_fairseq"):
        load(path, built.cfg.model)
    assert [record.message for record in caplog.records] == [
        "trained with --modulator-weight-decay 0.0, --multimax-backend eager, of version 0.2.0; there is no such "
        "option any more"
    ]


def test_an_earlier_runs_best_score_is_forgotten(tmp_path):
    """A Hydra sweep runs its jobs in one process, and fairseq keeps the score in an attribute of a function."""
    checkpoint_utils.save_checkpoint.best = 3.0
    load(tmp_path / "none.pt", None)
    assert not hasattr(checkpoint_utils.save_checkpoint, "best")
