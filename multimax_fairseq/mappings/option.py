"""How a mapping's class declares an argument that has a command-line option of its own."""

from typing import NamedTuple


class Option(NamedTuple):
    """One entry of a class's ``options``; type, default and check are those of its constructor.

    Attributes:
        name: the field of a config, and, with dashes, the flag.
        argument: of the constructor.
        help: of the flag.
        may_change: whether a run can be resumed with another value.
    """

    name: str
    argument: str
    help: str
    may_change: bool = False
