"""Builds `inject.c` and arms it: the n-th call of a kind fails, is torn, kills the process or sends it a signal."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import attrs

SOURCE = Path(__file__).with_name("inject.c")

OPEN, WRITE, SYNC, RENAME, MKDIR, REMOVE, CUT, LINK, MODE, READ = (1 << n for n in range(10))
MUTATING = OPEN | WRITE | SYNC | RENAME | MKDIR | REMOVE | CUT | LINK | MODE
GROWING = OPEN | WRITE | MKDIR | CUT | LINK
"""What fails on a full disk."""
OFF, COUNT, FAIL, FAIL_ON, KILL_BEFORE, KILL_AFTER, TEAR, SIGNAL = range(8)


@attrs.frozen
class Injection:
    """What happens at a call."""

    mode: int
    number: int = 0
    """The error, or the signal."""
    kinds: int = MUTATING


INJECTIONS: dict[str, Injection] = {
    "killed before a call": Injection(KILL_BEFORE),
    "killed after a call": Injection(KILL_AFTER),
    "killed in the middle of a write": Injection(TEAR, kinds=WRITE),
    "one call fails (EIO)": Injection(FAIL, errno.EIO),
    "one call fails (EDQUOT)": Injection(FAIL, errno.EDQUOT, GROWING),
    "all calls fail from one on (EIO)": Injection(FAIL_ON, errno.EIO),
    "disk full from one call on (ENOSPC)": Injection(FAIL_ON, errno.ENOSPC, GROWING),
    "one call interrupted (EINTR)": Injection(FAIL, errno.EINTR, OPEN | WRITE),
    "one read fails (EIO)": Injection(FAIL, errno.EIO, READ),
    "one read refused (EACCES)": Injection(FAIL, errno.EACCES, READ),
    "one read interrupted (EINTR)": Injection(FAIL, errno.EINTR, READ),
    "Ctrl-C at a call": Injection(SIGNAL, signal.SIGINT),
    "SIGTERM at a call": Injection(SIGNAL, signal.SIGTERM),
}
"""Faults by name."""


def library() -> Path | None:
    """The library, compiled unless it is there already; None, with a loud message, where that cannot be done."""
    if not sys.platform.startswith("linux"):
        print("tests.faults: NOTHING IS INJECTED: this is not Linux", file=sys.stderr)
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        print("tests.faults: NOTHING IS INJECTED: no C compiler (cc) to build inject.c with", file=sys.stderr)
        return None
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"clt-faults-{os.getuid()}-{digest}.so"
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(partial), "-ldl"], check=True)
        partial.replace(built)
    return built


def arm(fault: dict[str, Any], folder: str, record: str) -> None:
    """Arm the library that is preloaded into this process.

    Args:
        fault: `mode`, `at` (the number of the call, from 1), `number` and `kinds`.
        folder: only calls on files below it count.
        record: the file to which calls (when counting) and the call that was hit are written.
    """
    preloaded = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0])
    if fault.get("clock"):
        preloaded.fault_clock(ctypes.c_long(fault["clock"]))
    if "mode" in fault:
        preloaded.fault_arm(
            ctypes.c_int(fault["mode"]),
            ctypes.c_long(fault.get("at", 0)),
            ctypes.c_int(fault.get("number", 0)),
            ctypes.c_uint(fault.get("kinds", MUTATING)),
            folder.encode(),
            record.encode(),
        )


@attrs.frozen
class Call:
    """A line of the record."""

    hit: bool
    number: int
    name: str
    path: str


def calls(record: Path) -> list[Call]:
    """What the library wrote down."""
    lines = record.read_text(errors="replace").splitlines() if record.exists() else []
    parts = [line.split(" ", 3) for line in lines]
    return [Call(p[0] == "hit", int(p[1]), p[2], p[3]) for p in parts if len(p) == 4]
