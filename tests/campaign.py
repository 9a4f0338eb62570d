"""Attacks on everything that a user can meet, at random, for as long as you like. No part of the test suite.

    python tests/campaign.py --minutes 60 --seed 1
    python tests/campaign.py --repeat attention:123456

An attack is a function of the table ``ATTACKS`` that draws what it does from a generator and raises ``Failure`` where
something is not as it should be: a traceback, a success on damaged files, something left behind, other bytes after a
kill than without, attention that differs from float64. A line is printed for each failure, with the word that repeats
it, and at the end how often each attack was made. The exit status is 1 if there was a failure.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections import Counter
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import ROOT, TINY, demo_corpus, environment, load_script, parse, run, save_checkpoint  # noqa: E402
from fairseq import tasks  # noqa: E402
from fairseq.modules import MultiheadAttention  # noqa: E402

import multimax_fairseq.models  # noqa: E402, F401  torch.load then takes checkpoints of fairseq
from multimax_fairseq import mappings  # noqa: E402
from multimax_fairseq.analysis import cli as analysis_cli  # noqa: E402
from multimax_fairseq.mappings.multimax import INITS, TERMS  # noqa: E402
from multimax_fairseq.models.options import MAPPING_OPTIONS, SITES  # noqa: E402
from multimax_fairseq.modules.attention import MappedMultiheadAttention  # noqa: E402
from multimax_fairseq.modules.scale import SCALES, build_scale  # noqa: E402

SCRIPTS, EXAMPLES = ROOT / "scripts", ROOT / "examples"


class Failure(Exception):
    """Something is not as it should be."""


def expect(holds, *words):
    if not holds:
        raise Failure(" ".join(map(str, words)))


# ---------------------------------------------------------------------- what is attacked: made once, then copied


@cache
def workplace():
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    for name, result in (("multi30k", "multi30k"), ("iwslt14", "de-en.tgz"), ("wikitext103", "wikitext-103-v1.zip")):
        run(sys.executable, SCRIPTS / "make_smoke_data.py", name, folder / result)
    text = demo_corpus(folder, train=200, valid=20, test=20)
    for split in ("train", "valid", "test"):
        shutil.copy(text / f"{split}.en", text / f"{split}.tokens")
    return folder


@cache
def trained_run():
    """As an evaluated run leaves it, but for the training."""
    _, cfg = parse([workplace() / "data-bin", "--arch", "multimax_transformer", *TINY])
    folder = workplace() / "run"
    torch.manual_seed(1)  # or an attack could not be repeated
    model = tasks.setup_task(cfg.task).build_model(cfg.model)
    path = save_checkpoint(Namespace(model=model, cfg=cfg), folder / "checkpoint_best.pt")
    shutil.copy(path, folder / "checkpoint_last.pt")
    references = (workplace() / "text" / "test.en").read_text()
    for name in ("best.hypotheses", "references"):
        (folder / name).write_text(references)
    details = "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0 = 100.00 100.0/100.0 (BP = 1.000)"
    (folder / "best.bleu").write_text(details + "\n")
    for tool, options in (("record_run", ["--experiment", "x"]), ("results_table", ["--samples", 1])):
        message = in_process(tool, [folder, *options])
        expect(message is None, message)
    return folder


def in_process(tool, arguments, output=None):
    """A tool of Python: None if it succeeds, or its one line of error; a traceback is a failure.

    ``output`` takes what it prints.
    """
    main = analysis_cli.main if tool == "multimax-analyze" else script(tool).main
    before, sys.argv = sys.argv, [tool, *map(str, arguments)]
    output = output or io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main()
        return None
    except SystemExit as stopped:
        if stopped.code in (None, 0):  # --help
            return None
        message = stopped.code if isinstance(stopped.code, str) else output.getvalue().strip().splitlines()[-1]
        is_a_line = re.fullmatch(r"(ERROR: |\w+: error: ).*", message)  # the second is argparse's
        expect(is_a_line, tool, "ends with", repr(message))
        return message
    except Exception as error:
        raise Failure(f"{tool}: traceback: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = before


@cache
def script(name):
    return load_script(name)


def in_a_shell(*command, **kwargs):
    """Exit status and standard error of a script; a traceback is a failure."""
    result = run("bash", *command, check=False, **kwargs)
    expect("Traceback" not in result.stderr, command[0], "traceback:", result.stderr[-300:])
    if result.returncode:
        expect(result.stderr.count("ERROR: ") == 1, command[0], "says", repr(result.stderr[-300:]))
    return result


def damage(rng, path):
    """Change a file's bytes; says how."""
    content = bytearray(path.read_bytes())
    how = rng.choice(["cut", "flip", "zero", "insert", "empty", "noise", "delete"])
    where = rng.randrange(len(content)) if content else 0
    if how == "cut":
        content = content[:where]
    elif how == "flip" and content:
        content[where] ^= 1 << rng.randrange(8)
    elif how == "zero":
        content[where : where + rng.randrange(1, 400)] = bytes(min(400, len(content) - where))
    elif how == "insert":
        content[where:where] = rng.randbytes(rng.randrange(1, 50))
    elif how == "empty":
        content = b""
    elif how == "noise":
        content = rng.randbytes(rng.randrange(1, 3000))
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(content)
    return f"{how} at {where} of {path.name}"


