"""What several test files need: small real data, models built by fairseq's own parser, real commands."""

import copy
import functools
import gc
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# Models and tensors are tiny here: more threads cost more than they bring. Before torch, and for the commands too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compiling takes seconds a kernel and a dtype; the tests that are about it say so.
os.environ.setdefault("MULTIMAX_BACKEND", "eager")

import fork_server  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils.cpp_extension import get_cxx_compiler  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ROOT / "multimax_fairseq"

# 2 + 2 layers of width 16 in the options of a translation model; half of it in those of a language model.
TINY = [
    *("--encoder-layers", "2", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16"),
    *("--encoder-attention-heads", "2", "--decoder-layers", "2", "--decoder-embed-dim", "16"),
    *("--decoder-ffn-embed-dim", "16", "--decoder-attention-heads", "2"),
]
TINY_LM = [
    *("--decoder-layers", "2", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "16"),
    *("--decoder-attention-heads", "2", "--decoder-input-dim", "16", "--decoder-output-dim", "16"),
]

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(get_cxx_compiler().split()[0]) is None,
    reason="needs Linux and a C++ compiler",
)


def environment(*folders):
    """That of this process, with the commands of these folders and of its Python first."""
    folders = [*folders, str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(folders)}


def run(*command, check=True, env=None, **kwargs):
    """Run a command of this Python's environment; its output goes into the error when it fails.

    fairseq's commands are called in a process that has imported it; by their full path they are started anew.
    """
    variables = environment(fork_server.path()) | (env or {})
    result = subprocess.run(["env", *map(str, command)], capture_output=True, text=True, env=variables, **kwargs)
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


# Parameters that fairseq 0.12.2's encoder layers have twice, and use in evaluation.
TWICE = re.compile(r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")


def trained_parameters(model):
    """Names and parameters, but for those that some encoder layers have twice."""
    return [(name, parameter) for name, parameter in model.named_parameters() if not TWICE.fullmatch(name)]


def digest(folder):
    """Of names and bytes, without fairseq's log, which has the time, and the record of it."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("preprocess.log", ".complete"):
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def load_script(name):
    """A file of scripts/, benchmarks/ or examples/*/ as a module, by its name; it finds the files beside it."""
    folders = ("scripts", "benchmarks", "examples/*")
    path = next(path for folder in folders for path in ROOT.glob(f"{folder}/{name}.py"))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, and functions in a new process, are looked for
    spec.loader.exec_module(module)
    return module


def call(script, *arguments, check=True):
    """A command of scripts/ or of examples/ in this process, which has imported all that it needs.

    Args:
        script: its name, without .py, or its module.

    Returns:
        stdout, stderr and returncode, as :func:`run`.
    """
    module = load_script(script) if isinstance(script, str) else script
    output, errors, status = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        try:
            module.main()
        except SystemExit as stopped:
            status = stopped.code
    if isinstance(status, str):
        print(status, file=errors)
    status = 1 if isinstance(status, str) else status or 0
    assert not check or status == 0, errors.getvalue()
    return Namespace(stdout=output.getvalue(), stderr=errors.getvalue(), returncode=status)


def save_checkpoint(built, path):
    """What fairseq-train saves of a model, without the state of training."""
    from fairseq import checkpoint_utils
    from omegaconf import OmegaConf

    path.parent.mkdir(parents=True, exist_ok=True)
    history = [{"num_updates": 1, "criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}}]
    scores = {"val_loss": 3.0, "best": 3.0, "previous_training_time": 1.0}
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(built.cfg, resolve=True, enum_to_str=True),
        "model": built.model.state_dict(),
        "optimizer_history": history,
        "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1}, **scores},
        "last_optimizer_state": None,
    }
    checkpoint_utils.torch_persistent_save(state, str(path))
    return path


def train_command(experiment, folder, *options):
    """The options of the fairseq-train of a recipe, whose data and run are in a folder.

    run.sh gives them first to a Python, for which there is a stub here.
    """
    stub = folder / "bin" / "python"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{folder}/words\nexit 1\n")
    stub.chmod(0o755)
    command = ["bash", ROOT / "examples" / experiment / "run.sh", folder / "run", *options]
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([*map(str, command)], env={**os.environ, "PATH": path, "DATA": str(folder)})
    return (folder / "words").read_text().splitlines()[2:]


def rows_of(markdown):
    """The cells of a table by the name of its row, the header as "mapping"."""
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 2 and cells[0].strip("-")}


def pytest_collection_finish():
    """What has been imported stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """The same numbers in every run, whatever ran before: tolerances hold for them, not for all that can be drawn."""
    torch.manual_seed(0)


def demo_corpus(folder, **sizes):
    """So many sentence pairs a split of the demo's grammar, binarised in data-bin; returns the folder of the text."""
    text = folder / "text"
    run(sys.executable, ROOT / "scripts" / "make_demo_corpus.py", "--out", text,
        *(f"--{split}={size}" for split, size in sizes.items()))  # fmt: skip
    run("fairseq-preprocess", "--source-lang", "de", "--target-lang", "en", "--joined-dictionary",
        "--trainpref", text / "train", "--validpref", text / "valid", "--testpref", text / "test",
        "--destdir", folder / "data-bin")  # fmt: skip
    return text


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """600 / 60 / 40 sentence pairs of the demo's grammar, as text and binarised for both tasks."""
    folder = tmp_path_factory.mktemp("corpus")
    text = demo_corpus(folder, train=600, valid=60, test=40)
    run("fairseq-preprocess", "--only-source", "--trainpref", text / "train.en", "--validpref", text / "valid.en",
        "--testpref", text / "test.en", "--destdir", folder / "data-bin-lm")  # fmt: skip
    return folder


@functools.lru_cache(maxsize=None)
def _parsed(*arguments):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    args = options.parse_args_and_arch(options.get_training_parser(), list(arguments))
    return args, convert_namespace_to_omegaconf(args)


def parse(arguments):
    """fairseq-train's arguments, parsed as it does, in a third of a second: (namespace, configuration)."""
    return copy.deepcopy(_parsed(*map(str, arguments)))


@pytest.fixture(scope="session")
def build(corpus):
    """build(arch, *options, seed=1) → the model (in evaluation) and task of fairseq-train, tiny."""
    from fairseq import tasks

    import multimax_fairseq.models  # noqa: F401

    def build(arch, *options, seed=1):
        is_lm = "_lm" in arch
        data = [corpus / ("data-bin-lm" if is_lm else "data-bin")]
        data += ["--task", "language_modeling", "--tokens-per-sample", "32"] if is_lm else []
        size = TINY_LM if is_lm else TINY
        _, cfg = parse([*data, "--arch", arch, *size, *options])
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(seed)
        return Namespace(model=task.build_model(cfg.model).eval(), task=task, cfg=cfg)

    return build


@pytest.fixture(scope="session")
def batch(corpus):
    """batch(built, split="test", size=8) → the first sentences of a split as fairseq's sample."""

    def batch(built, split="test", size=8):
        built.task.load_dataset(split)
        dataset = built.task.dataset(split)
        return dataset.collater([dataset[index] for index in range(size)])

    return batch
