"""How the tests of prepare_*.sh run the recipes: as a user does, with a server on loopback to download from.

The fixtures `stand_in`, `server` and `downloader`, in conftest.py, belong to it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fork_server
import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
MULTI30K = SCRIPTS / "prepare_multi30k.sh"
TEXT_LM = SCRIPTS / "prepare_text_lm.sh"
IWSLT14 = SCRIPTS / "prepare_iwslt14.sh"
WIKITEXT = SCRIPTS / "prepare_wikitext103.sh"

Prepared = tuple[Path, Path, subprocess.CompletedProcess]  # source, --out, what was printed


# ---------------------------------------------------------------------- running


def environment(**changes: str) -> dict[str, str]:
    """The user's environment, the tests' own Python first on PATH and no settings."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    unset = {"MULTIMAX_DATA", "MULTI30K_URL", "IWSLT14_URL", "WIKITEXT_URL", "PYTHON", "PYTHONUNBUFFERED"}
    base = {name: value for name, value in os.environ.items() if name not in unset}
    return {**base, "PATH": path, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **changes}


def prepare(script: Path, *arguments: object, **changes: str) -> subprocess.CompletedProcess:
    changes.setdefault("PATH", os.pathsep.join([fork_server.path(), environment()["PATH"]]))
    return subprocess.run(
        [str(script), *map(str, arguments)],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(script: Path, *arguments: object, **changes: str) -> subprocess.CompletedProcess:
    result = prepare(script, *arguments, **changes)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def fail(script: Path, *arguments: object, **changes: str) -> str:
    """Run, expect one clear error, and return what was written to stderr."""
    return clear_error(prepare(script, *arguments, **changes))


def clear_error(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.count("ERROR: ") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@contextmanager
def started(script: Path, *arguments: object, **changes: str) -> Iterator[subprocess.Popen]:
    """The recipe while it runs, at the head of its own process group."""
    process = subprocess.Popen(
        [str(script), *map(str, arguments)],
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        # A suite in the background of a shell ignores Ctrl-C, and what it starts could not be interrupted either.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def stop(process: subprocess.Popen, how: str) -> int:
    """Interrupt a recipe and return its exit status."""
    if how == "Ctrl-C":  # the terminal signals the whole foreground group
        os.killpg(process.pid, signal.SIGINT)
    else:  # kill(1) signals the one process
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert "ERROR" not in output
    return process.returncode


def interrupt(tmp_path: Path, changes: dict[str, str], how: str, *arguments: object) -> int:
    """Start a recipe, interrupt it inside fairseq-preprocess, return its exit status."""
    with started(*arguments, STAND_IN_SECONDS="120", **changes) as process:
        wait_for(reached(tmp_path).exists)
        status = stop(process, how)
    worker = int(reached(tmp_path).read_text())
    wait_for(lambda: not running(worker))
    return status


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def running(process_id: int) -> bool:
    """Ended but not yet reaped counts as ended: who reaps an orphan is not our business."""
    if sys.platform == "linux":  # small images lack ps
        stat = Path(f"/proc/{process_id}/stat")
        try:
            return stat.read_text().rpartition(") ")[2][0] not in "ZX"
        except OSError:
            return False
    command = ["ps", "-o", "stat=", "-p", str(process_id)]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() not in ("", "Z")


def reached(tmp_path: Path) -> Path:
    """Holds the id of the process that the stand-in for fairseq-preprocess started."""
    return tmp_path / "stand-in" / "reached"


def path_without(folder: Path, *names: str) -> str:
    """A PATH with links to all but `names`. A linked Python lacks its modules: set PYTHON."""
    folder.mkdir()
    for directory in environment()["PATH"].split(os.pathsep):
        for command in Path(directory).glob("*"):
            link = folder / command.name
            if command.name not in names and not link.is_symlink():
                link.symlink_to(command)
    return str(folder)


def on_small_disk(
    disk: Path, size: str, script: Path, *arguments: object, **changes: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run a recipe where `disk` is a file system of `size`, and return also the paths that it left there.

    The file system is mounted in a name space of its own, which any user may open on most Linux systems.
    """
    disk.mkdir()
    listing = disk.with_suffix(".listing")
    mount = ["unshare", "--user", "--map-root-user", "--mount"]
    work = f'mount -t tmpfs -o size={size} none "$1" && shift && "$@"; s=$?; find {disk} >{listing}; exit $s'
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no name space can be opened here, so no small disk can be mounted")
    result = subprocess.run(
        [*mount, "sh", "-c", work, "sh", str(disk), str(script), *map(str, arguments)],
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )
    left = listing.read_text().splitlines()
    return result, sorted(str(Path(path).relative_to(disk)) for path in left if path != str(disk))


# ---------------------------------------------------------------------- looking at what was made


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below `folder` with its modification time and content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lines_of(path: Path) -> list[str]:
    """Lines end at newline characters only: the text has no-break spaces and the like."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def siblings(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name))


def check_second_run(command: list, options: list, message: str) -> None:
    """A recipe that is run again does nothing, and refuses other settings."""
    out = command[command.index("--out") + 1]
    before = snapshot(out)
    assert "already prepared" in succeed(*command).stdout
    said = fail(*command, *options)
    assert message in said and "--force" in said
    assert snapshot(out) == before


def check_bad_archive(
    script: Path, make: Callable[[Path], object], message: str, archive: Path, stand_in: dict[str, str]
) -> None:
    """A recipe says what is wrong with the archive that `make` makes, leaves it as it is, and makes nothing."""
    make(archive)
    before, folder = archive.read_bytes(), archive.parent
    said = fail(script, "--archive", archive, "--out", folder / "a" / "out", **stand_in)
    assert f"ERROR: {archive} {message}" in said and "Put a good copy in its place" in said
    assert archive.read_bytes() == before
    assert list((folder / "a").iterdir()) == []
    assert not reached(folder).exists()


def fairseq_task(name: str, out: Path, *options: str):
    """The task that `fairseq-train OUT/data-bin --task NAME` sets up (any architecture will do)."""
    fairseq_options = pytest.importorskip("fairseq.options")
    from fairseq import tasks

    parser = fairseq_options.get_training_parser(default_task=name)
    architecture = {"translation": "transformer", "language_modeling": "transformer_lm"}[name]
    arguments = [str(out / "data-bin"), "--task", name, "--arch", architecture, *options]
    return tasks.setup_task(fairseq_options.parse_args_and_arch(parser, arguments))


# ---------------------------------------------------------------------- a server


class Server(ThreadingHTTPServer):
    """Serves `files` on the loopback interface; `troubles` says what goes wrong with which."""

    daemon_threads = True
    files: dict[str, bytes]
    troubles: dict[str, str]
    requests: list[tuple[str, str | None]]  # name, range

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.troubles, self.requests = {}, {}, []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/raw"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        requested = self.headers.get("Range")
        self.server.requests.append((name, requested))
        trouble = self.server.troubles.get(name, "")
        body = self.server.files.get(name, b"")
        if trouble == "404" or not body or not self.path.startswith("/raw/"):
            self.send_error(404)
            return
        if trouble == "web page":
            body = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"
        start = 0
        if requested and trouble != "no ranges":
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if trouble == "slow":
            for position in range(start, len(body), 1000):
                self.wfile.write(body[position : position + 1000])
                self.server.over.wait(0.01)
        else:
            end = {"cut short": 100, "stalled": len(body) // 2}.get(trouble, len(body))
            self.wfile.write(body[start:end])
        if trouble == "stalled":
            self.wfile.flush()
            self.server.over.wait()

    def log_message(self, format, *args):
        pass
