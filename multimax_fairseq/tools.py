"""What the command-line tools share: arguments, one-line errors, checkpoints, whole files.

torch and fairseq are imported only where a checkpoint or a user's folder is read: the other tools start at once.
"""

import argparse
import csv
import os
import re
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterable, Iterator, List, NoReturn, Optional, Sequence


class UserError(Exception):
    """Something that the user can fix; its one-line text says how."""


# ---------------------------------------------------------------------- arguments


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with the tools' own help text and one-line errors."""

    def __init__(self, text: str, **kwargs: Any):
        description, _, rest = text.partition("\n\n")
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=rest, formatter_class=formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        hint = ". A file whose name begins with a dash is ./-NAME" if "expected" in message else ""
        self.exit(2, f"ERROR: {_printable(message)}; see --help{hint}\n")


def positive(text: str) -> int:
    """Argument type: a whole number above 0."""
    if text.isascii() and text.isdecimal() and 0 < int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def import_user_dir(folder: Optional[Path]) -> None:
    """Import a folder with the user's own mappings, as fairseq does; None: do nothing.

    Raises:
        UserError: it is no Python package, or its import fails.
    """
    if folder is None:
        return
    if not (folder / "__init__.py").is_file():
        raise UserError(f"--user-dir {folder}: there is no __init__.py in it")
    from .compat import import_quietly

    import_quietly()
    from fairseq.utils import import_user_module

    try:
        import_user_module(argparse.Namespace(user_dir=str(folder)))
    except Exception as error:  # the file can raise anything
        raise UserError(f"--user-dir {folder}: {reason_of(error)}") from error


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """End the program with ``ERROR: …`` and exit status 1 on errors that the user can fix."""
    try:
        yield
    except UserError as error:
        sys.exit(f"ERROR: {_printable(error)}")
    except OSError as error:
        sys.exit(f"ERROR: {_printable(error.filename or 'a file')}: {error.strerror or error}")


def reason_of(error: Exception) -> str:
    """Its type and its first line, or that about a tensor of another size, which says whose."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {next((line for line in lines if 'size mismatch' in line), lines[0])}"


def _printable(text: object) -> str:
    """Without line breaks and the like, which a file name can have."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda control: repr(control[0])[1:-1], str(text))


# ---------------------------------------------------------------------- checkpoints


def read_checkpoint(path: Path, load: Optional[Callable[[], Any]] = None) -> Dict[str, Any]:
    """Read a fairseq checkpoint on the CPU, from torch 2.4 on without running any code in it.

    Args:
        load: reads the file in torch's place, as fairseq does for instance: without running code from torch 2.6 on.

    Returns:
        what fairseq has saved; ``"model"`` has the parameters by name, all finite.

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or training has diverged.
    """
    import torch

    try:
        if zipfile.is_zipfile(path):  # torch does not check the checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = load() if load else _load(path)
    except OSError as error:
        raise UserError(f"the checkpoint {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling can raise anything
        what = "cannot be read as a checkpoint of fairseq (damaged, cut off, or something else)"
        raise UserError(f"{path} {what}: {reason_of(error)}") from error
    parameters = entry(state, path, "model")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{path} holds no parameters: it is not a checkpoint of a model")
    for name, tensor in parameters.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path} is no checkpoint of fairseq: its {name!r} is not a tensor")
        if not tensor.isfinite().all():
            raise UserError(f"{path} has NaN or infinity in {name}: its training has diverged; take an earlier one")
    return state


def _load(path: Path) -> Any:
    import torch

    if not hasattr(torch.serialization, "add_safe_globals"):  # torch cannot be told what is safe beside tensors
        return torch.load(path, map_location="cpu", weights_only=False)
    from .compat import globals_of_arrays

    torch.serialization.add_safe_globals([argparse.Namespace, *globals_of_arrays()])
    return torch.load(path, map_location="cpu", weights_only=True)


def entry(state: Any, path: Path, *keys: Any) -> Any:
    """``state[key][key]…`` of the contents of ``path``, through dictionaries, lists and namespaces.

    Raises:
        UserError: it has no such entry.
    """
    try:
        for key in keys:
            state = (vars(state) if isinstance(state, argparse.Namespace) else state)[key]
    except (KeyError, IndexError, TypeError):
        name = ".".join(map(str, keys))
        raise UserError(f"{path} has no entry {name!r}: it is not a checkpoint of fairseq-train") from None
    return state


# ---------------------------------------------------------------------- outputs


def check_output(path: Path) -> None:
    """Check before the work that a file can be written.

    Raises:
        UserError: it is a folder, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} to write {path.name} to: make it first")
    check_output_folder(path.parent)


def check_output_folder(path: Path) -> None:
    """The same for a folder, which need not exist yet."""
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} is no folder that can be written to: choose another")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; it replaces ``path`` once it is whole and on the disk, and is removed on failure.

    Raises:
        UserError: it cannot be written: a full disk, say.
    """
    with replacing_path(path) as part, open(part, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing_path(path: Path, replace: bool = False) -> Iterator[Path]:
    """A name for a file or folder to make; it becomes ``path`` once it is whole, and is removed on failure.

    Args:
        replace: also a folder that is not empty.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:100]}.") as staging:
            yield Path(staging, "new")
            if replace and path.exists():
                os.replace(path, Path(staging, "old"))
            os.replace(Path(staging, "new"), path)
    except (OSError, RuntimeError) as error:
        refusal = error if isinstance(error, OSError) else error.__context__  # torch's writer hides it
        if not isinstance(refusal, OSError):
            raise
        raise UserError(f"could not write {path}: {refusal.strerror or refusal}") from error


def grouped(rows: Iterable[Dict[str, Any]], name: str) -> Dict[Any, List[Dict[str, Any]]]:
    """The rows of a table by what they have in this column, in order."""
    groups: Dict[Any, List[Dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def write_table(path: Path, rows: Sequence[Dict[str, Any]], without: Sequence[str] = ()) -> None:
    """Write a CSV file, a line a row, with the columns that any row has."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in without]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