def hash_of(folder):
    """Of names and bytes, but for what names options or time."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("preprocess.log", ".complete"):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------- attacks


def damaged_run(rng, folder):
    """A damaged file of a run: no tool has a traceback; a damaged checkpoint is never a success."""
    place = shutil.copytree(trained_run(), folder / "run")
    victim = rng.choice(sorted(place.iterdir()))
    how = damage(rng, victim)
    best, last, data = place / "checkpoint_best.pt", place / "checkpoint_last.pt", workplace() / "data-bin"
    tool, arguments, reads = rng.choice([  # and what begins the names of files that have to be intact
        ("average_checkpoints", [best, last, "--output", place / "average.pt"], "checkpoint_"),
        ("check_decoding", [data, "--path", best, "--sentences", 2], "checkpoint_best"),
        ("check_model", ["--checkpoint", best, "--data", data], "checkpoint_best"),
        ("record_run", [place, "--experiment", "x"], "checkpoint_"),
        ("resume_checkpoint", [place], "none"),
        ("results_table", [place, "--samples", 1], "none"),
    ])  # fmt: skip
    before = set(place.iterdir())
    message = in_process(tool, arguments)
    if message is None and victim.name.startswith(reads):
        expect(is_intact(victim, trained_run() / victim.name), tool, "succeeds after", how)
    expect(message is None or set(place.iterdir()) == before, tool, "leaves something after", how)


def is_intact(path, original):
    """Whether a checkpoint still says the same: a bit of the padding between its parts may be another."""
    found, expected = (torch.load(file) for file in (path, original))
    parameters = expected.pop("model")
    same = all(torch.equal(tensor, parameters[name]) for name, tensor in found.pop("model").items())
    return same and repr(found) == repr(expected)


def damaged_data(rng, folder):
    """A damaged file of the binarised data."""
    data = shutil.copytree(workplace() / "data-bin", folder / "data-bin")
    how = damage(rng, rng.choice(sorted(data.iterdir())))
    best, split = trained_run() / "checkpoint_best.pt", rng.choice(["valid", "test"])
    tool, arguments = rng.choice([
        ("check_decoding", [data, "--path", best, "--sentences", 3, "--split", split]),
        ("check_model", ["--checkpoint", best, "--data", data, "--split", split]),
        ("multimax-analyze", [best, "--data", data, "--split", split, "--out", folder / "out", "--max-sentences", 2,
                              "--no-progress-bar", "--show", "--cpu"]),
    ])  # fmt: skip
    if tool == "multimax-analyze" and rng.random() < 0.8:  # its figures take seconds
        tool, arguments = "check_model", ["--checkpoint", best, "--data", data, "--split", split]
    message = in_process(tool, arguments)
    expect(message is None or not (folder / "out").exists(), tool, "leaves a report after", how)


def damaged_table(rng, folder):
    """Entries of run.json changed at random: a line that names the file, or a table without NaN."""
    place = shutil.copytree(trained_run(), folder / "run")
    record = json.loads((place / "run.json").read_text())
    table = record
    key = rng.choice(list(table))
    while isinstance(table[key], dict) and table[key] and rng.random() < 0.7:
        table = table[key]
        key = rng.choice(list(table))
    if rng.random() < 0.3:
        del table[key]
    else:
        table[key] = rng.choice([None, float("nan"), float("inf"), -1, 0, "", "x", [], {}, True, "../x", 1e308])
    (place / "run.json").write_text(json.dumps(record))
    output = io.StringIO()
    message = in_process("results_table", [place, "--samples", 1], output)
    expect(message is None or "run" in message, message)
    expect(not re.search(r"\bnan\b|\binf\b", output.getvalue()), "the table has NaN")


def damaged_input(rng, folder):
    """A damaged file among those that a shell script reads: an error in a line, or a success that may be one."""
    name = rng.choice(["translate", "translate", "score", "score", "run", "prepare", "prepared"])
    if name in ("prepare", "prepared"):
        script = rng.choice([name for name in KILLED if name.startswith("prepare_") and "demo" not in name])
        command = KILLED[script][0](folder)
        source = Path(command[2])
        place = folder / "out"
        if name == "prepared":
            uninterrupted(script)
            shutil.copytree(workplace() / f"whole-{script}" / "out", place)
        elif source.is_dir():
            command[2] = place = shutil.copytree(source, folder / "source")
        else:
            command[2] = place = Path(shutil.copy(source, folder))
        how = damage(rng, rng.choice([path for path in sorted([place, *place.rglob("*")]) if path.is_file()]))
        result = in_a_shell(*command, cwd=folder)
        if name == "prepare":
            expect(result.returncode == 0 or not (folder / "out").exists(), script, "leaves something after", how)
        return
    recipe_name = rng.choice(["multi30k_de_en/run.sh", "iwslt14_de_en/run.sh"])
    uninterrupted(recipe_name)
    place = shutil.copytree(workplace() / f"whole-{recipe_name.replace('/', '-')}" / "run", folder / "run")
    data = shutil.copytree(smoke_data(recipe_name, SMOKE), folder / "data")
    files = sorted(place.iterdir())
    if name != "run" and rng.random() < 0.7:
        files = sorted(path for path in data.rglob("*") if path.is_file())
    victim = rng.choice(files)
    original = shutil.copy(victim, folder / "original")
    how, best = damage(rng, victim), place / "checkpoint_best.pt"
    if name == "run":
        for file in rng.choice([["run.json"], ["run.json", "trained"]]):
            (place / file).unlink(missing_ok=True)
        in_a_shell(EXAMPLES / recipe_name, "--data", data, *SMOKE, "--out", place, cwd=folder)
        return
    if name == "translate":
        command = ["translate.sh", "--run", place, "--data", data]
    else:
        kind = ["--moses", "en"] if "iwslt" in recipe_name else ["--sentencepiece", data / "sentencepiece.bpe.model"]
        command = ["score_translation.sh", "--data-bin", data / "data-bin", "--checkpoint", best, *kind,
                   "--reference", data / "raw" / "test.en", "--out", folder / "test"]  # fmt: skip
    result = in_a_shell(SCRIPTS / command[0], *command[1:], cwd=folder, input="ein hund läuft .\n")
    if result.returncode == 0 and victim == best:
        expect(victim.exists() and is_intact(victim, Path(original)), name, "succeeds after", how)
    expect(result.returncode == 0 or not list(folder.glob("test.*")), name, "leaves something after", how)


PYTHON_TOOLS = (
    "average_checkpoints", "check_decoding", "check_model", "record_run", "results_table", "resume_checkpoint",
    "multimax-analyze",
)  # fmt: skip


def strange_arguments(rng, folder):
    """Arguments of a tool of Python that may or may not make sense."""
    tool = rng.choice(PYTHON_TOOLS)
    source = Path(analysis_cli.__file__) if tool == "multimax-analyze" else SCRIPTS / f"{tool}.py"
    known = ["--help", *re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source.read_text())]
    place = shutil.copytree(trained_run(), folder / "run")
    values = [*VALUES, place, place / "checkpoint_best.pt", workplace() / "data-bin", workplace() / "text/test.en"]
    arguments = []
    for _ in range(rng.randrange(0, 6)):
        arguments += [rng.choice(known)] * (rng.random() < 0.8) + [rng.choice(values)] * (rng.random() < 0.8)
    before = os.getcwd()
    os.chdir(folder)
    try:
        in_process(tool, arguments)
    finally:
        os.chdir(before)


def strange_flags(rng, _):
    """Options of the plugin that may or may not make sense: a model is built, or an error says why not."""
    options = []
    flags = ["--" + option.name.replace("_", "-") for option in MAPPING_OPTIONS]
    for _ in range(rng.randrange(1, 6)):
        options += [rng.choice(flags), rng.choice([*VALUES, *FLAG_VALUES])]
    arch = rng.choice(["multimax_transformer", "multimax_transformer_tiny"])
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            _, cfg = parse([workplace() / "data-bin", "--arch", arch, *TINY, *options])
            tasks.setup_task(cfg.task).build_model(cfg.model)
    except SystemExit:
        expect(" error: " in output.getvalue(), *options, "end in", output.getvalue()[-200:])
    except ValueError as error:
        expect(str(error) and "\n" not in str(error).strip(), *options, "end in", error)


FLAG_VALUES = (*mappings.MAPPINGS, *SITES, *SCALES, *INITS, *TERMS, "1", "2", "0.5", "1.5", "inf", "k=3", "eager")


SHELL_SCRIPTS = (
    "multi30k_de_en/run.sh", "wikitext103/run.sh", "iwslt14_de_en/run.sh", "score_translation.sh", "translate.sh",
    "prepare_multi30k.sh", "prepare_text_lm.sh", "prepare_iwslt14.sh", "prepare_wikitext103.sh", "brown_lm/run.sh",
)  # fmt: skip
VALUES = (
    "", "-", "--", "0", "-1", "1e9", "99999999999", "NaN", "a:b", "a\nb", "-x", "ä", "x" * 300, "$(touch x)", "*",
    "../..", "/", "softmax", "multimax", "encoder,cross", ",", "1.0", "learned", "fp32",
)  # fmt: skip


def strange_options(rng, folder):
    """Options that may or may not make sense: usage errors are a line."""
    name = rng.choice(SHELL_SCRIPTS)
    path = EXAMPLES / name if "/" in name else SCRIPTS / name
    text = path.read_text() + ((EXAMPLES / "experiment.sh").read_text() if "/" in name else "")
    known = sorted(set(re.findall(r"^(--[a-z-]+) ", text, re.M)) - {"--url"})
    options = []
    for _ in range(rng.randrange(1, 5)):
        option = rng.choice(known) if rng.random() < 0.9 else rng.choice(VALUES)
        options += [f"{option}={rng.choice(VALUES)}"] if rng.random() < 0.5 else [option, rng.choice(VALUES)]
    if "/" in name:
        options.append("--dry-run")
    else:  # nothing is there to be prepared from, so nothing is made
        options += ["--from", str(folder / "none")] * (name in ("prepare_multi30k.sh", "prepare_text_lm.sh"))
        options += ["--archive", str(folder / "none")] * (name in ("prepare_iwslt14.sh", "prepare_wikitext103.sh"))
    result = in_a_shell(path, *options, cwd=folder, stdin=subprocess.DEVNULL)
    expect(not list(folder.iterdir()), name, *options, "leaves", *folder.iterdir())
    expect(result.returncode == 0 or len(result.stderr) < 2000, name, "says much")


def killed(rng, folder):
    """A command, killed at random up to three times, then run to its end: the result of one that was not stopped."""
    name = rng.choice(sorted(KILLED))
    command, result = KILLED[name]
    expected, seconds = uninterrupted(name)
    for _ in range(rng.randrange(1, 4)):
        kill_at_random(rng, command(folder), folder, most=seconds)
    ended = in_a_shell(*command(folder), cwd=folder)
    expect(ended.returncode == 0, name, "cannot go on:", ended.stderr[-300:])
    expect(result(folder) == expected, name, "has another result after a kill")


@cache
def uninterrupted(name):
    """What a command makes that nobody stops, and the seconds that it takes."""
    folder = workplace() / f"whole-{name.replace('/', '-')}"
    folder.mkdir()
    command, result = KILLED[name]
    start = time.monotonic()
    ended = in_a_shell(*command(folder), cwd=folder)
    expect(ended.returncode == 0, name, ended.stderr[-500:])
    return result(folder), time.monotonic() - start


def preparation(script, *options):
    def command(folder):
        arguments = [workplace() / option if option in SOURCES else option for option in options]
        return [SCRIPTS / script, *arguments, "--out", folder / "out"]

    return command, lambda folder: hash_of(folder / "out")


def recipe(experiment, *options):
    """run.sh, with data that are there: (scores, learned parameters)."""
    def command(folder):
        return [EXAMPLES / experiment, "--data", smoke_data(experiment, options), *options, "--out", folder / "run"]

    def result(folder):
        parameters = torch.load(folder / "run" / "checkpoint_last.pt")["model"]
        digest = hashlib.sha256(b"".join(parameters[name].numpy().tobytes() for name in sorted(parameters)))
        return json.loads((folder / "run" / "run.json").read_text())["scores"], digest.hexdigest()

    return command, result


@cache
def smoke_data(experiment, options):
    folder = workplace() / "smoke-data" / experiment
    result = in_a_shell(EXAMPLES / experiment, *options, "--data", folder, "--only", "prepare")
    expect(result.returncode == 0, result.stderr)
    return folder


def of_python(script, arguments, *results):
    """A command of Python that makes files of these patterns; `arguments`: of the folder."""
    def command(folder):
        return ["-c", 'exec "$@"', "-", sys.executable, *(["-m"] * (script == ANALYZE)), script, *arguments(folder)]

    def result(folder):
        return [path.read_bytes() for pattern in results for path in sorted(folder.glob(pattern))]

    return command, result


def copied_run(folder):
    """The trained run in a folder of its own."""
    if not (folder / "run").exists():
        shutil.copytree(trained_run(), folder / "run")
    return folder / "run"


SOURCES = ("multi30k", "de-en.tgz", "wikitext-103-v1.zip", "text")
ANALYZE = "multimax_fairseq.analysis"
SMOKE = ("--cpu-smoke", "--epochs", "3")
KILLED = {
    "prepare_multi30k.sh": preparation("prepare_multi30k.sh", "--from", "multi30k", "--vocab-size", 300),
    "prepare_iwslt14.sh": preparation("prepare_iwslt14.sh", "--archive", "de-en.tgz", "--merges", 200),
    "prepare_wikitext103.sh": preparation("prepare_wikitext103.sh", "--archive", "wikitext-103-v1.zip"),
    "prepare_text_lm.sh": preparation("prepare_text_lm.sh", "--from", "text"),
    "prepare_demo.sh": preparation("prepare_demo.sh"),
    "multi30k_de_en/run.sh": recipe("multi30k_de_en/run.sh", *SMOKE),
    "iwslt14_de_en/run.sh": recipe("iwslt14_de_en/run.sh", *SMOKE),
    "wikitext103/run.sh": recipe("wikitext103/run.sh", "--cpu-smoke"),
    "brown_lm/run.sh": recipe("brown_lm/run.sh", "--cpu-smoke"),
    "average_checkpoints": of_python(
        SCRIPTS / "average_checkpoints.py",
        lambda folder: [*sorted(copied_run(folder).glob("checkpoint_*.pt")), "--output", folder / "average.pt"],
        "average.pt",
    ),
    "record_run": of_python(
        SCRIPTS / "record_run.py", lambda folder: [copied_run(folder), "--experiment", "x"], "run/run.json"
    ),
    "score_translation.sh": (
        lambda folder: [SCRIPTS / "score_translation.sh", "--data-bin", workplace() / "data-bin", "--checkpoint",
                        trained_run() / "checkpoint_best.pt", "--reference", workplace() / "text" / "test.en",
                        "--out", folder / "test"],
        lambda folder: [(folder / f"test.{kind}").read_bytes() for kind in ("hypotheses", "bleu")],
    ),
    "multimax-analyze": of_python(
        ANALYZE,
        lambda folder: [trained_run() / "checkpoint_best.pt", "--data", workplace() / "data-bin", "--out",
                        folder / "report", "--force", "--max-sentences", 20, "--cpu"],
        "report/*.csv",
    ),
    "retrieval": of_python(
        EXAMPLES / "retrieval" / "run.py",
        lambda folder: ["--mappings", "softmax,multimax:order=1", "--seeds", 1, "--updates", 60, "--length", 16,
                        "--test-lengths", 16, "--out", folder / "out"],
        "out/results.json", "out/table.md",
    ),
}  # fmt: skip


def kill_at_random(rng, command, folder, most):
    """Start a script, and end it and all that it started at a random moment, as a machine that goes down does."""
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(["bash", *map(str, command)], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                   cwd=folder, start_new_session=True, env=environment())  # fmt: skip
        try:
            process.wait(rng.uniform(0, most))
        except subprocess.TimeoutExpired:
            how = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            descendants = descendants_of(process.pid)
            for number in [process.pid, *descendants]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, how if number == process.pid or how == signal.SIGKILL else signal.SIGTERM)
            process.wait(900)  # whoever measures here may have stopped all others for minutes
            for number in descendants:  # a copy that goes on would disturb the next run
                deadline = time.monotonic() + 900
                while Path(f"/proc/{number}").exists() and time.monotonic() < deadline:
                    time.sleep(0.05)


def descendants_of(number):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(number)], capture_output=True, text=True).stdout
    return [found for child in map(int, listed.split()) for found in (child, *descendants_of(child))]


ERRORS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 0.02}


def draw_mapping(rng):
    """A mapping's module, a dtype, and words for both; from now on the backend is another, too."""
    torch.manual_seed(rng.randrange(2**31))
    name, dtype = rng.choice(sorted(mappings.MAPPINGS)), rng.choice(sorted(ERRORS, key=str))
    alpha = rng.choice([2, "learned", round(rng.uniform(1.0001, 2), 4)])
    options = {"multimax": {"order": rng.choice([1, 2])}, "entmax": {"alpha": alpha}}
    os.environ["MULTIMAX_BACKEND"] = backend = rng.choice(["eager", "compiled"])
    module = mappings.build_mapping(name, **options.get(name, {})).to(torch.promote_types(dtype, torch.float32))
    return module.train(rng.random() < 0.5), dtype, f"{name} {options.get(name, '')} {dtype} {backend}"


