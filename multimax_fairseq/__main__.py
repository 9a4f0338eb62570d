"""``python -m multimax_fairseq`` prints the folder to give to ``--user-dir``."""

from pathlib import Path

print(Path(__file__).resolve().parent)
