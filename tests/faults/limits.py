"""Faults that hit a command as a whole: signals at random moments, limits, the clock, a second process."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import Iterator
from typing import Any

import attrs

from clt_plugins.errors import ExitCode
from tests.faults import oracle
from tests.faults.bench import Bench, Unbroken
from tests.faults.calls import go_on
from tests.faults.commands import COMMANDS, Command
from tests.faults.tries import Result, Try

FIRST_S = 0.06
"""A signal comes after this: before, the interpreter has not begun."""
SIGNALS = {
    "killed at a random moment": [signal.SIGKILL],
    "Ctrl-C at a random moment": [signal.SIGINT],
    "Ctrl-C twice at a random moment": [signal.SIGINT, signal.SIGINT],
    "SIGTERM at a random moment": [signal.SIGTERM],
}
CLOCKS = [-3600, -86_400 * 3650, 86_400 * 3650, -1]
"""Seconds by which the clock is wrong."""
LIMITS = {
    "little memory": ("AS", 2**20, 300 * 2**20),
    "few open files": ("NOFILE", 6, 40),
    "small files only": ("FSIZE", 600, 40_000),
}
"""Limits of the process, between two values; memory counts from what the zygote has."""
CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT}
"""How libhdf5 ends a process when it gets no memory: while it opens a file, or at the end, when it takes down what it
could not set up ("can't locate ID"); and libraries in Rust, by an abort. It counts as a kill: what is there must be
whole, and going on must work."""
NOISE = re.compile(
    r"(Exception ignored in: 'h5py.*\n)?Traceback \(most recent call last\):\n(  File \"h5py/.*\n)+RuntimeError: .*\n"
    r"|Exception ignored .*\n(Traceback \(most recent call last\):\n(  .*\n)+)?MemoryError: *\n"
    r"|.*TqdmMonitorWarning: .*\ncan't start new thread\n  .*\n"
)
"""What h5py, Python and tqdm print without memory, before the error: an object cannot be freed, nor a callback called;
a bar gets no thread."""
LOADER, NO_MEMORY = 127, "cannot allocate memory for thread-local data: ABORT"
"""How the C library ends a process that has no memory for the variables of a library or thread: nobody is asked."""
CLOCK, TWICE = "clock is wrong", "started twice at once"


def pairs() -> list[tuple[str, str]]:
    writing = [name for name, command in COMMANDS.items() if command.writes]
    names = [*SIGNALS, *LIMITS, CLOCK]
    return [(fault, name) for fault in names for name in COMMANDS] + [(TWICE, name) for name in writing]


def details(bench: Bench, fault: str, command: str, draw: random.Random) -> Iterator[str]:
    """Seeds of moments and limits, without an end; each clock once."""
    if fault == CLOCK:
        yield from map(str, CLOCKS if bench.library else ())
        return
    while True:
        yield str(draw.randrange(10**6))


def attempt(bench: Bench, one: Try) -> Result:
    """Run a command under a fault, judge it, go on and judge that."""
    command, unbroken, draw = COMMANDS[one.command], bench.unbroken(one.command), random.Random(str(one))
    bench.fresh(command.folder)
    if one.fault == TWICE:
        return _twice(bench, command, unbroken, draw)
    options, codes = _options(one, command, unbroken, draw)
    ended = bench.run(command.arguments, **options)
    if one.fault == "little memory":
        codes = {LOADER} if NO_MEMORY in ended.said else codes | CRASHES
        ended = attrs.evolve(ended, said=NOISE.sub("", ended.said))
    faults = oracle.ending(ended, codes)
    if not faults:
        limited = one.fault in LIMITS
        faults += oracle.message(ended, unbroken.ended.said, ())
        if limited and ended.code == ExitCode.OK:
            faults += _complete(bench, command, unbroken)
    if one.fault == CLOCK or (ended.code == ExitCode.OK and one.fault in SIGNALS):
        faults += _complete(bench, command, unbroken)
    faults += _after(bench, command, unbroken, killed=ended.code < 0)
    return Result(faults=faults, where=_where(options), ended=ended)


def _options(one: Try, command: Command, unbroken: Unbroken, draw: random.Random) -> tuple[dict[str, Any], set[int]]:
    """How the command is run, and the exit codes that are right."""
    if one.fault == CLOCK:
        return {"fault": {"clock": int(one.detail)}}, {ExitCode.OK}
    if one.fault in LIMITS:
        name, least, most = LIMITS[one.fault]
        return {"limits": {name: draw.randint(least, most)}}, {ExitCode.OK, ExitCode.FAILED, ExitCode.USAGE}
    numbers = SIGNALS[one.fault]
    moment = draw.uniform(FIRST_S, max(2 * FIRST_S, unbroken.ended.seconds))
    signals = [[moment + 0.01 * n, int(number)] for n, number in enumerate(numbers)]
    if numbers[0] == signal.SIGKILL:
        return {"signals": signals}, {-signal.SIGKILL, ExitCode.OK}
    codes = {int(ExitCode.INTERRUPTED), int(ExitCode.OK)}
    trains = command.arguments[0] == "run"
    return {"signals": signals}, codes if trains else codes | {-int(numbers[0])}


def _twice(bench: Bench, command: Command, unbroken: Unbroken, draw: random.Random) -> Result:
    """Start a command a second time while the first one runs."""
    zygote, arguments = bench.zygote, list(command.arguments)
    first = zygote.start(arguments, bench.slot)
    moment = draw.uniform(0, unbroken.ended.seconds)
    second = zygote.start(arguments, bench.slot, delay=moment)
    ended = [zygote.wait(first), zygote.wait(second)]
    faults: list[str] = []
    for one in ended:
        faults += oracle.ending(one, {ExitCode.OK, ExitCode.FAILED, ExitCode.USAGE})
        faults += oracle.message(one, unbroken.ended.said, ())
    codes = [one.code for one in ended]
    if ExitCode.OK not in codes:
        faults.append(f"both failed: {oracle.last(ended[0].said)} and {oracle.last(ended[1].said)}")
    elif command.arguments[0] == "run" and "--resume" not in command.arguments and codes == [0, 0]:
        faults.append("both ran in the same folder, and ended with 0")
    if ExitCode.OK in codes:
        faults += _complete(bench, command, unbroken)
    faults += _after(bench, command, unbroken)
    return Result(faults=faults, where=f"second after {moment:.2f} s", ended=ended[1])


def _complete(bench: Bench, command: Command, unbroken: Unbroken) -> list[str]:
    now = oracle.content(bench.slot, command.makes)
    return [f"ended with 0, but {line}" for line in oracle.differences(now, unbroken.content)]


def _after(bench: Bench, command: Command, unbroken: Unbroken, *, killed: bool = False) -> list[str]:
    faults = oracle.damaged(bench.slot, command.shows) + oracle.kept(bench.slot, command.keeps, killed=killed)
    return faults + go_on(bench, command, unbroken.content)


def _where(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())
