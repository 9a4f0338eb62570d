"""What is said where there is no fairseq, which most of this package works with, and not all of it."""

import importlib.util
import platform
import sys


def has_fairseq() -> bool:
    return importlib.util.find_spec("fairseq") is not None


def advice() -> str:
    """One line: where fairseq can be had, what is here, and what works without it."""
    here = f"Python {'.'.join(map(str, sys.version_info[:2]))} on {platform.system()} {platform.machine()}"
    return (
        "fairseq is not installed. Linux on x86-64 has it for Python 3.11 and 3.12 (pip install ve-fairseq), and "
        f"Python 3.10 (pip install fairseq==0.12.2); this is {here}. multimax_fairseq.mappings and "
        "multimax_fairseq.attention work without it"
    )


def analyze() -> None:
    """The command ``multimax-analyze``: ``analysis.cli.main``, or one line where fairseq is missing."""
    try:
        from .analysis.cli import main

        main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "fairseq":
            raise
        sys.exit(f"ERROR: {advice()}")
