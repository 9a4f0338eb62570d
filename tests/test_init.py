"""Importing the package: once, from anywhere, in any process; and nothing printed."""

import sys

import pytest
from conftest import PLUGIN, ROOT, run

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


AFTER = "import fairseq\n"
FROM_ROOT = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"


@pytest.mark.parametrize("code", [
    AFTER + IMPORT_USER_DIR + IMPORT_USER_DIR + "import multimax_fairseq.models",
    AFTER + FROM_ROOT + "import multimax_fairseq",
    FROM_ROOT + "import multimax_fairseq.mappings" + IMPORT_USER_DIR,
    FROM_ROOT + "import multimax_fairseq.analysis.checkpoint",  # as multimax-analyze does
])  # fmt: skip
def test_every_way_of_importing_registers_each_architecture_once(code, tmp_path):
    """In a folder from which the package is found only by --user-dir; in a fresh interpreter, or after fairseq."""
    python = "python" if code.startswith(AFTER) else sys.executable
    assert run(python, "-c", code + COUNT, cwd=tmp_path).stdout == "9\n"
