"""``python -m multimax_fairseq`` prints the folder for ``--user-dir``; with ``--help``, the plugin's options."""

import argparse
import sys
from pathlib import Path


def print_options() -> None:
    """Print the options that the plugin adds to fairseq's commands; those of its criterions come last."""
    import fairseq.options  # noqa: F401  (first: its modules import each other in a circle)
    from fairseq.dataclass.utils import gen_parser_from_dataclass

    from .criterions import ChunkedCrossEntropyCriterionConfig
    from .models import MappingOptions

    parser = argparse.ArgumentParser(
        prog='fairseq-train DATA --user-dir "$(python -m multimax_fairseq)" --arch multimax_transformer',
        add_help=False,
        description="The options of the plugin; fairseq's own: fairseq-train --help. In a Hydra config they are "
        "fields of model: and criterion:, with _ for -.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    gen_parser_from_dataclass(parser.add_argument_group("model"), MappingOptions())
    losses = parser.add_argument_group("--criterion chunked_cross_entropy, --criterion entmax_loss")
    gen_parser_from_dataclass(losses, ChunkedCrossEntropyCriterionConfig())
    print(parser.format_help())


if sys.argv[1:] in (["-h"], ["--help"]):
    print_options()
elif sys.argv[1:]:
    sys.exit(f"python -m multimax_fairseq takes --help, or nothing; got {' '.join(sys.argv[1:])}")
else:
    print(Path(__file__).resolve().parent)
