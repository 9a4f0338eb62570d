"""``python -m multimax_fairseq``."""

import os
import subprocess
import sys

from conftest import PLUGIN, ROOT


def test_prints_the_folder_for_user_dir_and_nothing_else(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "multimax_fairseq"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.stdout == f"{PLUGIN}\n", result.stderr


def test_imports_neither_torch_nor_fairseq(tmp_path):
    """So that it answers at once."""
    code = "import runpy, sys; runpy.run_module('multimax_fairseq'); print({'torch', 'fairseq'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.stdout == f"{PLUGIN}\nset()\n", result.stderr
