"""A process that has imported everything and forks a child for each command: hundreds of commands a minute.

Started by `forking.Zygote`, as `python -m tests.faults.zygote`, with the library of `inject.py` preloaded. It reads a
request per line from stdin and writes an answer per line to stdout. It runs nothing itself, so that it has a single
thread. A child runs `clt_plugins.__main__.main`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import random
import resource
import runpy
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

POLL_S = 0.02
STACKS, STACKS_S = signal.SIGUSR2, 0.5
"""A command that hangs prints where each thread stands, and has this long for it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _begin(request: dict[str, Any]) -> None:
    """Become the command: in the child, before anything of the program runs.

    Options: `fault` (for `inject.arm`) and `record`; `limits`, by resource (`AS` counts from what the process has
    already); `environment`; `modules`, a file for the names of what was imported; `module`, to run in place of
    `clt_plugins`; `delay`, in seconds; `thorough`, to end as an interpreter does and not in the shorter way of `_end`.
    """
    os.setpgid(0, 0)
    os.chdir(request["folder"])
    said = request["said"]
    for path, number in ((os.devnull, 0), (Path(said).with_suffix(".out"), 1), (said, 2)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        handle = os.open(path, flags, 0o644)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False, buffering=buffering, errors=errors)  # noqa: SIM115 - for the process
        for number, mode, buffering, errors in (
            (0, "r", -1, "strict"),
            (1, "w", -1, "strict"),
            (2, "w", 1, "backslashreplace"),
        )
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    faulthandler.register(STACKS, file=sys.stderr, all_threads=True)
    os.environ.update(request.get("environment") or {})
    sys.path.insert(0, "")
    sys.argv = ["clt_plugins", *request["arguments"]]
    random.seed(0)
    if "modules" in request:
        atexit.register(lambda: Path(request["modules"]).write_text(json.dumps(sorted(sys.modules))))
    for name, limit in (request.get("limits") or {}).items():
        if name == "AS":
            limit += int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    time.sleep(request.get("delay", 0))
    fault = request.get("fault")
    if fault:
        from tests.faults.inject import arm

        arm(fault, request["folder"], request.get("record", os.devnull))


def _end(code: object) -> None:
    """End without taking down every module, which takes longer than the command: what is alive no more is collected,
    exit handlers of Python and C run."""
    for number in SIGNALS:  # the command has ended: what comes now is meant for it no more
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    threading._shutdown()  # type: ignore[attr-defined]  # as Python does: threads of pools are waited for
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).exit(code if isinstance(code, int) else int(code is not None))


def _watch(request: dict[str, Any]) -> dict[str, Any]:
    """Wait for a child; kill it when its time is over or it takes too much memory.

    Options: `signals`, a list of seconds and signal numbers; `memory`, in bytes; `samples`, whether to take samples.
    """
    child, started = request["child"], time.monotonic()
    signals = [(float(after), int(number)) for after, number in request.get("signals") or []]
    memory = request.get("memory", 3 * 2**30)
    base, peak = _resident(os.getpid()), 0
    timeout = bomb = False
    samples: list[tuple[int, int]] = []
    handle = os.pidfd_open(child)
    try:
        while not select.select([handle], [], [], POLL_S if not signals else 0.002)[0]:
            passed = time.monotonic() - started
            while signals and passed >= signals[0][0]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signals.pop(0)[1])
            peak = max(peak, _resident(child))
            if request.get("samples") and passed > 0.25 * len(samples):
                with contextlib.suppress(OSError):
                    samples.append((_resident(child), len(os.listdir(f"/proc/{child}/fd"))))  # noqa: PTH208
            timeout, bomb = passed > request["timeout"], peak - base > memory
            if timeout:
                os.kill(child, STACKS)
                time.sleep(STACKS_S)
            if timeout or bomb:
                os.killpg(child, signal.SIGKILL)
                break
    finally:
        os.close(handle)
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.monotonic() - started,
        "timeout": timeout,
        "bomb": bomb,
        "grown": max(0, peak - base),
        "samples": samples,
    }


def _resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _import(names: list[str]) -> None:
    for name in names:
        if name not in sys.modules and name != "__main__":
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def serve() -> dict[str, Any] | None:
    """Answer requests until stdin ends; returns the request in a child."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if request["do"] == "import":
            _import(request["names"])
        elif request["do"] == "start":
            gc.freeze()  # a collection in a child would copy every page
            child = os.fork()
            if child == 0:
                return request
            answer = {"child": child}
        elif request["do"] == "poll":
            ended = os.waitid(os.P_PID, request["child"], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            answer = {"alive": ended is None}
        elif request["do"] == "wait":
            answer = _watch(request)
        print(json.dumps(answer), flush=True)
    return None


def main(request: dict[str, Any]) -> None:
    if request.get("thorough"):
        gc.unfreeze()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _begin(request)
    from clt_plugins.__main__ import main as command

    code: object = None
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a signal that came too early is heard now
        if request.get("module"):
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        else:
            command()
    except SystemExit as end:
        code = end.code
        if request.get("thorough") or not (code is None or isinstance(code, int)):
            raise
    except BaseException:
        if request.get("thorough"):
            raise
        traceback.print_exc()
        code = 1
    if not request.get("thorough"):
        _end(code)


if __name__ == "__main__":
    begun = serve()
    if begun is None:
        os._exit(0)
    main(begun)
