"""Importing the package: once, from anywhere, in any process; and nothing printed."""

import sys

import pytest
from conftest import PLUGIN, ROOT, run


def python(code, tmp_path):
    """Run code in a fresh interpreter, in a folder from which the package is found only by --user-dir."""
    return run(sys.executable, "-c", code, cwd=tmp_path).stdout.strip()


IMPORT_USER_DIR = f"""
from argparse import Namespace
from fairseq.utils import import_user_module
import_user_module(Namespace(user_dir={str(PLUGIN)!r}))
"""
COUNT = """
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY
assert "chunked_cross_entropy" in CRITERION_REGISTRY
print(sum(name.startswith("multimax_") for name in ARCH_MODEL_REGISTRY))
"""


@pytest.mark.parametrize("code", [
    IMPORT_USER_DIR,
    IMPORT_USER_DIR + IMPORT_USER_DIR,
    f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport multimax_fairseq.models",
    f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport fairseq, multimax_fairseq",
    f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport multimax_fairseq.mappings\n" + IMPORT_USER_DIR,
    IMPORT_USER_DIR + "import multimax_fairseq.models",
])  # fmt: skip
def test_every_way_of_importing_registers_each_architecture_once(code, tmp_path):
    assert python(code + COUNT, tmp_path) == "9"


def test_spawned_workers_register_too(tmp_path):
    script = tmp_path / "spawn.py"
    script.write_text(
        f"{IMPORT_USER_DIR}\nimport torch.multiprocessing\n"
        f"def work(rank, options):\n    exec({IMPORT_USER_DIR + COUNT!r})\n"
        "if __name__ == '__main__':\n    from multimax_fairseq.models import MappingOptions\n"
        "    torch.multiprocessing.spawn(work, (MappingOptions(),), nprocs=2)\n"
    )
    assert run(sys.executable, script, cwd=tmp_path).stdout.split() == ["9", "9"]


def test_importing_prints_nothing_and_leaves_logging_alone(tmp_path):
    code = f"""
import sys, logging; sys.path.insert(0, {str(ROOT)!r})
import fairseq
before = list(logging.getLogger().handlers)
import multimax_fairseq
assert logging.getLogger().handlers == before
"""
    assert python(code, tmp_path) == ""


def test_whoever_loads_checkpoints_has_the_models_registered():
    """In a process of its own, as multimax-analyze is."""
    code = (
        "import multimax_fairseq.analysis.checkpoint; from fairseq.models import MODEL_REGISTRY; "
        "assert {'multimax_transformer', 'multimax_transformer_lm'} <= set(MODEL_REGISTRY)"
    )
    run(sys.executable, "-c", code)
