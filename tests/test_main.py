"""``python -m multimax_fairseq``."""

import sys
from dataclasses import fields

from conftest import PLUGIN, ROOT, run

from multimax_fairseq.criterions import ChunkedCrossEntropyCriterionConfig
from multimax_fairseq.models import MappingOptions


def test_prints_the_folder_for_user_dir_and_imports_neither_torch_nor_fairseq(tmp_path):
    """So that it answers at once."""
    code = "import runpy, sys; runpy.run_module('multimax_fairseq'); print({'torch', 'fairseq'} & set(sys.modules))"
    result = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert result.stdout == f"{PLUGIN}\nset()\n"


def test_help_has_every_option_with_its_default():
    text = run(sys.executable, "-m", "multimax_fairseq", "--help").stdout
    for option in [*fields(MappingOptions), *fields(ChunkedCrossEntropyCriterionConfig)]:
        if not option.name.startswith("_") and not str(option.default).startswith("${"):
            assert f"--{option.name.replace('_', '-')} " in text
    assert "order N of MultiMax's modulator: 1 or 2 (default: 2)" in text
    assert run(sys.executable, "-m", "multimax_fairseq", "help", check=False).returncode == 1
