"""What a run accepts to go on from: all pairs of mappings, and checkpoints of other versions."""

import logging
from argparse import Namespace

import pytest
import torch
from conftest import save_checkpoint
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from multimax_fairseq.models.checkpoints import check_resumed, checks_mappings, options_of

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
    cfgs, paths = [], []
    for number, (arch, *options) in enumerate(MODELS):
        built = build(arch, *options)
        cfgs.append(built.cfg.model)
        paths.append(str(save_checkpoint(built, tmp_path / f"{number}.pt")))
    for before, path in enumerate(paths):
        trained = options_of(path)
        for now, cfg in enumerate(cfgs):
            if before == now or {before, now} == {0, 1}:  # softmax is fairseq's own
                check_resumed(path, trained, cfg)
            else:
                with pytest.raises(ValueError, match=r"^--\S+: .*\.pt was trained with .* --finetune-from-model"):
                    check_resumed(path, trained, cfg)


def test_what_may_change_when_a_run_goes_on(build, tmp_path):
    path = str(save_checkpoint(build("multimax_transformer"), tmp_path / "a.pt"))
    changed = build("multimax_transformer", "--modulator-lr-scale", 10, "--multimax-init", "shaped",
                    "--log-modulators", "none")  # fmt: skip
    check_resumed(path, options_of(path), changed.cfg.model)


def test_each_pair_of_mappings_in_a_new_run_from_old_weights(build, tmp_path):
    """All that the models share is loaded, and nothing is missed, or in the way, at any of them."""
    trained = [build(arch, *options, seed=number) for number, (arch, *options) in enumerate(MODELS)]
    paths = [str(save_checkpoint(old, tmp_path / f"{number}.pt")) for number, old in enumerate(trained)]
    for arch, *options in MODELS:
        new = build(arch, *options, "--optimizer", "adam", "--lr", "1", "--cpu", seed=9)
        trainer = Trainer(new.cfg, new.task, new.model, new.task.build_criterion(new.cfg.criterion))
        for old, path in zip(trained, paths):
            trainer.load_checkpoint(path, reset_optimizer=True, reset_lr_scheduler=True)
            before, found = (dict(run.model.named_parameters()) for run in (old, new))
            shared = [name for name in found if name in before and before[name].shape == found[name].shape]
            assert len(shared) > 20 and all(torch.equal(found[name], before[name]) for name in shared)


def load(path, **options):
    trainer = Namespace(cfg=Namespace(model=options.pop("model")), get_model=lambda: torch.nn.Linear(1, 1))
    return checks_mappings(lambda *args, **kwargs: (args[1:], kwargs))(trainer, str(path), **options)


def test_a_new_run_from_other_weights_is_no_resuming(build, tmp_path):
    path = save_checkpoint(build("multimax_transformer_lm"), tmp_path / "a.pt")
    model = build("multimax_transformer_lm", "--attention-mapping", "sparsemax").cfg.model
    with pytest.raises(ValueError, match="was trained with multimax"):
        load(path, model=model)
    assert load(path, model=model, reset_optimizer=True, reset_meters=True) == (
        (str(path), True), {"reset_meters": True}
    )  # fmt: skip
    assert load(tmp_path / "none.pt", model=model) == ((str(tmp_path / "none.pt"), False), {})


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
        load(path, model=built.cfg.model)
    assert [record.message for record in caplog.records] == [
        "trained with --modulator-weight-decay 0.0, --multimax-backend eager, of version 0.2.0; there is no such "
        "option any more"
    ]


def test_an_earlier_runs_best_score_is_forgotten(tmp_path):
    """A Hydra sweep runs its jobs in one process, and fairseq keeps the score in an attribute of a function."""
    checkpoint_utils.save_checkpoint.best = 3.0
    load(tmp_path / "none.pt", model=None)
    assert not hasattr(checkpoint_utils.save_checkpoint, "best")
