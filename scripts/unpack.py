#!/usr/bin/env python
"""Copies files out of an archive that may be cut short, the wrong one, or hostile.

    python scripts/unpack.py ARCHIVE FOLDER NAME [NAME ...]

writes FOLDER/NAME for each NAME, a file in any folder of ARCHIVE (a zip or a tar, plain or compressed). The archive's
paths are not used on the disk, so nothing is written anywhere else. An archive with a path that leads out of its
folder, a link or a device is still refused: it was not made for this purpose.

Exit status: 0 for success; 1 if the archive is at fault, 2 the command line, 3 the disk. On failure the last line of
standard error says why, and nothing is left in FOLDER.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import lzma
import re
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

MOST_MEMBERS = 10_000
MOST_BYTES = 4 * 2**30  # unpacked; WikiText-103 has 0.5 GB
BLOCK = 2**20  # bytes read at a time
LARGEST_HEADER = 16 * BLOCK  # of a tar: names and other metadata of a file

# Offset and first bytes of each kind of file; names are not reliable.
SIGNATURES = {"zip": (0, (b"PK",)), "tar": (0, (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")), "plain tar": (257, (b"ustar",))}

# Besides OSError, the standard library's errors on damaged, encrypted and otherwise unreadable archives.
UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


class BadArchive(Exception):
    """The archive is at fault. The message follows its name: "is cut short"."""


class Member(NamedTuple):
    path: str
    size: int  # bytes, unpacked
    kind: str  # file, folder, link or device
    open: Callable[[], IO[bytes]]


class Bounded:
    """A stream that limits the size of a read: tarfile would read a header of any size into memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable
        self._read = stream.read

    def read(self, size: int) -> bytes:
        if size > LARGEST_HEADER:
            raise BadArchive(f"is not safe to unpack: it has a header of {size} bytes")
        return self._read(size)


def tar_members(archive: Path) -> Iterator[Member]:
    with archive.open("rb") as file:
        head = file.read(3)
    open_stream = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7z": lzma.open}.get(head, open)
    with open_stream(archive, "rb") as stream, tarfile.open(fileobj=Bounded(stream), mode="r:") as tar:
        for info in tar:
            link = info.issym() or info.islnk()
            kind = "file" if info.isfile() else "folder" if info.isdir() else "link" if link else "device"
            yield Member(info.name, info.size, kind, lambda info=info: tar.extractfile(info))
        # The checksum is at the end, after the padding.
        for _ in range(MOST_BYTES // BLOCK):
            if not tar.fileobj.read(BLOCK):
                break


def zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            mode = info.external_attr >> 16  # set in zips made on Unix, 0 in others
            special = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
            kind = "folder" if info.is_dir() else "link" if stat.S_ISLNK(mode) else "device" if special else "file"
            yield Member(info.filename, info.file_size, kind, lambda info=info: file.open(info))


def members(archive: Path) -> Iterator[Member]:
    """The members of the archive, in its order.

    Raises:
        BadArchive: it is no archive.
    """
    with archive.open("rb") as file:
        head = file.read(512)
    if not head:
        raise BadArchive("is empty")
    for kind, (start, signatures) in SIGNATURES.items():
        if head[start:].startswith(signatures):
            return zip_members(archive) if kind == "zip" else tar_members(archive)
    raise BadArchive("is neither a tar nor a zip archive")


def check_safe(member: Member) -> None:
    parts = re.split(r"[/\\]", member.path)
    if not parts[0] or ".." in parts or re.match("[A-Za-z]:", member.path):
        raise BadArchive(f"is not safe to unpack: {member.path!r} leads out of its folder")
    if member.kind in ("link", "device"):
        raise BadArchive(f"is not safe to unpack: {member.path!r} is a {member.kind}")


def copy_wanted(archive: Path, folder: Path, wanted: set[str], most_bytes: int) -> Iterator[Path]:
    """Write the wanted files, and yield each before it is written."""
    found, others, total = set(), set(), 0
    for number, member in enumerate(members(archive), start=1):
        total += member.size
        if number > MOST_MEMBERS:
            raise BadArchive(f"has more than {MOST_MEMBERS} files")
        if total > most_bytes:
            raise BadArchive(f"unpacks to more than {most_bytes} bytes")
        check_safe(member)
        name = re.split(r"[/\\]", member.path)[-1]
        if member.kind == "folder":
            continue
        if name not in wanted:
            others.add(name)
            continue
        if name in found:
            raise BadArchive(f"has more than one {name}")
        found.add(name)
        target = folder / name
        yield target
        with member.open() as source, target.open("xb") as file:
            shutil.copyfileobj(source, file, BLOCK)
    if found != wanted:
        raise BadArchive(f"lacks {some(wanted - found)} (it has {some(found | others) or 'no file at all'})")


def some(names: set[str], number: int = 3) -> str:
    """The first names, and the number of others."""
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(sorted(names)[:number]) + more


def unpack(archive: Path, folder: Path, names: Sequence[str], most_bytes: int = MOST_BYTES) -> None:
    """Copy the files called `names` out of `archive` into `folder`: all of them, or none.

    Raises:
        BadArchive: it is no archive, unreadable, unsafe, too large, or lacks a file.
        OSError: it cannot be opened, or `folder` cannot be written.
    """
    written = []
    try:
        for target in copy_wanted(archive, folder, set(names), most_bytes):
            written.append(target)
    except BaseException as error:
        for target in written:
            target.unlink(missing_ok=True)
        # An OSError without a number comes from gzip or bz2: the data are damaged.
        if isinstance(error, UNREADABLE) or isinstance(error, OSError) and error.errno is None:
            raise BadArchive("is corrupt or cut short") from error
        raise


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, metavar="ARCHIVE")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="is there already")
    parser.add_argument("names", nargs="+", metavar="NAME", help="a file's name, without folders")
    parser.add_argument("--most-bytes", type=int, default=MOST_BYTES, metavar="N",
                        help="refuse an archive that unpacks to more (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        unpack(args.archive, args.folder, args.names, args.most_bytes)
    except BadArchive as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"{error.filename or args.folder}: {error.strerror}", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
