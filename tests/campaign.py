"""Attacks on everything that a user can meet, at random, for as long as you like. No part of the test suite.

    python tests/campaign.py --minutes 60 --seed 1
    python tests/campaign.py --repeat kill:123456

An attack is a function of the table ``ATTACKS`` that draws what it does from a generator and raises ``Failure`` where
something is not as it should be: a traceback, a success on damaged files, something left behind, other bytes after a
kill than without. A line is printed for each failure, with the word that repeats it, and at the end how often each
attack was made. The exit status is 1 if there was a failure.
"""

# ruff: noqa: E402

import argparse
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

import torch
from conftest import ROOT, TINY, call, demo_corpus, digest, environment, load_script, parse, run, save_checkpoint
from fairseq import tasks

import multimax_fairseq.models  # noqa: F401  torch.load then takes checkpoints of fairseq
from multimax_fairseq.analysis import cli as analysis_cli

SCRIPTS = ROOT / "scripts"


class Failure(Exception):
    """Something is not as it should be."""


def expect(holds, *words):
    if not holds:
        raise Failure(" ".join(map(str, words)))


# ---------------------------------------------------------------------- what is attacked: made once, then copied


@cache
def workplace():
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    run("bash", SCRIPTS / "make_smoke_data.sh", folder)
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
    for name in ("best.hypotheses", "best.references"):
        (folder / name).write_text(references)
    details = "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0 = 100.00 100.0/100.0 (BP = 1.000)"
    (folder / "best.bleu").write_text(details + "\n")
    for tool, options in (("record_run", ["--experiment", "x"]), ("results_table", ["--samples", 1])):
        message = in_process(tool, [folder, *options])
        expect(message is None, message)
    return folder


def in_process(tool, arguments):
    """A tool of Python: None if it succeeds, or its one line of error; a traceback is a failure."""
    try:
        result = call(analysis_cli if tool == "multimax-analyze" else script(tool), *arguments, check=False)
    except Exception as error:
        raise Failure(f"{tool}: traceback: {type(error).__name__}: {error}") from error
    if not result.returncode:
        return None
    message = result.stderr.strip().splitlines()[-1]
    is_a_line = re.fullmatch(r"(ERROR: |\w+: error: ).*", message)  # the second is argparse's
    expect(is_a_line, tool, "ends with", repr(message))
    return message


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
    content = path.read_bytes()
    where, size = rng.randrange(len(content) or 1), rng.randrange(1, 400)
    before, at, after = content[:where], content[where : where + 1], content[where + size :]
    how, changed = rng.choice([
        ("cut", before), ("flip", before + bytes(byte ^ 1 << size % 8 for byte in at) + content[where + 1 :]),
        ("zero", before + bytes(size) + after), ("insert", before + rng.randbytes(size) + content[where:]),
        ("empty", b""), ("noise", rng.randbytes(size)), ("delete", None),
    ])
    path.unlink() if changed is None else path.write_bytes(changed)
    return f"{how} at {where} of {path.name}"


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
        ("record_run", [place, "--experiment", "x"], "checkpoint_"),
        ("results_table", [place, "--samples", 1], "none"),
    ])
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
    tool, arguments = "check_decoding", [data, "--path", best, "--sentences", 3, "--split", split]
    if rng.random() < 0.2:  # its figures take seconds
        tool = "multimax-analyze"
        arguments = [best, "--data", data, "--split", split, "--out", folder / "out", "--max-sentences", 2,
                     "--no-progress-bar", "--show", "--cpu"]
    message = in_process(tool, arguments)
    expect(message is None or not (folder / "out").exists(), tool, "leaves a report after", how)


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
    folder = workplace() / f"whole-{name}"
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

    return command, lambda folder: digest(folder / "out")


SOURCES = ("multi30k", "de-en.tgz", "wikitext-103-v1.zip", "text")
KILLED = {
    "prepare_multi30k.sh": preparation("prepare_multi30k.sh", "--from", "multi30k", "--vocab-size", 300),
    "prepare_iwslt14.sh": preparation("prepare_iwslt14.sh", "--archive", "de-en.tgz", "--merges", 200),
    "prepare_wikitext103.sh": preparation("prepare_wikitext103.sh", "--archive", "wikitext-103-v1.zip"),
    "prepare_text_lm.sh": preparation("prepare_text_lm.sh", "--from", "text"),
    "prepare_demo.sh": preparation("prepare_demo.sh"),
    "score_translation.sh": (
        lambda folder: [SCRIPTS / "score_translation.sh", "--data-bin", workplace() / "data-bin", "--checkpoint",
                        trained_run() / "checkpoint_best.pt", "--reference", workplace() / "text" / "test.en",
                        "--out", folder / "test"],
        lambda folder: [(folder / f"test.{kind}").read_bytes() for kind in ("hypotheses", "bleu")],
    ),
}


def kill_at_random(rng, command, folder, most):
    """Start a script, and end it and what it started at a random moment, as a machine that goes down does."""
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(["bash", *map(str, command)], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                   cwd=folder, start_new_session=True, env=environment())
        try:
            process.wait(rng.uniform(0, most))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            process.wait()


# name → attack, and how often it is drawn
ATTACKS = {"run": (damaged_run, 20), "data": (damaged_data, 12), "kill": (killed, 3)}


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
