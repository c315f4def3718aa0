"""``python -m kvmpass`` from an interpreter that has imported everything before.

In the emulated host an interpreter takes seconds to import what a command needs, and the tests start hundreds. So one
process imports it once, and forks for each command: the command runs as it does from a shell, from its first line to
the interpreter's exit, in a child of the test's own process with the descriptors, environment, directory and limits
that it is given. Whatever else a caller asks of ``subprocess`` starts an interpreter as usual.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "kvmpass"]
_USUAL = {"args", "stdin", "stdout", "stderr", "text", "encoding", "errors", "bufsize", "env", "cwd"}
_INTERPRETER = ("PYTHON", "LC_", "LANG")  # what an interpreter reads when it starts
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_PR_SET_CHILD_SUBREAPER = 36


@contextlib.contextmanager
def commands_start_preloaded() -> Iterator[None]:
    """In this process ``subprocess`` starts ``python -m kvmpass`` by a fork."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    usual = subprocess.Popen
    with here:
        with there:
            server = usual([sys.executable, __file__, str(there.fileno())], pass_fds=(there.fileno(),))
        _Popen.server = here
        subprocess.Popen = _Popen  # type: ignore[misc]
        try:
            yield
        finally:
            subprocess.Popen = usual  # type: ignore[misc]
            server.kill()  # it may still be importing, for seconds
            server.wait()


def _take_orphans(wanted: bool) -> None:
    """Whether orphaned descendants become children of this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


class _Popen(subprocess.Popen[Any]):
    server: socket.socket
    lock = threading.Lock()

    def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
        environment = options.get("env") or os.environ
        self._preloaded = (
            not rest
            and options.keys() <= _USUAL
            and isinstance(args, (list, tuple))
            and [str(word) for word in args[:3]] == COMMAND
            and _of_interpreter(environment) == _of_interpreter(os.environ)
        )
        super().__init__(args, *rest, **options)

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if not self._preloaded:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        (_, _, _, _, cwd, env, _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_) = rest
        streams = [given if given != -1 else number for number, given in enumerate((p2cread, c2pwrite, errwrite))]
        request = {
            "words": [str(word) for word in args[3:]],
            "directory": str(cwd or Path.cwd()),
            "environment": dict(env if env is not None else os.environ),
            "limits": [resource.getrlimit(limit) for limit in _LIMITS],
            "parent": os.getpid(),
        }
        with self.lock:
            _take_orphans(True)
            try:
                socket.send_fds(self.server, [json.dumps(request).encode()], streams)
                self.pid = int(self.server.recv(32))
            finally:
                _take_orphans(False)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def _of_interpreter(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_INTERPRETER)}


# --- the process that has imported everything


def _serve(connection: socket.socket) -> list[str]:
    """Fork for each request. Returns in the child, with the command's words."""
    while True:
        data, streams, _, _ = socket.recv_fds(connection, 1 << 18, 3)
        if not data:
            os._exit(0)
        between = os.fork()
        if between:
            os.waitpid(between, 0)
            for fd in streams:
                os.close(fd)
            continue
        child = os.fork()
        if child:
            os._exit(0)
        request = json.loads(data)
        while os.getppid() != request["parent"]:
            time.sleep(0.001)
        connection.send(str(os.getpid()).encode())
        connection.close()
        _become(request, streams)
        return list(request["words"])


def _become(request: dict[str, Any], streams: list[int]) -> None:
    for limit, values in zip(_LIMITS, request["limits"], strict=True):
        resource.setrlimit(limit, values)
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
    for fd in streams:
        if fd > 2:
            os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = (_text(number) for number in range(3))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])


def _text(number: int) -> io.TextIOWrapper:
    """Standard stream ``number``, as an interpreter opens it."""
    former = (sys.__stdin__, sys.__stdout__, sys.__stderr__)[number]
    stream = open(number, "rb" if number == 0 else "wb", closefd=False)  # noqa: SIM115
    made = io.TextIOWrapper(
        stream,
        encoding=former.encoding,
        errors=former.errors,
        line_buffering=number == 2 or os.isatty(number),
    )
    made.mode = "r" if number == 0 else "w"
    return made


def _main() -> None:
    sys.path.pop(0)  # this file's directory
    from kvmpass.__main__ import main
    from kvmpass.cli.main import COMMANDS

    for module, _ in COMMANDS.values():
        importlib.import_module(module)
    gc.freeze()  # or each child copies what its collector looks at
    words = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = ["kvmpass", *words]
    main()


if __name__ == "__main__":
    _main()
