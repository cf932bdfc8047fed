"""A server of data sets that is killed, fails, restarts, stalls or lies, seen from uploads and downloads."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import attrs

from clt_plugins.errors import ExitCode
from clt_plugins.testing.processes.ports import free_port
from tests.faults import oracle
from tests.faults.bench import Bench
from tests.faults.folders import GENERATE
from tests.faults.forking import Ended
from tests.faults.inject import COUNT, INJECTIONS, MUTATING, calls
from tests.faults.lies import LIES, Liar
from tests.faults.tries import Result, Try

LONG_S = 60.0
"""An upload is interrupted after this; a download gives up by itself (`patience_s` in its recipe)."""
STOP_S = 30.0
TOKEN = {"CLT_TOKEN": "secret"}
UPLOAD, DOWNLOAD = "generate --to a server", "run on a server's data"
AT_CALLS = (
    "killed before a call",
    "killed after a call",
    "killed in the middle of a write",
    "one call fails (EIO)",
    "one call fails (EDQUOT)",
)
RESTARTS = {
    "killed at random moments, and started again": signal.SIGKILL,
    "restarted at random moments": signal.SIGTERM,
}
STALLS = "stalls for 2 s at random moments"
CLIENT = "the client is killed at random moments, and started again"


def pairs() -> list[tuple[str, str]]:
    both = [(f"the server is {fault}", command) for fault in RESTARTS for command in (UPLOAD, DOWNLOAD)]
    both += [(f"the server {STALLS}", command) for command in (UPLOAD, DOWNLOAD)]
    calls_ = [(f"the server: {fault}", UPLOAD) for fault in AT_CALLS]
    lies = [(f"the server lies: {lie}", command) for lie in LIES for command in (UPLOAD, DOWNLOAD)]
    return [*calls_, *both, (CLIENT, UPLOAD), *lies]


def details(bench: Bench, fault: str, command: str, draw: random.Random) -> Iterator[str]:
    """Seeds, without an end."""
    while bench.library is not None or not fault.startswith("the server: "):
        yield str(draw.randrange(10**6))


def attempt(bench: Bench, one: Try) -> Result:
    """Run a client while something happens to the server, judge it, and do it again without a fault."""
    upload, draw = one.command == UPLOAD, random.Random(str(one))
    port, client, made = free_port(), UPLOAD if upload else DOWNLOAD, "root/d" if upload else "r"
    if client not in bench.cache:
        bench.cache[client] = _unbroken(bench, upload, made)
    unbroken, number, seconds = bench.cache[client]
    _fresh(bench, upload)
    fault = one.fault.removeprefix("the server: ")
    options: dict[str, Any] = {}
    if fault in AT_CALLS:
        injection = INJECTIONS[fault]
        at = draw.randint(1, number)
        options = {"mode": injection.mode, "at": at, "number": injection.number, "kinds": injection.kinds & MUTATING}
    server = _serve(bench, port, options)
    liar = None
    if one.fault.startswith("the server lies: "):
        liar = Liar(port, LIES[one.fault.removeprefix("the server lies: ")], draw)
    ended, server = _together(bench, one, upload, liar.port if liar else port, port, server, draw, seconds)
    if liar:
        liar.close()
    faults = oracle.ending(ended, {ExitCode.OK, ExitCode.FAILED, ExitCode.USAGE, ExitCode.INTERRUPTED})
    if not faults:
        faults += [line for line in oracle.message(ended, "", ()) if "lines instead" not in line]
    if ended.code == ExitCode.OK:
        now = oracle.content(bench.slot, (made,))
        faults += [f"ended with 0, but {line}" for line in oracle.differences(now, unbroken)]
    else:
        faults += _again(bench, upload, port, made, unbroken)
    bench.servers.signal(server, signal.SIGTERM)
    stopped = bench.servers.wait(server, 60)
    faults += [f"the server: {line}" for line in oracle.ending(stopped, {ExitCode.OK})]
    if oracle.STACK.search(stopped.said):
        faults.append(f"the server prints a stack trace: {oracle.last(stopped.said)}")
    return Result(faults=faults, where=f"{fault} {options.get('at', '')}", ended=ended)


def _together(
    bench: Bench, one: Try, upload: bool, to: int, port: int, server: int, draw: random.Random, seconds: float
) -> tuple[Ended, int]:
    """Run a client to its end; returns how it ended, and the server that runs then."""
    zygote, began = bench.zygote, time.monotonic()
    child = _client(bench, upload, to)
    moments = sorted(draw.uniform(0, seconds) for _ in range(draw.randint(1, 3)))
    while zygote.alive(child) and time.monotonic() - began < LONG_S:
        if not bench.servers.alive(server):  # an operator, or systemd, starts it again
            bench.servers.wait(server)
            server = _serve(bench, port, {})
        if moments and time.monotonic() - began > moments[0] and not one.fault.startswith("the server: "):
            moments.pop(0)
            if one.fault == CLIENT:
                zygote.signal(child, signal.SIGKILL)
                zygote.wait(child)
                child = _client(bench, upload, to)
            elif one.fault.endswith(STALLS):
                bench.servers.signal(server, signal.SIGSTOP)
                time.sleep(2)
                bench.servers.signal(server, signal.SIGCONT)
            elif one.fault.removeprefix("the server is ") in RESTARTS:
                bench.servers.signal(server, RESTARTS[one.fault.removeprefix("the server is ")])
                # Started again here too: the client may have ended meanwhile, and the last server is judged.
                bench.servers.wait(server)
                server = _serve(bench, port, {})
        time.sleep(0.02)
    # An upload is patient: it tries for ten minutes. Its user is not, and must be heard.
    if upload and zygote.alive(child):
        zygote.signal(child, signal.SIGINT)
    ended = zygote.wait(child, STOP_S)
    return attrs.evolve(ended, seconds=time.monotonic() - began), server


def _client(bench: Bench, upload: bool, port: int) -> int:
    url = f"http://127.0.0.1:{port}"
    arguments = (
        [*GENERATE, "--to", url] if upload else ["run", "remote.toml", "--out", "r", "--set", f"source.url={url}"]
    )
    if not upload and (bench.slot / "r" / "checkpoints").exists():
        arguments.append("--resume")
    return bench.zygote.start(arguments, bench.slot, environment=TOKEN)


def _serve(bench: Bench, port: int, fault: dict[str, Any]) -> int:
    """Start a server; if it is killed before it serves, start another one."""
    options = {"fault": fault, "record": str(bench.record)} if fault else {}
    child = bench.servers.start(["serve", "root", "--port", str(port)], bench.slot, environment=TOKEN, **options)
    until = time.monotonic() + 60
    while "serving" not in bench.servers.said(child):
        if not bench.servers.alive(child):
            ended = bench.servers.wait(child)
            assert fault, f"the server does not start: {ended}"
            return _serve(bench, port, {})
        assert time.monotonic() < until, "the server does not start"
        time.sleep(0.01)
    return child


def _fresh(bench: Bench, upload: bool) -> None:
    bench.fresh("new" if upload else "data")
    (bench.slot / "root").mkdir()
    if not upload:
        (bench.slot / "d").rename(bench.slot / "root" / "d")


def _again(bench: Bench, upload: bool, port: int, made: str, unbroken: dict[str, str]) -> list[str]:
    """The same client once more, without a fault."""
    if not upload and (bench.slot / "r").exists() and not any((bench.slot / "r").rglob("step_*")):
        return []  # it failed before there was anything to go on from
    ended = bench.zygote.wait(_client(bench, upload, port), LONG_S)
    faults = oracle.differences(oracle.content(bench.slot, (made,)), unbroken)
    if faults:
        return [f"cannot go on: exit {ended.code}: {oracle.last(ended.said)}", *faults[:3]]
    return []


def _unbroken(bench: Bench, upload: bool, made: str) -> tuple[dict[str, str], int, float]:
    """What a client makes, how many calls the server makes, and how long it takes."""
    bench.unbroken("generate")
    for warm in (True, False):
        _fresh(bench, upload)
        port = free_port()
        bench.record.unlink(missing_ok=True)
        server = _serve(bench, port, {"mode": COUNT} if bench.library else {})
        began = time.monotonic()
        ended = bench.zygote.wait(_client(bench, upload, port), LONG_S)
        assert ended.code == 0, ended
        seconds = time.monotonic() - began
        bench.servers.signal(server, signal.SIGTERM)
        bench.servers.wait(server)
        if warm:
            bench.zygote.learn(["clt_datasets.net.remote"])
            bench.servers.learn(["aiohttp.web", "clt_datasets.net.serve"])
    return oracle.content(bench.slot, (made,)), max(1, len(calls(bench.record))), seconds
