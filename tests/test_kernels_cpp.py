"""The C++ kernels against those of plain torch in float64, and how they are compiled and kept."""

import hashlib
import logging
import math
import os
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from conftest import get_cxx_compiler, needs_compiler

from multimax_fairseq.kernels import backend, cpp
from multimax_fairseq.kernels.rows.compiled import multimax_rows as reference_rows
from multimax_fairseq.mappings import multimax

INF = float("inf")
pytestmark = needs_compiler
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]  # each includes those before it


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "multimax_fairseq"


@contextmanager
def compiled_for(capability, module, name, folder):
    """A module's library as compiled for processors with vectors of this length, if this one has them."""
    best = torch.backends.cpu.get_cpu_capability()
    if best not in CAPABILITIES or CAPABILITIES.index(best) < CAPABILITIES.index(capability):
        pytest.skip(f"this processor has {best}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MULTIMAX_BACKEND", "compiled")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        library = getattr(module, name)
        library = cpp.Library(library.source, library.signatures)
        assert library.functions is not None
        patch.setattr(module, name, library)
        yield


@pytest.fixture(scope="module", params=CAPABILITIES)
def rows(request, tmp_path_factory):
    """The kernels as compiled for this processor and for lesser ones, whose vectors are shorter."""
    with compiled_for(request.param, cpp, "ROWS", tmp_path_factory.mktemp("extensions")):
        yield


def new_library():
    return cpp.Library(cpp.ROWS.source, cpp.ROWS.signatures)


def case(shape, order=2):
    """Scores with a fifth of them absent and one empty row, thresholds and gains."""
    scores = (2 * torch.randn(shape)).masked_fill(torch.rand(shape) < 0.2, -INF)
    scores.view(-1, shape[-1])[0] = -INF
    return [tensor.requires_grad_() for tensor in (scores, 0.5 * torch.randn(order, 2), 0.1 * torch.randn(order, 2))]


def gradients(inputs, upstream):
    probabilities = multimax(*inputs)
    return [probabilities, *torch.autograd.grad((probabilities * upstream).sum(), inputs)]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 2), (1, 40), (5, 15), (5, 16), (5, 17), (2, 3, 33), (300, 160), (2, 40_000)]
)
def test_probabilities_and_gradients_are_those_of_double_precision(shape, order, rows):
    inputs = case(shape, order)
    upstream = torch.randn(shape)
    assert cpp.ROWS.serves(inputs[0])
    expected = gradients([tensor.detach().double().requires_grad_() for tensor in inputs], upstream.double())
    probabilities, *grads = gradients(inputs, upstream)
    torch.testing.assert_close(probabilities.double(), expected[0], atol=0, rtol=1e-5)
    # the gradients of parameters are sums in which large terms of both signs cancel
    upstream_size = (expected[0].detach() * upstream).abs().sum()
    for grad, expected_grad in zip(grads, expected[1:]):
        torch.testing.assert_close(grad.double(), expected_grad, atol=2e-6 * upstream_size.item(), rtol=1e-5)


def test_the_exponential_to_two_units_in_the_last_place(rows):
    """Of two scores without modulation, 0 and −x, the second has exp(−x) times the probability of the first."""
    x = torch.cat([torch.linspace(0, 87, 100_001), torch.tensor([1e-7, 0.34657, 0.34658])])
    zeros = torch.zeros(1, 2)
    first, second = cpp.multimax_rows(torch.stack([torch.zeros_like(x), -x], -1), zeros, zeros).double().unbind(-1)
    torch.testing.assert_close(second / first, x.double().neg().exp(), atol=0, rtol=4 * 2**-24)


def test_a_score_far_below_counts_for_nothing(rows):
    zeros = torch.zeros(1, 2)
    scores = torch.tensor([[0.0, -89.0, -1e4, torch.finfo(torch.float32).min, -INF]])
    assert cpp.multimax_rows(scores, zeros, zeros).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("others", [[], [math.nan] * 40, [-INF] * 40, [1.0] * 40])
def test_what_is_not_a_number_stays_so(others, rows):
    """A training that has diverged is to say so, not to go on with zeros."""
    scores, (_, thresholds, gains) = torch.tensor([[math.nan, *others], [*others, math.nan]]), case((2, 2))
    assert cpp.multimax_rows(scores, thresholds, gains)[scores.isnan()].isnan().all()


