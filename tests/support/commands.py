"""Python programs in processes of their own, as `python -m MODULE ...` and `python -c CODE ...` start them, but without
the seconds of imports: they are children of a process that has imported everything (`fork_server`).

What is read from the environment at an import needs a true start: `sys.executable` by `subprocess`.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from clt_plugins.testing.processes.ports import free_port
from tests.support.fork_server import LENGTH

PR_SET_CHILD_SUBREAPER = 36
OPTIONS = {"stdin", "stdout", "stderr", "text", "cwd", "env"}


@cache
def server() -> socket.socket:
    """The connection to the fork server of this process."""
    # Orphaned children of the server become children of this process then, so that it can wait for them.
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())],
        # A pool of OpenMP and the allocator of pyarrow would have threads of their own.
        env={**os.environ, "OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


class Python(subprocess.Popen):
    """`subprocess.Popen` of a Python program.

    Args:
        arguments: those after the interpreter: `-m`, a module, and its arguments, or `-c` and code.
        limits: resource limits by name, as `FSIZE`.
        ignored: signals that the program ignores.
    """

    def __init__(
        self, *arguments: object, limits: Mapping[str, int] | None = None, ignored: Sequence[int] = (), **options: Any
    ):
        assert options.keys() <= OPTIONS, f"not served: {options.keys() - OPTIONS}"
        self._more = {"limits": dict(limits or {}), "ignored": list(ignored)}
        super().__init__(list(map(str, arguments)), **options)

    def _execute_child(self, *arguments: Any) -> None:
        """In place of fork and exec: ask the server."""
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments).arguments
        standard = (given["p2cread"], given["c2pwrite"], given["errwrite"])
        descriptors = [usual if number == -1 else number for usual, number in enumerate(standard)]
        request = {
            "arguments": given["args"],
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "cwd": str(Path(given["cwd"] or ".").absolute()),
            **self._more,
        }
        body = json.dumps(request).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        server().sendmsg([LENGTH.pack(len(body))], rights)
        server().sendall(body)
        (self.pid,) = LENGTH.unpack(server().recv(LENGTH.size, socket.MSG_WAITALL))
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))


def start(*arguments: object, **options: Any) -> Python:
    """Start a program, with nothing on stdin; what it prints is captured."""
    standard = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return Python(*arguments, **standard | options)


def finish(process: subprocess.Popen[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Wait for a program; it is killed if it takes longer."""
    with process:
        try:
            printed = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, *printed)


def python(*arguments: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return finish(start(*arguments, **options), timeout)


def on_ranks(world: int, *arguments: object, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a program in several processes that find each other as those of `torchrun` do; how each ended.

    Unlike `torchrun`, it leaves a rank alone when another died.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    shared |= {"OMP_NUM_THREADS": "1", **environment}
    ranks = [
        start(*arguments, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    # All are read at a time: a rank that another waits for would stop where nobody empties its pipe.
    with ThreadPoolExecutor(world) as readers:
        return list(readers.map(finish, ranks))
