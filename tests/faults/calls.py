"""Faults at a system call: every command, every kind of fault, at every call that it makes."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from clt_plugins.errors import ExitCode
from tests.faults import oracle
from tests.faults.bench import Bench
from tests.faults.commands import COMMANDS, Command
from tests.faults.inject import (
    CUT,
    FAIL,
    FAIL_ON,
    INJECTIONS,
    LINK,
    MKDIR,
    MODE,
    OPEN,
    READ,
    REMOVE,
    RENAME,
    SIGNAL,
    SYNC,
    WRITE,
    Call,
    calls,
)
from tests.faults.tries import Result, Try

DEAF = 100
"""Calls that a command may still make after a signal and then end with 0: it was about to end. So many are those of the
last step's checkpoint, of an old one that is removed, and of the transcoder."""

KINDS = {"open": OPEN, "write": WRITE, "pwrite": WRITE, "sendfile": WRITE, "copy_file_range": WRITE, "writev": WRITE}
KINDS |= {"fsync": SYNC, "fdatasync": SYNC, "rename": RENAME, "mkdir": MKDIR, "unlink": REMOVE, "rmdir": REMOVE}
KINDS |= {"ftruncate": CUT, "truncate": CUT, "link": LINK, "symlink": LINK, "chmod": MODE, "fchmod": MODE}


PROBE = "/.clt-plugins-"
"""Of the name of a folder that is made to see whether one can be made."""


def kind(call: Call) -> int:
    """The kind of a call that changes something."""
    name = call.name.removesuffix("2").removesuffix("64").removesuffix("at")
    return KINDS[name]


def pairs() -> list[tuple[str, str]]:
    """Faults and the commands in which they are tried."""
    return [
        (fault, name)
        for name, command in COMMANDS.items()
        for fault, injection in INJECTIONS.items()
        if command.writes or injection.kinds == READ
    ]


def meant(bench: Bench, fault: str, command: str) -> list[Call]:
    """The calls of a command at which a fault can be tried, in their order."""
    unbroken, kinds = bench.unbroken(command), INJECTIONS[fault].kinds
    return unbroken.reads if kinds == READ else [call for call in unbroken.calls if kind(call) & kinds]


def details(bench: Bench, fault: str, command: str, draw: random.Random) -> Iterator[str]:
    """Numbers of calls, each once, in random order; nothing where nothing can be injected."""
    if bench.library is None:
        return
    made = meant(bench, fault, command)
    yield from map(str, draw.sample(range(1, len(made) + 1), len(made)))


def attempt(bench: Bench, one: Try) -> Result:
    """Run a command with a fault at a call, judge it, go on and judge that."""
    command, injection, unbroken = COMMANDS[one.command], INJECTIONS[one.fault], bench.unbroken(one.command)
    slot = bench.fresh(command.folder)
    fault = {"mode": injection.mode, "at": int(one.detail), "number": injection.number, "kinds": injection.kinds}
    ended = bench.run(command.arguments, fault=fault)
    record = calls(bench.record)
    hit = next((call for call in record if call.hit), None)
    if hit is None:
        return Result(reached=False)
    faults = oracle.ending(ended, _codes(injection.mode, record))
    if injection.mode != SIGNAL and ended.code > 0:
        # The first call may be one that does not matter, as the text in a lock: later ones fail then.
        failing = record[record.index(hit) :] if injection.mode == FAIL_ON else [hit]
        names = set().union(*(_names(call.path, slot) for call in failing))
        if PROBE in hit.path:  # whether a folder can be made there: the folder that is meant is named
            names |= set(command.makes)
        faults += oracle.message(ended, unbroken.ended.said, names)
    elif ended.code >= 0:
        faults += oracle.message(ended, unbroken.ended.said, ())
    faults += oracle.damaged(slot, command.shows)
    faults += oracle.kept(slot, command.keeps, killed=ended.code < 0)
    if ended.code == 0:
        now = oracle.content(slot, command.makes)
        faults += [f"ended with 0, but {line}" for line in oracle.differences(now, unbroken.content)]
    faults += go_on(bench, command, unbroken.content)
    return Result(faults=faults, where=f"{hit.name} {Path(hit.path).relative_to(slot)}", ended=ended)


def go_on(bench: Bench, command: Command, unbroken: dict[str, str]) -> list[str]:
    """Do what a user does after a fault; a line for each thing that is not as if nothing had happened."""
    said: list[str] = []
    for arguments in command.go_on or (command.arguments,):
        ended = bench.run(arguments)
        if ended.code == 0:
            break
        said.append(f"exit {ended.code}: {oracle.last(ended.said)}")
    faults = oracle.differences(oracle.content(bench.slot, command.makes), unbroken)
    if faults and len(said) == len(command.go_on or (1,)):
        return [f"cannot go on: {said}", *faults[:3]]
    faults += oracle.damaged(bench.slot, command.shows) + oracle.kept(bench.slot, command.keeps)
    return [f"after going on: {line}" for line in faults]


def _codes(mode: int, record: list[Call]) -> set[int]:
    """The exit codes that are right."""
    if mode in (FAIL, FAIL_ON):
        return {ExitCode.OK, ExitCode.FAILED, ExitCode.USAGE}  # 0 where it was tried again, or did not matter
    if mode == SIGNAL:
        after = sum(not call.hit for call in record)
        return {ExitCode.INTERRUPTED, ExitCode.OK} if after <= DEAF else {ExitCode.INTERRUPTED}
    return {-signal.SIGKILL}


def _names(path: str, slot: Path) -> set[str]:
    """What a message on a call may name: the file, or a folder that it is in."""
    parts = Path(path).relative_to(slot).parts
    return {re.sub(r"^\.|(\.\d+)?(\.partial)?$", "", part) for part in parts}
