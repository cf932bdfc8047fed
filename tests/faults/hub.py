"""`push` to a stand-in of the hub that breaks off, is overloaded or gone; and a client that is killed."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import attrs
from aiohttp import web

from clt_plugins.errors import ExitCode
from tests.faults import oracle
from tests.faults.bench import Bench
from tests.faults.damage import state
from tests.faults.forking import Ended
from tests.faults.inject import COUNT, INJECTIONS, READ, calls
from tests.faults.tries import Result, Try
from tests.support.hub.standin import Standin

PUSH = "push"
ARGUMENTS = ("push", "r", "user/name", "--license", "mit")
LONG_S, STOP_S = 60.0, 5.0
"""How long a push may take; where the hub is gone it is patient, and its user presses Ctrl-C after some seconds."""
ANSWERS = {
    "the hub breaks off at random requests": "drop",
    "the hub is overloaded at random requests": "503",
}
GONE = "the hub breaks off from a request on"
SIGNALS = {
    "the client is killed at a random request": signal.SIGKILL,
    "Ctrl-C at a random request": signal.SIGINT,
}
READS = ("one read fails (EIO)", "one read refused (EACCES)")


@attrs.frozen
class Pushed:
    """An upload without a fault."""

    files: dict[str, bytes]
    requests: int
    reads: int
    said: str


def pairs() -> list[tuple[str, str]]:
    return [(fault, PUSH) for fault in (*ANSWERS, GONE, *SIGNALS, *READS)]


def details(bench: Bench, fault: str, command: str, draw: random.Random) -> Iterator[str]:
    """Seeds, without an end."""
    while bench.library is not None or fault not in READS:
        yield str(draw.randrange(10**6))


def attempt(bench: Bench, one: Try) -> Result:
    """Push while something fails; what everybody sees is the old or the new, and pushing again makes it the new."""
    if PUSH not in bench.cache:
        bench.cache[PUSH] = _unbroken(bench)
    unbroken: Pushed = bench.cache[PUSH]
    draw, options = random.Random(str(one)), {}
    slot = bench.fresh("stages")
    before = state(slot)
    if one.fault in READS:
        injection = INJECTIONS[one.fault]
        at = draw.randint(1, unbroken.reads)
        options = {"mode": injection.mode, "at": at, "number": injection.number, "kinds": injection.kinds}
    with Standin().running() as hub:
        first = draw.randint(1, unbroken.requests)
        child: list[int] = []
        hub.fault = _fault(bench, one.fault, first, draw, child)
        stop = [[STOP_S, int(signal.SIGINT)]] if one.fault == GONE else []
        ended = _client(bench, hub, options, child, signals=stop)
        faults = oracle.ending(ended, _codes(one.fault)) + oracle.message(ended, unbroken.said, ())
        faults += _visible(hub, unbroken, must=ended.code == ExitCode.OK)
        hub.fault = lambda request, number: None
        if ended.code != ExitCode.OK:
            again = _client(bench, hub, {}, [])
            faults += oracle.ending(again, {ExitCode.OK})
            faults += [f"after pushing again: {line}" for line in _visible(hub, unbroken, must=True)]
    after = state(slot)
    faults += [f"{name}: changed by a push" for name, digest in before.items() if after.get(name) != digest]
    return Result(faults=faults, where=f"request {first}", ended=ended)


def _fault(bench: Bench, name: str, first: int, draw: random.Random, child: list[int]) -> Any:
    """What happens at which request."""
    left = draw.randint(1, 3)

    def fault(request: web.Request, number: int) -> str | None:
        nonlocal left
        if name in SIGNALS:
            if number == first and child:
                bench.zygote.signal(child[0], SIGNALS[name])
            return None
        if name == GONE:
            return "drop" if number >= first else None
        if name in ANSWERS and number >= first and left and draw.random() < 0.5:
            left -= 1
            return ANSWERS[name]
        return None

    return fault


def _client(bench: Bench, hub: Standin, fault: dict[str, Any], child: list[int], **watched: Any) -> Ended:
    environment = {"CLT_STANDIN": hub.url, "CLT_STANDIN_HOME": str(bench.outside / "hub")}
    options: dict[str, Any] = {"fault": fault, "record": str(bench.record)} if fault else {}
    bench.record.unlink(missing_ok=True)
    child[:] = [
        bench.zygote.start(
            list(ARGUMENTS), bench.slot, module="tests.faults.pushing", environment=environment, **options
        )
    ]
    return bench.zygote.wait(child[0], LONG_S, **watched)


def _codes(fault: str) -> set[int]:
    if fault in SIGNALS:
        return {-signal.SIGKILL} if SIGNALS[fault] == signal.SIGKILL else {-signal.SIGINT, int(ExitCode.INTERRUPTED)}
    if fault in READS:
        return {ExitCode.OK, ExitCode.FAILED, ExitCode.USAGE}
    return {ExitCode.FAILED, ExitCode.INTERRUPTED} if fault == GONE else {ExitCode.OK}


def _visible(hub: Standin, unbroken: Pushed, *, must: bool) -> list[str]:
    """A line for each fault of what everybody sees: nothing, or all.

    Args:
        must: it must be there.
    """
    repository = hub.repositories.get("user/name")
    files = repository.files() if repository is not None else {}
    if not files:
        return ["nothing was pushed"] if must else []
    missing = [f"{name} was not pushed" for name in unbroken.files.keys() - files.keys()]
    return missing + [f"{name} differs" for name, content in files.items() if unbroken.files.get(name) != content]


def _unbroken(bench: Bench) -> Pushed:
    reads = 0
    for counted in ({"mode": COUNT, "kinds": READ}, {"mode": COUNT, "kinds": READ}, {}):
        bench.fresh("stages")
        with Standin().running() as hub:
            ended = _client(bench, hub, counted if bench.library else {}, [])
            assert ended.code == 0, ended
            reads = len(calls(bench.record)) or reads
            files, requests = hub.repositories["user/name"].files(), len(hub.requests)
        # The first one imported what the others have then.
        bench.zygote.learn(["tests.support.hub.client", "clt_hub.command", "clt_plugins.files.hub.upload"])
    return Pushed(files, requests, max(1, reads), ended.said)
