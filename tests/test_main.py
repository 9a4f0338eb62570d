"""``python -m multimax_fairseq``."""

import sys

from conftest import PLUGIN, ROOT, run


def test_prints_the_folder_for_user_dir_and_nothing_else(tmp_path):
    result = run(sys.executable, "-m", "multimax_fairseq", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert result.stdout == f"{PLUGIN}\n"


def test_imports_neither_torch_nor_fairseq(tmp_path):
    """So that it answers at once."""
    code = "import runpy, sys; runpy.run_module('multimax_fairseq'); print({'torch', 'fairseq'} & set(sys.modules))"
    result = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert result.stdout == f"{PLUGIN}\nset()\n"
