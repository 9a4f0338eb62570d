"""The real commands on real files, as a user types them: translation, a language model, and one config file."""

import json
import math
import re

import pytest
import torch
from conftest import PLUGIN, ROOT, TINY, TINY_LM, call, run
from fairseq import checkpoint_utils
from omegaconf import OmegaConf

import multimax_fairseq.models  # noqa: F401  torch.load then takes checkpoints of fairseq

pytestmark = pytest.mark.slow

TRAINING = [
    *("--optimizer", "adam", "--lr", "5e-3", "--lr-scheduler", "inverse_sqrt", "--warmup-updates", "20"),
    *("--max-tokens", "1000", "--num-workers", "0", "--log-format", "json", "--log-interval", "5"),
    *("--dropout", "0.1", "--cpu"),
]


def train(data, arch, folder, *options, user_dir=True):
    """fairseq-train; returns its log lines by what they report ("train", "valid", …), each a dictionary."""
    size = [*TINY_LM, "--task", "language_modeling", "--tokens-per-sample", 64] if "_lm" in arch else TINY
    plugin = ["--user-dir", PLUGIN] if user_dir else []
    result = run("fairseq-train", data, *plugin, "--arch", arch, *size, *TRAINING, "--save-dir", folder, *options)
    lines = re.findall(r"\| (train|valid) \| (\{.*\})", result.stderr + result.stdout)
    return {kind: [json.loads(line) for k, line in lines if k == kind] for kind in ("train", "valid")}


def losses(log):
    return [[(line["epoch"], line[f"{kind}_loss"]) for line in log[kind]] for kind in ("train", "valid")]


def assert_learned(log):
    first, *_, last = losses(log)[0]
    assert float(last[1]) < float(first[1])


@pytest.fixture(scope="module")
def translation(corpus, tmp_path_factory):
    """Three epochs of a tiny translation model, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("translation")
    log = train(corpus / "data-bin", "multimax_transformer", folder, "--max-epoch", 3)
    return folder, log


def test_training_learns_and_goes_on_after_an_interruption_as_without_it(translation, corpus, tmp_path):
    """Interrupted within an epoch: at its end fairseq itself puts sentences of equal length together anew."""
    _, uninterrupted = translation
    assert_learned(uninterrupted)
    assert uninterrupted["train"][0]["train_cross_g_b"] != uninterrupted["train"][-1]["train_cross_g_b"]
    train(corpus / "data-bin", "multimax_transformer", tmp_path, "--max-update", 4)
    assert torch.load(tmp_path / "checkpoint_last.pt")["extra_state"]["train_iterator"]["iterations_in_epoch"] == 4
    resumed = train(corpus / "data-bin", "multimax_transformer", tmp_path, "--max-epoch", 3)
    assert losses(resumed) == losses(uninterrupted)


def test_compiled_and_eager_attend_block_by_block_to_the_same(corpus, tmp_path, monkeypatch):
    """A language model with rows long enough: in C++, and in blocks of plain PyTorch."""
    logs = []
    for backend in ("compiled", "eager"):
        monkeypatch.setenv("MULTIMAX_BACKEND", backend)
        logs.append(train(corpus / "data-bin-lm", "multimax_transformer_lm", tmp_path / backend, "--max-epoch", 1,
                          "--tokens-per-sample", 256, "--required-batch-size-multiple", 1))  # fmt: skip
    for kind, key in (("train", "train_loss"), ("valid", "valid_loss")):
        assert float(logs[0][kind][0][key]) == pytest.approx(float(logs[1][kind][0][key]), abs=2e-3)


def test_softmax_gives_the_stock_models_losses(corpus, tmp_path):
    """Those of fairseq's own translation model, without the plugin."""
    stock = train(corpus / "data-bin", "transformer", tmp_path / "stock", "--max-epoch", 1, user_dir=False)
    log = train(corpus / "data-bin", "multimax_transformer", tmp_path / "ours", "--max-epoch", 1,
                "--attention-mapping", "softmax")  # fmt: skip
    assert losses(log) == losses(stock)
    assert log["train"][0]["train_gnorm"] == stock["train"][0]["train_gnorm"]


