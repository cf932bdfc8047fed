"""A process that has imported everything and forks a child for each command: hundreds of commands a minute.

Started by `Zygote`, as `python -m tests.faults.zygote`, with the library of `inject.py` preloaded. It reads a request
per line from stdin and writes an answer per line to stdout. It runs nothing itself, so that it has a single thread.
A child runs `clt_plugins.__main__.main` and ends as any interpreter does.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import attrs

POLL_S = 0.02
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}


@attrs.frozen
class Ended:
    """How a command ended."""

    code: int
    """The exit code; -N if signal N killed it."""
    seconds: float
    timeout: bool
    """It was killed because it took too long."""
    bomb: bool
    """It was killed because it took too much memory."""
    grown: int
    """Bytes of memory at its peak, beyond what it had when it was forked."""
    samples: list[tuple[int, int]] = attrs.field(factory=list)
    """Bytes of memory and open files, several times a second, if asked for."""
    said: str = ""
    """stderr."""
    out: str = ""
    """stdout."""


class Zygote:
    """The process, seen from the campaign.

    Args:
        preload: the library of `inject.py`, or None.
        outside: a folder for what commands say; outside of the folders that faults are injected into.
    """

    def __init__(self, preload: Path | None, outside: Path):
        self.outside = outside
        environment = {**os.environ, **ENVIRONMENT, "HF_HOME": str(outside / "hf")}
        environment |= {"LD_PRELOAD": str(preload)} if preload else {}
        root = Path(__file__).resolve().parents[2]
        environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "plugins")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=outside,
        )
        self._files: dict[int, Path] = {}
        self._number = 0

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote died: {self.process.wait()}")
        return json.loads(line)

    def warm(self, arguments: list[str], folder: Path) -> Ended:
        """Run a command, and import into the zygote what it imported."""
        modules = self.outside / "modules.json"
        modules.unlink(missing_ok=True)
        ended = self.run(arguments, folder, modules=str(modules), timeout=120)
        self._ask({"do": "import", "names": json.loads(modules.read_text()) if modules.exists() else []})
        return ended

    def start(self, arguments: list[str], folder: Path, **options: Any) -> int:
        """Start a command in a folder; returns its process id. See `_begin` for the options."""
        self._number += 1
        said = self.outside / f"said-{self._number}"
        request = {"do": "start", "arguments": arguments, "folder": str(folder), "said": str(said), **options}
        child = self._ask(request)["child"]
        self._files[child] = said
        return child

    def wait(self, child: int, timeout: float = 60.0, **options: Any) -> Ended:
        """Wait for a command. See `_watch` for the options."""
        answer = self._ask({"do": "wait", "child": child, "timeout": timeout, **options})
        said = self._files.pop(child)
        texts = []
        for path in (said, said.with_suffix(".out")):
            texts.append(path.read_text(errors="replace") if path.exists() else "")
            path.unlink(missing_ok=True)
        return Ended(**answer, said=texts[0], out=texts[1])

    def run(self, arguments: list[str], folder: Path, *, timeout: float = 60.0, **options: Any) -> Ended:
        """Run a command to its end."""
        watched = {name: options.pop(name) for name in ("signals", "memory", "samples") if name in options}
        return self.wait(self.start(arguments, folder, **options), timeout, **watched)

    def learn(self, names: list[str]) -> None:
        """Import modules into the zygote."""
        self._ask({"do": "import", "names": names})

    def signal(self, child: int, number: int) -> None:
        """Send a signal to a command that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    def alive(self, child: int) -> bool:
        """Whether a command that was started still runs."""
        return self._ask({"do": "poll", "child": child})["alive"]

    def said(self, child: int) -> str:
        """What a command that runs has said on stderr."""
        path = self._files[child]
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# -- in the zygote ----------------------------------------------------------------------------------------------------


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
        open(number, mode, closefd=False, buffering=buffering)  # noqa: SIM115 - by descriptor, for the process
        for number, mode, buffering in ((0, "r", -1), (1, "w", -1), (2, "w", 1))
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
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
