"""fairseq's commands without the four seconds of its imports: forks of one process that has imported it.

Put first in PATH, each of the commands in the folder :func:`path` sends its arguments, folder, environment and open
files to the server, which forks; the fork calls the entry point of the command of this name, or runs what follows
``python``: the code after -c, or a file of ours. Its exit status comes back, and it ends with the
command that asked for it. The server has not imported this package, and has computed nothing: a fork is as far as a
new process is once it has imported fairseq. The real command runs where that is not enough: with settings that Python
or OpenMP read when they start, and on systems other than Linux.
"""

import atexit
import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

COMMANDS = ("preprocess", "train", "generate", "interactive", "validate", "eval-lm", "hydra-train")
COMMANDS = ("python", "multimax-analyze", *(f"fairseq-{name}" for name in COMMANDS))
CLIENT = """#!{python} -IS
import json, os, socket, sys
name = os.path.basename(sys.argv[0])
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
socket.send_fds(server, [json.dumps([name, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
status = server.recv(16).decode()
if status == "real":
    os.execv(os.path.join({folder!r}, name), [name, *sys.argv[1:]])
sys.exit(int(status or 1))
"""


@functools.lru_cache(maxsize=None)
def path():
    """The folder of commands, whose server this starts; the end of this process stops it."""
    if sys.platform != "linux":
        return ""
    folder = Path(tempfile.mkdtemp(prefix="fairseq-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = folder / "socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # messages come whole
    listener.bind(str(address))
    listener.listen()
    process = subprocess.Popen(
        [sys.executable, __file__, str(listener.fileno())], pass_fds=[listener.fileno()], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    listener.close()
    atexit.register(process.communicate)  # which ends what it reads
    for name in COMMANDS:
        real = str(Path(sys.executable).parent)
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=str(address), folder=real))
        (folder / name).chmod(0o755)
    return str(folder)


def settings(environment):
    ours = ("PYTHON",)  # the interpreter of scripts/prepare.py
    starts = ("PYTHON", "OMP_", "MKL_")
    return {name: value for name, value in environment.items() if name.startswith(starts) and name not in ours}


def serve(listener):
    """Fork for each client until standard input ends, as it does with the process that has started this one."""
    import fairseq.checkpoint_utils
    import fairseq.sequence_generator
    import fairseq.trainer  # noqa: F401
    import sacrebleu  # noqa: F401
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    parser = options.get_training_parser()  # the first time that one parses takes a second
    convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, ["data", "--arch", "transformer"]))
    gc.freeze()
    at_start = settings(os.environ)
    mains = {entry.name: entry for entry in importlib.metadata.entry_points(group="console_scripts")}
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        client, _ = listener.accept()
        request, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
        name, arguments, folder, environment = json.loads(request)
        is_known = name in mains or re.match("-c$|.*/(scripts|examples|benchmarks)/", "".join(arguments[:1]))
        if not is_known or settings(environment) != at_start:
            client.sendall(b"real")
        elif not os.fork():
            listener.close()
            os.setsid()
            threading.Thread(target=end_with, args=[client], daemon=True).start()
            for number, file in enumerate(files):
                os.dup2(file, number)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = arguments if name == "python" else [name, *arguments]
            client.sendall(str(status_of(mains.get(name))).encode())
            os._exit(0)
        client.close()
        for file in files:
            os.close(file)


def end_with(client):
    """Kill this process, and what it has started, when its command is killed."""
    client.recv(1)
    os.killpg(0, signal.SIGKILL)


def status_of(entry):
    """The exit status that Python would give: of an entry point, or of what sys.argv names."""
    text = Path(importlib.util.find_spec(entry.module).origin).read_text() if entry else ""
    configures, imports = (re.search(line, text, re.M) for line in ("^logging.basicConfig", "^(from|import) fairseq"))
    # what importing fairseq did to logging would come later, or be undone
    if not entry or configures and configures.start() < imports.start():
        logging.root.handlers.clear()
        logging.root.setLevel(logging.WARNING)
    status = None
    try:
        if entry:
            status = entry.load()()
        elif sys.argv[0] == "-c":
            exec(sys.argv[1], {"__name__": "__main__"})
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else 0 if status is None else 1


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
