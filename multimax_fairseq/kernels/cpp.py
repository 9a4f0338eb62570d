"""C++ for fp32 on a CPU: compiles and loads ``rows/rows.cpp`` and ``attention/attention.cpp``.

A source file is compiled when one of its functions is first called, in some seconds, by PyTorch's compiler for
extensions (``CXX``, else ``c++``). PyTorch's folder of extensions (``TORCH_EXTENSIONS_DIR``, else
``~/.cache/torch_extensions``) keeps the result for the next run. The source includes nothing of PyTorch: it is given
addresses. It uses the OpenMP that PyTorch has loaded (GNU's on Linux), since a second one would start threads of its
own. If the compiler is for another OpenMP, the file does not load, and plain PyTorch serves, in the next run too.

``torch.utils.cpp_extension.load`` needs ninja, and waits forever on the lock of a run that was interrupted while
compiling. Here, runs that compile at once do not wait: each moves a whole file into place. Its last bytes are a
digest of the others, as a truncated file would crash the process. The folder is this user's alone; nothing is loaded
from one that others can write to.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Dict, Optional, Sequence

import torch
from torch import Tensor

from . import backend

logger = logging.getLogger(__name__)

HEADERS = sorted(Path(__file__).parent.rglob("*.hpp"))

FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fopenmp", "-fPIC"]
FLAGS_BY_CAPABILITY = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}

INTEGER, ADDRESS = ctypes.c_int64, ctypes.c_void_p


class Library:
    """The functions of the C++ file ``source``; ``signatures``: name → types of the arguments, for those called."""

    def __init__(self, source: Path, signatures: Dict[str, Sequence]):
        self.source = source
        self.signatures = signatures
        self.failure = ""  # why it cannot be compiled or loaded

    def serves(self, tensor: Tensor) -> bool:
        """Whether its functions take a plain tensor: fp32, on a CPU, where there is a compiler.

        Raises:
            RuntimeError: there is none, and ``MULTIMAX_BACKEND=compiled`` asks for one.
        """
        if tensor.dtype != torch.float32 or not tensor.is_cpu:
            return False
        if self.functions is None and backend.backend() == "compiled":
            raise RuntimeError(f"{backend.ENVIRONMENT_VARIABLE}=compiled, and compiling failed: {self.failure}")
        return self.functions is not None

    @functools.cached_property
    def functions(self) -> Optional[ctypes.CDLL]:
        """The compiled file; None if it cannot be compiled or loaded."""
        try:
            functions = self._load()
            for name, types in self.signatures.items():
                function = getattr(functions, name)
                function.argtypes, function.restype = types, None
        except (AttributeError, ImportError, OSError, ValueError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "error" in line), lines[0])
            self.failure = f"{self.source.name}: {reason}"
            backend.note_failure(self.failure)
            return None
        return functions

    def _load(self) -> ctypes.CDLL:
        from torch.utils import cpp_extension  # here: it imports setuptools

        compiler = shlex.split(cpp_extension.get_cxx_compiler())
        flags = FLAGS + FLAGS_BY_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), [])
        contents = [path.read_text() for path in (self.source, *HEADERS)]
        system = [platform.machine(), *platform.libc_ver(), torch.__version__]
        key = hashlib.sha256("\0".join([*system, *compiler, *flags, *contents]).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
        folder /= "multimax_fairseq"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.geteuid():
            folder.chmod(0o700)  # it may be older than this rule
        if not _is_private(folder):
            raise PermissionError(
                f"others than this user can write into {folder}: set TORCH_EXTENSIONS_DIR to a folder of your own"
            )
        library = folder / f"{self.source.stem}-{key}.so"
        if not (library.exists() and _is_private(library) and _is_whole(library)):
            self._compile(compiler, flags, library)
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:  # compiled again, it would not load either
            raise OSError(f"{error} (remove {library} to have it compiled again)") from error

    def _compile(self, compiler: Sequence[str], flags: Sequence[str], library: Path) -> None:
        logger.info("compiling %s; it is kept in %s for the next run", self.source.name, library.parent)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=library.parent) as unfinished:
            objects, linked = (os.path.join(unfinished, name) for name in ("kernels.o", "kernels.so"))
            _run(*compiler, *flags, "-c", str(self.source), "-o", objects)
            # linked without OpenMP: PyTorch's has the symbols
            _run(*compiler, "-shared", objects, "-o", linked)
            with open(linked, "r+b") as file:
                file.write(hashlib.sha256(file.read()).digest())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(linked, 0o700)
            os.replace(linked, library)
        logger.info("compiled %s in %.1f s", self.source.name, time.perf_counter() - start)


def _is_private(path: Path) -> bool:
    """Whether this user owns a file or folder, and the link to it if any, and nobody else may write to it."""
    owners = {path.lstat().st_uid, path.stat().st_uid}
    return owners == {os.geteuid()} and not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_whole(library: Path) -> bool:
    contents = library.read_bytes()
    return hashlib.sha256(contents[:-32]).digest() == contents[-32:]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