def attention(rng, _):
    """Attention with random sizes, masks, mapping, scale, dtype and backend: output and gradients as in fp64."""
    mapping, dtype, what = draw_mapping(rng)
    heads, width = rng.choice([1, 2, 4]), rng.choice([16, 64])
    is_self, bsz, tgt_len = rng.random() < 0.6, rng.randrange(1, 4), rng.choice([1, 2, 33, 200, 260])
    src_len = tgt_len if is_self else rng.choice([1, 5, 190, 300])
    scale = rng.choice(["none", "learned", "log-length"])
    kind = {"self_attention": True} if is_self else {"encoder_decoder_attention": True}
    module = MultiheadAttention(width, heads, **kind)
    module = MappedMultiheadAttention.adopt(module, mapping, "encoder", build_scale(scale, heads)).eval()
    query = torch.randn(tgt_len, bsz, width)
    key = query if is_self else torch.randn(src_len, bsz, width)
    masks = {}
    if is_self and rng.random() < 0.5:
        masks["attn_mask"] = torch.full((tgt_len, tgt_len), -math.inf).triu(1)
        masks["attn_mask"].is_causal = rng.random() < 0.7  # as a decoder says, or not
    if rng.random() < 0.6:
        lengths = torch.tensor([rng.randrange(src_len + 1) for _ in range(bsz)])
        masks["key_padding_mask"] = torch.arange(src_len)[None] >= lengths[:, None]
    upstream = torch.randn(tgt_len, bsz, width)

    def results(module, dtype, **options):
        module = copy.deepcopy(module).to(dtype)
        q = query.to(dtype, copy=True).requires_grad_()
        k = q if is_self else key.to(dtype, copy=True).requires_grad_()
        output = module(q, k, k, **masks, **options)[0]
        output.backward(upstream.to(dtype))
        return [output.detach(), q.grad, k.grad, *(p.grad for p in module.parameters() if p.grad is not None)]

    found = results(module, dtype, need_weights=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTIMAX_BACKEND", "eager")
        expected = results(module, torch.float64, need_weights=True)
    what += f" {scale} heads {heads} width {width} {bsz} x {tgt_len} x {src_len} {sorted(masks)}"
    if dtype != torch.float64:  # where rounding decides what is kept, or has a gradient, it can jump
        name = type(mapping).__name__
        found = [] if name == "EvSoftmax" else found if name in ("Softmax", "MultiMax", "Entmax15") else found[:1]
    for ours, theirs in zip(found, expected):
        error = (ours.double() - theirs).abs().max().item()
        allowed = 20 * ERRORS[dtype] * max(1, theirs.abs().max().item())
        expect(error <= allowed, what, "differs from fp64 by", error, "where", allowed, "is allowed")


# name → attack, and how often it is drawn
ATTACKS = {
    "run": (damaged_run, 20),
    "data": (damaged_data, 12),
    "table": (damaged_table, 12),
    "input": (damaged_input, 3),
    "options": (strange_options, 12),
    "arguments": (strange_arguments, 12),
    "flags": (strange_flags, 20),
    "kill": (killed, 3),
    "attention": (attention, 30),
}


def attack(name, seed):
    """Make one attack; what failed, in a line, or None."""
    folder = Path(tempfile.mkdtemp(prefix="attack-", dir=workplace()))
    try:
        ATTACKS[name][0](random.Random(seed), folder)
    except Failure as failure:
        return " ".join(str(failure).split())[:400]
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        return f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def campaign(seed, goes_on, names=tuple(ATTACKS)):
    """Attack while ``goes_on()``; (how often each, failures)."""
    rng, counts, failures = random.Random(seed), Counter(), []
    while goes_on():
        name = rng.choices(names, [ATTACKS[name][1] for name in names])[0]
        number = rng.randrange(10**9)
        counts[name] += 1
        failure = attack(name, number)
        if failure:
            failures.append(f"{name}:{number}: {failure}")
            print(f"FAILED {failures[-1]}", flush=True)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="these attacks alone")
    parser.add_argument("--repeat", metavar="NAME:NUMBER", help="one attack, as a failure names it")
    args = parser.parse_args()
    try:
        if args.repeat:
            name, _, number = args.repeat.partition(":")
            failure = attack(name, int(number))
            print(f"FAILED {args.repeat}: {failure}" if failure else f"{args.repeat}: no failure")
            sys.exit(bool(failure))
        end = time.monotonic() + 60 * args.minutes
        counts, failures = campaign(args.seed, lambda: time.monotonic() < end, args.only)
        print(", ".join(f"{name}: {counts[name]}" for name in args.only), f"- {len(failures)} failures", flush=True)
        sys.exit(bool(failures))
    finally:
        shutil.rmtree(workplace(), ignore_errors=True)


if __name__ == "__main__":
    main()