def test_validate_generate_and_interactive_need_no_mapping_flags(translation, corpus):
    folder, log = translation
    common = [corpus / "data-bin", "--user-dir", PLUGIN, "--path", folder / "checkpoint_last.pt", "--cpu"]
    validation = run("fairseq-validate", *common, "--task", "translation", "--max-tokens", 1000,
                     "--log-format", "json")  # fmt: skip
    (valid,) = re.findall(r"\{.*\}", validation.stdout + validation.stderr)[-1:]
    assert float(json.loads(valid)["valid_loss"]) == pytest.approx(float(log["valid"][-1]["valid_loss"]), abs=2e-3)

    generated = run("fairseq-generate", *common, "--gen-subset", "test", "--beam", 5, "--max-tokens", 1000)
    hypotheses = {line.split("\t")[0]: line.split("\t")[2]
                  for line in generated.stdout.splitlines() if line.startswith("H-")}  # fmt: skip
    assert len(hypotheses) == 40 and "BLEU" in generated.stdout

    source = (corpus / "text" / "test.de").read_text().splitlines()[:3]
    interactive = run("fairseq-interactive", *common, "--source-lang", "de", "--target-lang", "en", "--beam", 5,
                      input="\n".join(source) + "\n")  # fmt: skip
    answers = [line.split("\t")[2] for line in interactive.stdout.splitlines() if line.startswith("H-")]
    assert answers == [hypotheses[f"H-{index}"] for index in range(3)]


def test_averaged_checkpoints_generate(translation, corpus, tmp_path):
    folder, average = translation[0], tmp_path / "average.pt"
    call("average_checkpoints", "--last", 2, folder, "--output", average)
    states = [torch.load(folder / f"checkpoint{epoch}.pt")["model"] for epoch in (2, 3)]
    averaged = torch.load(average)["model"]
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, (states[0][name] + states[1][name]) / 2)
    generated = run("fairseq-generate", corpus / "data-bin", "--user-dir", PLUGIN, "--path", average, "--cpu",
                    "--max-tokens", 1000)  # fmt: skip
    assert "BLEU" in generated.stdout


def test_from_pretrained_translates(translation, corpus):
    model, data = multimax_fairseq.models.MultimaxTransformerModel, str(corpus / "data-bin")
    hub = model.from_pretrained(str(translation[0]), "checkpoint_last.pt", data_name_or_path=data)
    assert hub.translate((corpus / "text" / "test.de").read_text().splitlines()[0]).split()


