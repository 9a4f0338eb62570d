"""scripts/unpack.py: what it copies out of an archive, and what it refuses."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from conftest import load_script

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "unpack.py"
TEXTS = {"one.txt": b"first\n" * 5000, "two.txt": "zweite Straße\n".encode()}
WANTED = list(TEXTS)


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return load_script("unpack")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where to unpack, beside nothing else."""
    folder = tmp_path / "jail" / "into"
    folder.mkdir(parents=True)
    return folder


def tar_bytes(*extra: tarfile.TarInfo, texts: dict[str, bytes] = TEXTS, prefix: str = "data/") -> bytes:
    """A tar of `texts` in the folder `prefix`, after the members `extra`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size) if info.isreg() else None)
        for name, text in texts.items():
            info = tarfile.TarInfo(f"{prefix}{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def zip_bytes(*extra: tuple[str, int], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of TEXTS in a folder, after empty members with a name and a Unix mode."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("data/", b"")
        for name, mode in extra:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"/etc/passwd")
        for name, text in TEXTS.items():
            archive.writestr(f"data/{name}", text)
    return stream.getvalue()


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


GOOD = {
    "tar": tar_bytes(),
    "tar.gz": gzip.compress(tar_bytes()),
    "tar.bz2": bz2.compress(tar_bytes()),
    "tar.xz": lzma.compress(tar_bytes()),
    "zip": zip_bytes(),
    "zip, stored": zip_bytes(compression=zipfile.ZIP_STORED),
    "without a folder": tar_bytes(prefix=""),
    "deeper": tar_bytes(prefix="./a/b/c/"),
    "with others": tar_bytes(member("data/README"), member("data", tarfile.DIRTYPE)),
}


@pytest.mark.parametrize("kind", GOOD)
def test_copies_the_files_and_nothing_else(module, tmp_path, folder, kind):
    archive = tmp_path / "archive"
    archive.write_bytes(GOOD[kind])
    module.unpack(archive, folder, WANTED)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == TEXTS
    assert [path.name for path in folder.parent.iterdir()] == ["into"]


TAR_GZ = gzip.compress(tar_bytes(), mtime=0)
BAD = {
    "empty": (b"", "is empty"),
    "text": (b"Not an archive.\n" * 100, "is neither a tar nor a zip archive"),
    "gzip of text": (gzip.compress(b"Not an archive.\n" * 100), "is corrupt or cut short"),
    "tar.gz cut short": (TAR_GZ[: len(TAR_GZ) // 2], "is corrupt or cut short"),
    "tar.gz without its last byte": (TAR_GZ[:-1], "is corrupt or cut short"),
    "tar.gz with another checksum": (flip(TAR_GZ, -6), "is corrupt or cut short"),
    "tar cut short": (tar_bytes()[:20000], "is corrupt or cut short"),
    "bz2 cut short": (bz2.compress(tar_bytes())[:-20], "is corrupt or cut short"),
    "bz2 damaged": (flip(bz2.compress(tar_bytes()), 60), "is corrupt or cut short"),
    "xz cut short": (lzma.compress(tar_bytes())[:-20], "is corrupt or cut short"),
    "zip cut short": (zip_bytes()[:-30], "is corrupt or cut short"),
    "zip damaged": (flip(zip_bytes(compression=zipfile.ZIP_STORED), 500), "is corrupt or cut short"),
    "another one": (tar_bytes(texts={"a.txt": b"a", "b.txt": b"b"}), "lacks one.txt, two.txt (it has a.txt, b.txt)"),
    "quite another one": (
        tar_bytes(texts={f"{number}.txt": b"" for number in range(5)}),
        "lacks one.txt, two.txt (it has 0.txt, 1.txt, 2.txt and 2 more)",
    ),
    "one file less": (tar_bytes(texts={"one.txt": b"a"}), "lacks two.txt (it has one.txt)"),
    "no file": (tar_bytes(member("data", tarfile.DIRTYPE), texts={}), "(it has no file at all)"),
    "twice": (tar_bytes(member("other/one.txt")), "has more than one one.txt"),
    "parent": (tar_bytes(member("data/../../one.txt")), "'data/../../one.txt' leads out of its folder"),
    "absolute": (tar_bytes(member("/tmp/one.txt")), "'/tmp/one.txt' leads out of its folder"),
    "backslashes": (tar_bytes(member("..\\one.txt")), "leads out of its folder"),
    "drive": (tar_bytes(member("C:one.txt")), "leads out of its folder"),
    "symbolic link": (tar_bytes(member("data/one.txt", tarfile.SYMTYPE, "/etc/passwd")), "'data/one.txt' is a link"),
    "hard link": (tar_bytes(member("x", tarfile.LNKTYPE, "../../one.txt")), "'x' is a link"),
    "device": (tar_bytes(member("data/null", tarfile.CHRTYPE)), "'data/null' is a device"),
    "pipe": (tar_bytes(member("data/pipe", tarfile.FIFOTYPE)), "'data/pipe' is a device"),
    "zip, parent": (zip_bytes(("data/../../one.txt", 0)), "leads out of its folder"),
    "zip, absolute": (zip_bytes(("/etc/one.txt", 0)), "leads out of its folder"),
    "zip, link": (zip_bytes(("data/link", stat.S_IFLNK | 0o777)), "is a link"),
    "zip, device": (zip_bytes(("data/null", stat.S_IFCHR | 0o666)), "is a device"),
}


@pytest.mark.parametrize("kind", BAD)
def test_refuses(module, tmp_path, folder, kind):
    content, message = BAD[kind]
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    with pytest.raises(module.BadArchive) as error:
        module.unpack(archive, folder, WANTED)
    assert message in str(error.value)
    assert list(folder.iterdir()) == []
    assert [path.name for path in folder.parent.iterdir()] == ["into"]


def test_refuses_what_is_too_large(module, tmp_path, folder, monkeypatch):
    """By what the headers announce, before anything is written."""
    archive = tmp_path / "archive"
    archive.write_bytes(TAR_GZ)
    total = sum(map(len, TEXTS.values()))
    with pytest.raises(module.BadArchive, match=f"unpacks to more than {total - 1} bytes"):
        module.unpack(archive, folder, WANTED, most_bytes=total - 1)
    assert list(folder.iterdir()) == []
    module.unpack(archive, folder, WANTED, most_bytes=total)

    header = tarfile.TarInfo("data/one.txt")
    header.size = 10**12
    archive.write_bytes(header.tobuf())
    with pytest.raises(module.BadArchive, match="unpacks to more than 4294967296 bytes"):
        module.unpack(archive, folder, WANTED)

    monkeypatch.setattr(module, "MOST_MEMBERS", 2)
    archive.write_bytes(tar_bytes(member("data/README")))
    with pytest.raises(module.BadArchive, match="has more than 2 files"):
        module.unpack(archive, folder, ["README"])


def test_a_giant_header_is_refused_before_it_is_read(module, tmp_path, folder):
    """A kilobyte of bzip2 that says: here follow 3 GiB of what is to be known about a file."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 3 * 2**30
    (tmp_path / "archive").write_bytes(bz2.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(2**20)))
    with pytest.raises(module.BadArchive, match="has a header of 3221225472 bytes"):
        module.unpack(tmp_path / "archive", folder, ["a"])


def test_other_errors_are_not_blamed_on_the_archive(module, tmp_path, folder):
    archive = tmp_path / "archive"
    archive.write_bytes(TAR_GZ)
    with pytest.raises(FileNotFoundError):
        module.unpack(archive, tmp_path / "nowhere", WANTED)
    with pytest.raises(FileNotFoundError):
        module.unpack(tmp_path / "nothing", folder, WANTED)


def test_exit_status_and_message(tmp_path, folder):
    def run(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, str(SCRIPT), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        return result.returncode, result.stderr

    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(TAR_GZ)
    bad.write_bytes(TAR_GZ[:-1])
    assert run(bad, folder, *WANTED) == (1, "is corrupt or cut short\n")
    assert run(good, tmp_path / "nowhere", *WANTED) == (3, f"{tmp_path}/nowhere/one.txt: No such file or directory\n")
    assert run(good, folder)[0] == 2
    assert run(good, folder, *WANTED) == (0, "")
