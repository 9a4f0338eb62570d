"""How the C++ is compiled and kept."""

import hashlib
import logging
import os
import sys
import threading

import pytest
import torch
from conftest import get_cxx_compiler, needs_compiler

from multimax_fairseq.kernels import backend, cpp
from multimax_fairseq.kernels.rows import Rows, cpu
from multimax_fairseq.mappings import sparsemax
from multimax_fairseq.mappings.sparse import sparsemax_formula

pytestmark = needs_compiler
QUICK = [*cpp.FLAGS, "-O0"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "auto")
    monkeypatch.setattr(backend, "failures", [])
    monkeypatch.setattr(cpp, "FLAGS", QUICK)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "multimax_fairseq"


def new_library():
    return cpp.Library(cpu.LIBRARY.source, cpu.LIBRARY.signatures)


def test_it_is_compiled_once_and_kept(folder, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        assert new_library().functions is not None
    assert f"compiling rows.cpp; it is kept in {folder}" in caplog.text
    (kept,) = folder.iterdir()
    monkeypatch.setattr(cpp, "_run", None)  # cannot be called
    assert new_library().functions is not None
    assert [kept] == list(folder.iterdir()) and caplog.text.count("compiled rows.cpp in") == 1


def test_another_source_or_compiler_is_another_file(folder, tmp_path, monkeypatch):
    assert new_library().functions is not None
    monkeypatch.setenv("CXX", "g++ -DANOTHER")
    assert new_library().functions is not None
    header = tmp_path / "vectors.hpp"
    header.write_text("// changed\n")
    monkeypatch.setattr(cpp, "HEADERS", [*cpp.HEADERS[:-1], header])
    assert new_library().functions is not None
    assert len(list(folder.iterdir())) == 3


def test_several_that_compile_at_once(folder):
    libraries = [new_library() for _ in range(3)]
    threads = [threading.Thread(target=lambda library=library: library.functions) for library in libraries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(library.functions is not None for library in libraries)
    assert [path.suffix for path in folder.iterdir()] == [".so"]


def no_setuptools(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    monkeypatch.delattr(torch.utils, "cpp_extension")


def no_folder(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))


def compiler(command):
    return lambda monkeypatch, tmp_path: monkeypatch.setenv("CXX", command)


COMPILERS = "/no/such/compiler", "false", "c++ --no-such-option", "c++ 'unfinished"


@pytest.mark.parametrize("breaks", [no_setuptools, no_folder, *map(compiler, COMPILERS)])
def test_where_it_cannot_be_compiled_the_formula_serves_after_one_warning(
    breaks, folder, monkeypatch, tmp_path, caplog
):
    library = new_library()
    with caplog.at_level(logging.WARNING):
        breaks(monkeypatch, tmp_path)
        assert not library.serves(torch.zeros(2, 3)) and new_library().functions is None
    (record,) = caplog.records
    assert "plain PyTorch, which is slower, as compiling failed: rows.cpp: " in record.message
    assert not folder.exists() or not any(folder.iterdir())
    monkeypatch.setattr(cpu, "LIBRARY", library)
    scores = torch.randn(5, 7)
    torch.testing.assert_close(sparsemax(scores), sparsemax_formula(scores))
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")
    with pytest.raises(RuntimeError, match="MULTIMAX_BACKEND=compiled, and compiling failed: rows.cpp: "):
        sparsemax(scores)


def test_the_reason_is_the_compilers_error(folder, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "c++ -nostdinc -nostdinc++")
    with caplog.at_level(logging.INFO):
        assert new_library().functions is None
    assert "error: " in caplog.text and "In file included" not in caplog.text


@pytest.fixture(scope="module")
def compiled_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setattr(cpp, "FLAGS", QUICK)
        assert new_library().functions is not None
    return next(folder.glob("*/*.so"))


@pytest.fixture
def kept(folder, compiled_file):
    """A compiled library, as of an earlier run: nothing was loaded from here, so that it is not known by its name."""
    folder.mkdir()
    kept = folder / compiled_file.name
    kept.write_bytes(compiled_file.read_bytes())
    kept.chmod(0o700)
    return kept


def sealed(contents):
    return contents + hashlib.sha256(contents).digest()


def use(library):
    """Of a file that was cut short the system ends the process with SIGBUS, where it is read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "LIBRARY", library)
        scores = torch.zeros(1, 4)
        assert cpu.forward(cpu.Numbers(Rows("softmax"), scores.shape), scores).tolist() == [[0.25] * 4]


@pytest.mark.parametrize("contents", [
    *(lambda whole, size=size: whole[:size] for size in (0, 3_000, 12_000, 20_000, -1)),
    lambda whole: b"of another system",
    lambda whole: bytes(100),
    lambda whole: whole[:9_000] + bytes([whole[9_000] ^ 1]) + whole[9_001:],
])  # fmt: skip
def test_a_library_that_was_cut_short_or_changed_is_made_anew(contents, kept):
    whole = kept.read_bytes()
    kept.write_bytes(contents(whole))
    use(new_library())
    assert [kept] == list(kept.parent.iterdir()) and len(kept.read_bytes()) == len(whole)


@pytest.fixture
def foreign(tmp_path):
    """The bytes of a library without our functions."""
    source, library = tmp_path / "foreign.cpp", tmp_path / "foreign.so"
    source.write_text("int foreign() { return 1; }")
    cpp._run(*get_cxx_compiler().split(), "-shared", "-fPIC", str(source), "-o", str(library))
    return library.read_bytes()


@pytest.mark.parametrize("is_library", [False, True])
def test_what_cannot_be_loaded_is_not_compiled_at_every_start(is_library, foreign, kept, monkeypatch, caplog):
    kept.write_bytes(sealed(foreign if is_library else b"for an OpenMP that is not here"))
    monkeypatch.setattr(cpp, "_run", None)  # cannot be called
    with caplog.at_level(logging.INFO):
        assert new_library().functions is None
    assert "compiling failed: rows.cpp: " in caplog.text
    assert ("undefined symbol: map_rows" if is_library else f"remove {kept} to have it compiled") in caplog.text


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_folder_and_library_are_private_whatever_the_umask(umask, folder):
    before = os.umask(umask)
    try:
        assert new_library().functions is not None
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())] == [0o700, 0o700]


def test_a_library_that_others_may_write_is_made_anew(foreign, kept):
    kept.write_bytes(sealed(foreign))
    kept.chmod(0o770)
    kept.parent.chmod(0o777)
    use(new_library())
    assert [path.stat().st_mode & 0o777 for path in (kept.parent, kept)] == [0o700, 0o700]


@pytest.mark.parametrize("whose", ["another user's", "of no modes"])
def test_nothing_is_loaded_from_a_folder_of_others(whose, kept, monkeypatch, caplog):
    folder, user = kept.parent, os.geteuid()
    if whose == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    else:  # as on file systems that ignore them
        folder.chmod(0o777)
        monkeypatch.setattr(cpp.Path, "chmod", lambda path, mode: None)
    monkeypatch.setattr(cpp.ctypes, "CDLL", None)  # cannot be called
    with caplog.at_level(logging.INFO):
        assert new_library().functions is None
    assert f"can write into {folder}: set TORCH_EXTENSIONS_DIR to a folder of your own" in caplog.text


def test_what_is_written_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=function: (events.append(n), f(*args))[1])
    assert new_library().functions is not None
    assert events[-2:] == ["fsync", "replace"]


def test_interrupted_while_compiling_it_leaves_nothing(folder, monkeypatch):
    def interrupt(*command):
        raise KeyboardInterrupt

    monkeypatch.setattr(cpp, "_run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        new_library().functions  # noqa: B018
    assert not any(folder.iterdir())
