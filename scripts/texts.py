"""Files of text, for the other scripts."""

from __future__ import annotations

from pathlib import Path

from multimax_fairseq.tools import UserError


def read_text(path: Path) -> str:
    """The content of a file, with the ends of lines that it has.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8") from None


def read_lines(path: Path) -> list[str]:
    """The lines, which end only at "\\n", so that two languages stay aligned line by line."""
    return read_text(path).removesuffix("\n").split("\n")