def test_any_number_of_threads_gives_the_same(rows):
    results, before = [], torch.get_num_threads()
    inputs, upstream = case((1_700, 100)), torch.randn(1_700, 100)
    try:
        for threads in (1, 2, 5):  # for 32,768 scores each
            torch.set_num_threads(threads)
            results.append(gradients(inputs, upstream))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result[:2], results[0][:2], atol=0, rtol=0)  # row by row
        torch.testing.assert_close(result[2:], results[0][2:], atol=1e-4, rtol=1e-5)  # added up in another order


def test_rows_that_are_not_contiguous(rows):
    scores, thresholds, gains = case((12, 7))
    transposed = scores.detach().T
    expected = reference_rows.eager(transposed, thresholds.detach(), gains.detach())
    torch.testing.assert_close(cpp.multimax_rows(transposed, thresholds, gains), expected)


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}])
def test_it_serves_fp32_on_a_cpu(other):
    assert cpp.ROWS.serves(torch.zeros(2, 3)) and not cpp.ROWS.serves(torch.zeros(2, 3, **other))


def test_it_does_not_serve_where_plain_pytorch_is_asked_for(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "eager")
    assert not cpp.ROWS.serves(torch.zeros(2, 3))


# ---------------------------------------------------------------- compiling


def test_it_is_compiled_once_and_kept(folder, caplog, monkeypatch):
    monkeypatch.setattr(backend, "compiled_graphs", [])
    with caplog.at_level(logging.INFO):
        assert new_library().functions is not None
    assert f"compiling multimax.cpp; it is kept in {folder}" in caplog.text
    assert "compiled multimax.cpp in" in caplog.text
    (kept,) = folder.iterdir()
    monkeypatch.setattr(cpp, "_run", None)  # cannot be called
    assert new_library().functions is not None
    assert [kept] == list(folder.iterdir()) and len(backend.compiled_graphs) == 1


def test_another_source_or_compiler_is_another_file(folder, tmp_path, monkeypatch):
    assert new_library().functions is not None
    monkeypatch.setenv("CXX", "g++ -DANOTHER")
    assert new_library().functions is not None
    header = tmp_path / "multimax.hpp"
    header.write_text(cpp.HEADER.read_text() + "// changed\n")
    monkeypatch.setattr(cpp, "HEADER", header)
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


def test_parameters_of_any_layout(rows):
    scores, thresholds, gains = (tensor.detach() for tensor in case((12, 7)))
    expected = cpp.multimax_rows(scores, thresholds, gains)
    wide = torch.stack([thresholds, gains], dim=-1).double()
    torch.testing.assert_close(cpp.multimax_rows(scores, wide[..., 0], wide[..., 1]), expected)


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false", "c++ --no-such-option", "c++ 'unfinished"])
def test_without_a_compiler_that_can_the_other_kernels_serve(compiler, folder, monkeypatch, caplog):
    library = new_library()
    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", compiler)  # and not later, when Inductor may look at it
        assert not library.serves(torch.zeros(2, 3)) and not library.serves(torch.zeros(2, 3))
    assert caplog.text.count("multimax.cpp: not compiled, so others take the place of its kernels: ") == 1
    assert not folder.exists() or not any(folder.iterdir())
    monkeypatch.setattr(cpp, "ROWS", library)
    inputs = case((5, 7))
    torch.testing.assert_close(multimax(*inputs), reference_rows.eager(*inputs))


def test_the_reason_is_the_compilers_error(folder, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "c++ -nostdinc -nostdinc++")
    with caplog.at_level(logging.INFO):
        assert new_library().functions is None
    assert "error: " in caplog.text and "In file included" not in caplog.text


def test_without_setuptools(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    monkeypatch.delattr(torch.utils, "cpp_extension")
    assert new_library().functions is None


@pytest.fixture(scope="module")
def compiled_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
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
    scores, probabilities, zeros = torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 2)
    pointers = [tensor.data_ptr() for tensor in (scores, probabilities, zeros, zeros)]
    library.functions.multimax_rows(1, 4, 1, 1, *pointers)
    assert probabilities.tolist() == [[0.25] * 4]


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
    assert "not compiled, so others take" in caplog.text
    assert ("undefined symbol: multimax_rows" if is_library else f"remove {kept} to have it compiled") in caplog.text


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


def test_where_nothing_can_be_kept(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        assert new_library().functions is None
    assert "not compiled" in caplog.text
