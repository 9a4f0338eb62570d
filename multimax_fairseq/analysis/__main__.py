"""``python -m multimax_fairseq.analysis``: the command ``multimax-analyze``."""

from .cli import main

if __name__ == "__main__":
    main()
