"""Importing the package: once, from anywhere, in any process; and nothing printed."""

import ast
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


def test_imports_go_one_way():
    """As docs/how-it-is-built.md says: none from a room that comes later."""
    rooms = ["kernels", "mappings", "attention", "modules", "criterions", "models", "analysis"]
    for path in PLUGIN.rglob("*.py"):
        parts = path.relative_to(PLUGIN).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())) if parts[0] in rooms else ():
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                for imported in ((*parts[: -node.level], *name.split("."))[0] for name in names):
                    assert imported not in rooms[rooms.index(parts[0]) + 1 :], (path, imported)