def perplexity(checkpoint):
    """exp of the mean negative log-likelihood of the validation set, from the softmax of the model's own output."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    task.load_dataset("valid")
    dataset, losses = task.dataset("valid"), []
    for index in range(len(dataset)):
        sample = dataset.collater([dataset[index]])
        with torch.no_grad():
            logits = model.eval()(**sample["net_input"])[0].double().flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, sample["target"].flatten(), reduction="none"))
    return torch.cat(losses).mean().exp().item()


def test_a_language_model_from_training_to_perplexity(corpus, tmp_path):
    log = train(corpus / "data-bin-lm", "multimax_transformer_lm", tmp_path, "--max-epoch", 2, "--attention-mapping",
                "entmax", "--entmax-alpha", "learned", "--output-mapping", "multimax")  # fmt: skip
    assert_learned(log)
    path = tmp_path / "checkpoint_last.pt"
    result = run("fairseq-eval-lm", corpus / "data-bin-lm", "--user-dir", PLUGIN, "--path", path, "--gen-subset",
                 "valid", "--cpu", "--sample-break-mode", "none", "--tokens-per-sample", 64)  # fmt: skip
    (found,) = re.findall(r"Perplexity: ([\d.]+)", result.stdout + result.stderr)
    assert float(found) == pytest.approx(perplexity(path), rel=1e-4)


def test_a_sparse_vocabulary_from_training_to_translations(corpus, tmp_path):
    log = train(corpus / "data-bin", "multimax_transformer", tmp_path, "--max-epoch", 2, "--output-mapping", "entmax",
                "--entmax-alpha", "learned", "--criterion", "entmax_loss", "--label-smoothing", 0.01)  # fmt: skip
    assert_learned(log)
    assert float(log["valid"][-1]["valid_support"]) > 1 and 0 <= float(log["valid"][-1]["valid_impossible"]) <= 100
    result = run("fairseq-generate", corpus / "data-bin", "--user-dir", PLUGIN, "--path",
                 tmp_path / "checkpoint_last.pt", "--gen-subset", "test", "--beam", 5, "--max-len-b", 5, "--cpu",
                 "--required-batch-size-multiple", 1)  # fmt: skip
    scores = re.findall(r"^H-\d+\t(\S+)\t", result.stdout, re.M)
    assert len(scores) == 40 and all(math.isfinite(float(score)) for score in scores)


HYDRA = [
    f"common.user_dir={PLUGIN}", "common.cpu=true", "common.log_format=json", "dataset.max_tokens=1000",
    "dataset.num_workers=0", "optimization.lr=[0.005]", "optimization.max_epoch=1", "optimizer._name=adam",
    "lr_scheduler._name=inverse_sqrt", "lr_scheduler.warmup_updates=20",
]  # fmt: skip


def train_by_config(folder, **sections):
    """fairseq-hydra-train of a file; sections of it: a name, and options as flags."""
    lines = [*HYDRA, f"checkpoint.save_dir={folder}"]
    for section, (name, *flags) in sections.items():
        pairs = [("--_name", name), *zip(flags[::2], flags[1::2])]
        lines += [f"{section}.{flag[2:].replace('-', '_')}={value}" for flag, value in pairs]
    folder.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.from_dotlist(lines), folder / "tiny.yaml")
    run("fairseq-hydra-train", "--config-dir", folder, "--config-name", "tiny", cwd=folder)
    return folder / "checkpoint_last.pt"


def test_a_sparse_vocabulary_from_training_to_perplexity(corpus, tmp_path):
    path = train_by_config(
        tmp_path, task=["language_modeling", "--data", corpus / "data-bin-lm", "--tokens-per-sample", 64],
        model=["multimax_transformer_lm", *TINY_LM, "--dropout", 0.1, "--output-mapping", "sparsemax"],
        criterion=["entmax_loss", "--label-smoothing", 0.01],
    )  # fmt: skip
    result = run("fairseq-eval-lm", corpus / "data-bin-lm", "--user-dir", PLUGIN, "--path", path, "--gen-subset",
                 "valid", "--cpu", "--tokens-per-sample", 64, "--context-window", 32)  # fmt: skip
    output = result.stdout + result.stderr
    own = re.findall(r"epsilon-perplexity: ([\d.]+),", output)
    perplexity = re.findall(r"Perplexity: ([\d.]+)", output)
    assert float(own[0]) == pytest.approx(float(perplexity[0]), rel=1e-3) and "Logging error" not in output
    assert re.search(r"probability 0: [\d.]+ % of the words; sparsemax score: [\d.]+; Jensen-Shannon", output)


def test_a_config_file_trains_what_the_flags_train(corpus, tmp_path):
    flags = [*TINY, "--attention-mapping", "entmax", "--entmax-alpha", "1.3", "--output-mapping", "multimax"]
    loss = ["chunked_cross_entropy", "--label-smoothing", "0.1", "--chunk-tokens", "32"]
    train(corpus / "data-bin", "multimax_transformer", tmp_path / "flags", "--max-epoch", 1, *flags[len(TINY):],
          "--criterion", *loss)  # fmt: skip
    path = train_by_config(tmp_path / "hydra", task=["translation", "--data", corpus / "data-bin"],
                           model=["multimax_transformer", *flags, "--dropout", 0.1], criterion=loss)  # fmt: skip
    states = [torch.load(path)["model"] for path in (tmp_path / "flags" / "checkpoint_last.pt", path)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        if not name.endswith("_float_tensor"):  # fairseq 0.12.2 never sets it
            torch.testing.assert_close(states[1][name], tensor, atol=0, rtol=0)


def test_a_wrong_choice_ends_before_data_is_loaded(corpus, tmp_path):
    result = run("fairseq-train", corpus / "data-bin", "--user-dir", PLUGIN, "--arch", "multimax_transformer",
                 *TINY, *TRAINING, "--attention-mapping", "softmin", "--save-dir", tmp_path / "run",
                 check=False)  # fmt: skip
    assert result.returncode and "there is no 'softmin'; choose from: softmax, multimax, sparsemax" in result.stderr
    assert not re.search(r"loaded [\d,]+ examples", result.stdout + result.stderr)
    assert not list(tmp_path.glob("run/*"))


def test_score_translation_scores_what_fairseq_generates(translation, corpus, tmp_path):
    folder, _ = translation
    script = ["bash", ROOT / "scripts" / "score_translation.sh", "--data-bin", corpus / "data-bin",
              "--checkpoint", folder / "checkpoint_last.pt"]  # fmt: skip
    result = run(*script, "--reference", corpus / "text" / "test.en", "--out", tmp_path / "test")
    assert re.search(r"BLEU\|nrefs:1\|case:mixed.*version:.* = [\d.]+", result.stdout)
    hypotheses = (tmp_path / "test.hypotheses").read_text().splitlines()
    generated = dict(re.findall(r"^D-(\d+)\t\S+\t(.*)$", (tmp_path / "test.generate").read_text(), re.M))
    assert hypotheses == [re.sub(r" ([.,?!])", r"\1", generated[str(index)]) for index in range(40)]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("precision, tolerance", [([], 1e-5), (["--fp64"], 1e-13)])
def test_beam_search_and_teacher_forcing_are_the_same_model(precision, tolerance, translation, corpus):
    result = call("check_decoding", corpus / "data-bin", "--sentences", 10,
                  "--path", translation[0] / "checkpoint_last.pt", *precision)  # fmt: skip
    assert float(re.search(r"largest difference (\S+) nat", result.stdout)[1]) < tolerance
