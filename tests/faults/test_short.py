"""A short form of the campaign: a few dozen tries with a fixed seed, and the calls at which commands once failed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice

import pytest

from tests.faults import calls, oracle
from tests.faults.bench import Bench
from tests.faults.campaign import FAMILIES
from tests.faults.commands import COMMANDS
from tests.faults.report import CAMPAIGN, README, written
from tests.faults.tries import Try

DRAWN = [
    *(("calls", "killed before a call", command) for command in ("run", "run --resume", "evaluate", "generate")),
    *(("calls", "killed after a call", command) for command in ("run", "run --resume EARLIER", "scramble")),
    ("calls", "killed in the middle of a write", "run --resume"),
    *(("calls", "one call fails (EIO)", command) for command in ("run", "run --resume", "generate", "scramble")),
    *(("calls", "disk full from one call on (ENOSPC)", command) for command in ("run", "generate, resumed")),
    ("calls", "Ctrl-C at a call", "run"),
    ("calls", "killed before a call", "push --out"),
    ("calls", "one call fails (EIO)", "push --out"),
    ("hub", "the client is killed at a random request", "push"),
    ("damage", "bits flipped", "run --resume"),
    ("damage", "hostile content", "run"),
    ("damage", "hostile content", "inspect --verify"),
    ("damage", "a FIFO in its place", "scramble"),
    ("limits", "few open files", "run"),
    ("limits", "clock is wrong", "run --resume"),
]
"""Family, fault and command of tries whose details the seed draws. Every third one is tried in each run of the tests;
all are in the slow ones."""
TRIED = [
    pytest.param(*one, marks=[pytest.mark.slow] if n % 3 else [], id=" / ".join(one)) for n, one in enumerate(DRAWN)
]

KNOWN = [
    ("killed before a call", "run --resume", "recipe.toml"),
    ("one call fails (EIO)", "run --resume", "recipe.toml"),
    ("killed before a call", "evaluate", "rename"),
    ("one call fails (EIO)", "evaluate", "rename"),
    ("one call fails (EIO)", "generate", "write d/.held_out"),
    ("one call fails (EIO)", "scramble", "write .s.partial/.train"),
    ("all calls fail from one on (EIO)", "generate, resumed", "unlink d/.generate.lock"),
    ("one read refused (EACCES)", "run --resume on text", "text.jsonl"),
]
"""Fault, command, and what is in the calls at which it is tried: a path, a call, or both."""
MOST = 1
"""Calls of each of these that are tried; the campaign tries them all."""


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def needs_injection(bench: Bench) -> None:
    if bench.library is None:
        pytest.skip("needs Linux and a C compiler (cc)")


@pytest.mark.parametrize("family, fault, command", TRIED)
def test_nothing_is_lost(bench: Bench, family: str, fault: str, command: str) -> None:
    needs_injection(bench)
    draw = random.Random(f"short {family} {fault} {command}")
    one = Try(family, fault, command, next(FAMILIES[family].details(bench, fault, command, draw)))
    result = FAMILIES[family].attempt(bench, one)
    assert not result.faults, f"{one.again} ({result.where})"


@pytest.mark.parametrize("fault, command, text", KNOWN, ids=map(" / ".join, KNOWN))
def test_nothing_is_lost_where_it_once_was(bench: Bench, fault: str, command: str, text: str) -> None:
    needs_injection(bench)
    made = calls.meant(bench, fault, command)
    name, _, path = text.rpartition(" ")
    at = [n for n, call in enumerate(made, 1) if path in f"{call.name} {call.path}" and call.name.startswith(name)]
    assert at, "no call is like this: the try would be empty"
    for number in at[:MOST]:
        result = calls.attempt(bench, Try("calls", fault, command, str(number)))
        assert not result.faults, f"python -m tests.faults --replay 'calls / {fault} / {command} / {number}'"


def test_an_unbroken_command_loses_nothing_and_a_torn_file_is_noticed(bench: Bench) -> None:
    """The oracle itself: it is silent when nothing happened, and not when a file is damaged behind a command's back."""
    needs_injection(bench)
    unbroken = bench.unbroken("run")
    bench.fresh("new")
    assert bench.run(COMMANDS["run"].arguments).code == 0
    assert calls.go_on(bench, COMMANDS["run"], unbroken.content) == []
    path = next(bench.slot.glob("r/checkpoints/step_000012/transcoder.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    assert any("differs" in line for line in calls.go_on(bench, COMMANDS["run"], unbroken.content))


def test_a_command_that_hangs_tells_where(bench: Bench) -> None:
    ended = bench.zygote.run(["0"], bench.slot, timeout=1.0, module="http.server")
    (told,) = oracle.ending(ended, {0})
    assert "hangs: killed after" in told and " < socketserver.py" in told and "serve_forever" in told


def test_the_table_is_that_of_the_campaign() -> None:
    text = README.read_text(encoding="utf-8")
    if CAMPAIGN.exists():
        assert written(text, json.loads(CAMPAIGN.read_text())) == text, "write it: python -m tests.faults --write"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_lost_in_any_command(bench: Bench, family: str) -> None:
    needs_injection(bench)
    found = []
    for fault, command in FAMILIES[family].pairs():
        for detail in islice(FAMILIES[family].details(bench, fault, command, random.Random(f"slow {fault}")), 2):
            one = Try(family, fault, command, detail)
            found += [f"{one.again}: {line}" for line in FAMILIES[family].attempt(bench, one).faults]
    assert not found
