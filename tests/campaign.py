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
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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
    for name in ("best.hypotheses", "best.references"):
        shutil.copy(workplace() / "text" / "test.en", folder / name)
    details = "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0 = 100.00 100.0/100.0 (BP = 1.000)"
    (folder / "best.bleu").write_text(details + "\n")
    message = in_process("record_run", [folder, "--experiment", "x"])
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
    expect(message.startswith("ERROR: "), tool, "ends with", repr(message))
    return message


@cache
def script(name):
    return load_script(name)


# ---------------------------------------------------------------------- attacks


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


def damaged(rng, folder):
    """A damaged file of a run or its data: no tool has a traceback; a damaged checkpoint is never a success."""
    place = shutil.copytree(trained_run(), folder / "run")
    data = shutil.copytree(workplace() / "data-bin", folder / "data-bin")
    best, split = place / "checkpoint_best.pt", rng.choice(["valid", "test"])
    tools = {  # and what begins the names of files that have to be intact
        "average_checkpoints": ([best, place / "checkpoint_last.pt", "--output", place / "a.pt"], "checkpoint_"),
        "check_decoding": ([data, "--path", best, "--sentences", 2, "--split", split], "checkpoint_best"),
        "record_run": ([place, "--experiment", "x"], "checkpoint_"),
        "results_table": ([place, "--samples", 1], "none"),
        "multimax-analyze": ([best, "--data", data, "--split", split, "--out", place / "out", "--max-sentences", 2,
                              "--no-progress-bar", "--show", "--cpu"], "checkpoint_best"),
    }
    tool = rng.choices(list(tools), [4, 6, 4, 4, 1])[0]  # the figures of the last take seconds
    arguments, reads = tools[tool]
    attacked = data if tool in ("check_decoding", "multimax-analyze") and rng.random() < 0.7 else place
    victim = rng.choice(sorted(attacked.iterdir()))
    how, before = damage(rng, victim), set(place.iterdir())
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


# script → options, and names in the workplace; all write to FOLDER/out
KILLED = {
    "prepare_multi30k.sh": ["--from", "multi30k", "--vocab-size", 300],
    "prepare_iwslt14.sh": ["--archive", "de-en.tgz", "--merges", 200],
    "prepare_wikitext103.sh": ["--archive", "wikitext-103-v1.zip"],
    "prepare_text_lm.sh": ["--from", "text"],
    "prepare_demo.sh": [],
    "score_translation.sh": ["--data-bin", "data-bin", "--checkpoint", "run/checkpoint_best.pt", "--reference",
                             "text/test.en"],
}


def killed(rng, folder):
    """A command, killed at random up to three times, then run to its end: the result of one that was not stopped."""
    name = rng.choice(sorted(KILLED))
    expected, seconds = uninterrupted(name)
    for _ in range(rng.randrange(1, 4)):
        process = start(name, folder)
        try:  # ended with what it has started, as by a machine that goes down
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            process.wait()
    expect(whole(name, folder) == expected, name, "has another result after a kill")


@cache
def uninterrupted(name):
    """What a command makes that nobody stops, and the seconds that it takes."""
    folder = workplace() / f"whole-{name}"
    folder.mkdir()
    start = time.monotonic()
    return whole(name, folder), time.monotonic() - start


def start(name, folder):
    trained_run()
    options = [workplace() / str(option) for option in KILLED[name]]
    options = [path if path.exists() else option for path, option in zip(options, KILLED[name])]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(["bash", *map(str, [SCRIPTS / name, *options, "--out", folder / "out"])], cwd=folder,
                                stdout=log, stderr=log, start_new_session=True, env=environment())


def whole(name, folder):
    """What a script makes that runs to its end."""
    status, said = start(name, folder).wait(), (folder / "log").read_text(errors="replace")
    expect(status == 0 and "Traceback" not in said, name, "fails:", said[-500:])
    outputs = [folder / f"out.{kind}" for kind in ("hypotheses", "bleu")]
    return digest(folder / "out") if (folder / "out").exists() else [path.read_bytes() for path in outputs]


# ---------------------------------------------------------------------- the campaign

# name → attack, and how often it is drawn
ATTACKS = {"damage": (damaged, 10), "kill": (killed, 1)}


def attack(name, seed):
    """Make one attack; what failed, in a line, or None."""
    folder = Path(tempfile.mkdtemp(prefix="attack-", dir=workplace()))
    try:
        ATTACKS[name][0](random.Random(seed), folder)
    except Exception as error:
        said = " ".join(str(error).split())[:400]
        return said if isinstance(error, Failure) else f"{type(error).__name__}: {said}"
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
    parser.add_argument("--repeat", metavar="NAME:NUMBER", help="one attack, as a failure names it")
    args = parser.parse_args()
    try:
        if args.repeat:
            name, _, number = args.repeat.partition(":")
            failure = attack(name, int(number))
            sys.exit(f"FAILED {args.repeat}: {failure}" if failure else None)
        end = time.monotonic() + 60 * args.minutes
        counts, failures = campaign(args.seed, lambda: time.monotonic() < end)
        print(", ".join(f"{name}: {counts[name]}" for name in ATTACKS), f"- {len(failures)} failures", flush=True)
        sys.exit(bool(failures))
    finally:
        shutil.rmtree(workplace(), ignore_errors=True)


if __name__ == "__main__":
    main()
