"""Files and arguments of the tools: checked before work, written whole or not at all, with one-line errors."""

import argparse
import codecs
import collections
import os
import pickle
import re
import sys
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Dict, Iterator, NoReturn, Optional

import numpy
import torch

from ..compat import trust_plain_records


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


def import_user_dir(folder: Optional[Path]) -> None:
    """Import a folder with the user's own mappings, as fairseq does; None: do nothing.

    Raises:
        UserError: it is no Python package, or its import fails.
    """
    if folder is None:
        return
    if not (folder / "__init__.py").is_file():
        raise UserError(f"--user-dir {folder}: there is no __init__.py in it")
    from fairseq.utils import import_user_module  # here: it takes seconds

    try:
        import_user_module(argparse.Namespace(user_dir=str(folder)))
    except Exception as error:  # the file can raise anything
        raise UserError(f"--user-dir {folder}: {type(error).__name__}: {error}") from error


def positive(text: str) -> int:
    """Argument type: a whole number above 0."""
    if text.isascii() and text.isdecimal() and 0 < int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


@contextmanager
def errors_in_a_line() -> Iterator[None]:
    """End the program with ``ERROR: …`` and exit status 1 on errors that the user can fix."""
    try:
        yield
    except UserError as error:
        sys.exit(f"ERROR: {_printable(error)}")
    except OSError as error:
        sys.exit(f"ERROR: {_printable(error.filename or 'a file')}: {error.strerror or error}")


def _printable(text: object) -> str:
    """Without line breaks and the like, which a file name can have."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda control: repr(control[0])[1:-1], str(text))


# ---------------------------------------------------------------------- checkpoints


def read_checkpoint(path: Path) -> Dict[str, Any]:
    """Read a fairseq checkpoint on the CPU without running any code in it.

    Returns:
        what fairseq has saved; ``"model"`` has the parameters by name, all finite.

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or training has diverged.
    """
    try:
        with open(path, "rb") as file:
            content_begins = file.read(1)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content_begins:
        raise UserError(f"{path} is empty: it is no checkpoint")
    try:
        state = _load(path)
    except Exception as error:  # unpickling can raise anything
        what = "cannot be read as a checkpoint of fairseq (damaged, cut off, or something else)"
        raise UserError(f"{path} {what}: {_reason(error)}") from error
    parameters = entry(state, path, "model")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{path} holds no parameters: it is not a checkpoint of a model")
    for name, tensor in parameters.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(f"{path} is no checkpoint of fairseq: its {name!r} is not a tensor")
        if not tensor.isfinite().all():
            raise UserError(f"{path} has NaN or infinity in {name}: its training has diverged; take an earlier one")
    return state


def entry(state: Any, path: Path, *keys: Any) -> Any:
    """``state[key][key]…`` of the contents of ``path``, through dictionaries, lists and namespaces.

    Raises:
        UserError: it has no such entry.
    """
    for depth, key in enumerate(keys, start=1):
        try:
            if torch.is_tensor(state):
                raise TypeError
            state = (vars(state) if isinstance(state, argparse.Namespace) else state)[key]
        except (KeyError, IndexError, TypeError):
            name = ".".join(map(str, keys[:depth]))
            raise UserError(f"{path} has no entry {name!r}: it is not a checkpoint of fairseq-train") from None
    return state


def _load(path: Path) -> Any:
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):  # torch does not check the checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        file.seek(0)
        trust_plain_records()
        safely = hasattr(torch.serialization, "add_safe_globals")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are no checkpoint
            return torch.load(
                file, map_location="cpu", **({"weights_only": True} if safely else {"pickle_module": _PLAIN_PICKLE})
            )


def _reason(error: Exception) -> str:
    """The line of an error that says what is wrong, without torch's advice to run the file's code anyway."""
    text = str(error)
    foreign = re.search(r"GLOBAL (\S+)", text)
    if foreign:
        return f"it holds {foreign[1]}, and not only tensors and plain records"
    told = re.search(r"WeightsUnpickler error: *(.*)", text)
    line = told[1] if told else next(filter(None, map(str.strip, text.splitlines())), "").split(". ")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


class _PlainUnpickler(pickle.Unpickler):
    """Loads tensors and what fairseq saves with them; torch before 2.4 loads only tensors, or runs anything."""

    ALLOWED = {
        f"{function.__module__}.{function.__qualname__}": function
        for function in (
            argparse.Namespace,
            collections.OrderedDict,
            codecs.encode,
            torch._utils._rebuild_tensor_v2,
            torch._utils._rebuild_parameter,
            torch.Size,
            numpy.ndarray,
            numpy.dtype,
            numpy.zeros(1).__reduce__()[0],
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if wanted not in self.ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {wanted}")
        return self.ALLOWED[wanted]


_PLAIN_PICKLE = ModuleType("plain_pickle")  # for torch.load
_PLAIN_PICKLE.Unpickler = _PlainUnpickler
_PLAIN_PICKLE.load = lambda file, **kwargs: _PlainUnpickler(file, **kwargs).load()


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
    """The same for a folder, which need not exist yet.

    Raises:
        UserError: it cannot be made or written to.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UserError(f"{there} is not a folder: choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"the folder {there} cannot be written to: choose another, or change its permissions")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to; it replaces ``path`` once it is whole and on the disk, and is removed on failure.

    Raises:
        UserError: it cannot be written: a full disk, say.
    """
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
        raise UserError(f"could not write {path}: {_what_the_system_said(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def _what_the_system_said(error: Optional[BaseException]) -> str:
    """The system's message in an error, or in the errors that led to it."""
    reasons, seen = [], error
    while seen is not None:
        reasons += [seen.strerror] if isinstance(seen, OSError) and seen.strerror else []
        seen = seen.__context__
    return (reasons or [str(error)])[-1]


def sync_folder(folder: Path) -> None:
    """Flush a folder's file names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
