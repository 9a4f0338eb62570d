"""Attacks on everything that a user can meet, at random, for as long as you like. No part of the test suite.

    python tests/campaign.py --minutes 60 --seed 1
    python tests/campaign.py --repeat kill:123456

An attack is a function of the table ``ATTACKS`` that draws what it does from a generator and fails where something is
not as it should be: a traceback, a success on damaged files, something left behind, other bytes after a kill than
without. A line is printed for each failure, with the word that repeats it, and at the end how often each attack was
made. The exit status is 1 if there was a failure.
"""

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

from conftest import ROOT, TINY, demo_corpus, digest, environment, parse, run  # before torch: it sets the threads

import multimax_fairseq.models  # noqa: F401  before fairseq, which it imports quietly; torch takes its checkpoints then

# isort: split
import torch
from fairseq import tasks
from test_tools import TOOLS, error_of, evaluated_run

SCRIPTS = ROOT / "scripts"

# ---------------------------------------------------------------------- what is attacked: made once, then copied


@cache
def workplace():
    """A folder with the data of the scripts; the demo's text, and that binarised; and an evaluated run of it."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    run("bash", SCRIPTS / "make_smoke_data.sh", folder)
    text = demo_corpus(folder, train=200, valid=20, test=20)
    for split in ("train", "valid", "test"):
        shutil.copy(text / f"{split}.en", text / f"{split}.tokens")
    return with_a_run(folder)


def with_a_run(folder):
    _, cfg = parse([folder / "data-bin", "--arch", "multimax_transformer", *TINY])
    torch.manual_seed(1)  # or an attack could not be repeated
    place = evaluated_run(Namespace(model=tasks.setup_task(cfg.task).build_model(cfg.model), cfg=cfg), folder / "run")
    for name in ("best.hypotheses", "best.references"):
        shutil.copy(folder / "text" / "test.en", place / name)
    assert error_of("record_run", TOOLS["record_run"](place, folder)) is None
    return folder


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


# tool → what begins the names of files that have to be intact, and how often it is drawn
READ = {
    "average_checkpoints": ("checkpoint_best", 4),
    "check_decoding": ("checkpoint_best", 6),
    "record_run": ("checkpoint_", 4),
    "results_table": ("none", 4),
    "multimax-analyze": ("checkpoint_best", 1),  # its figures take seconds
}


def damaged(rng, folder):
    """A damaged file of a run or its data: no tool has a traceback; a damaged checkpoint is never a success."""
    intact = workplace() / "run"
    place = shutil.copytree(intact, folder / "run")
    data = shutil.copytree(workplace() / "data-bin", folder / "data-bin")
    tool = rng.choices(list(READ), [often for _, often in READ.values()])[0]
    attacked = data if tool in ("check_decoding", "multimax-analyze") and rng.random() < 0.7 else place
    victim = rng.choice(sorted(attacked.iterdir()))
    how, before = damage(rng, victim), set(place.iterdir())
    message = error_of(tool, [place, "--samples", 1] if tool == "results_table" else TOOLS[tool](place, folder))
    if message is None and victim.name.startswith(READ[tool][0]):
        assert is_intact(victim, intact / victim.name), f"{tool} succeeds after {how}"
    assert message is None or set(place.iterdir()) == before, f"{tool} leaves something after {how}"


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
    assert whole(name, folder) == expected, f"{name} has another result after a kill"


@cache
def uninterrupted(name):
    """What a command makes that nobody stops, and the seconds that it takes."""
    folder = workplace() / f"whole-{name}"
    folder.mkdir()
    start = time.monotonic()
    return whole(name, folder), time.monotonic() - start


def start(name, folder):
    options = [workplace() / str(option) for option in KILLED[name]]
    options = [path if path.exists() else option for path, option in zip(options, KILLED[name])]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(["bash", *map(str, [SCRIPTS / name, *options, "--out", folder / "out"])], cwd=folder,
                                stdout=log, stderr=log, start_new_session=True, env=environment())


def whole(name, folder):
    """What a script makes that runs to its end."""
    status, said = start(name, folder).wait(), (folder / "log").read_text(errors="replace")
    assert status == 0 and "Traceback" not in said, f"{name} fails: {said[-500:]}"
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
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
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
