"""Runs tries of all families until the time is over, and counts them."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import date
from types import ModuleType
from typing import Any

import attrs

from tests.faults import calls, damage, hub, leak, limits, net, ranks
from tests.faults.bench import Bench
from tests.faults.tries import Result, Try

FAMILIES: dict[str, ModuleType] = {
    "calls": calls,
    "damage": damage,
    "limits": limits,
    "net": net,
    "hub": hub,
    "ranks": ranks,
    "leak": leak,
}
"""Each has `pairs()`, `details(bench, fault, command, draw)` and `attempt(bench, one)`."""

STATUS_S = 60.0
"""Seconds between lines that say how far it is."""
SAID_LINES = 12
"""Lines of what a command said that are shown with what it lost: not every try can be repeated."""


@attrs.define
class Row:
    """A row of the table."""

    family: str
    fault: str
    command: str
    tries: int = 0
    lost: int = 0

    @property
    def survived(self) -> int:
        return self.tries - self.lost


class Campaign:
    def __init__(self, *, seed: int = 0, thorough: bool = False):
        self.seed, self.bench = seed, Bench(thorough=thorough)
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.found: list[dict[str, Any]] = []
        """A record of each try that lost something."""

    def close(self) -> None:
        self.bench.close()

    def knows(self, name: str) -> bool:
        """Whether a family, a fault or a command has this in its name."""
        return name in FAMILIES or any(
            name in " ".join(pair) for family in FAMILIES.values() for pair in family.pairs()
        )

    def run(self, seconds: float, only: Sequence[str] = ()) -> None:
        """Run tries and count them; families take turns, each with an equal share of the time. Ctrl-C ends it early."""
        names = [name for name in FAMILIES if name in only] or list(FAMILIES)
        left = {name: self._tries(name, [word for word in only if word not in FAMILIES]) for name in names}
        spent = dict.fromkeys(names, 0.0)
        began = shown = time.monotonic()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            while left and (now := time.monotonic()) < began + seconds:
                family = min(left, key=lambda name: spent[name])
                one = next(left[family], None)
                if one is None:
                    del left[family]
                    continue
                self._count(one, self.attempt(one))
                spent[family] += time.monotonic() - now
                if now - shown > STATUS_S:
                    shown, rows = now, self.rows.values()
                    tries, lost = sum(row.tries for row in rows), sum(row.lost for row in rows)
                    print(f"{(now - began) / 60:.0f} min: {tries} tries, {lost} lost", file=sys.stderr, flush=True)

    def _count(self, one: Try, result: Result) -> None:
        """Add a try to its row, and tell if it lost something."""
        if result.reached:
            row = self.rows.setdefault((one.family, one.fault, one.command), Row(one.family, one.fault, one.command))
            row.tries += 1
            row.lost += bool(result.faults)
        if result.faults:
            self.found.append({"try": str(one), "where": result.where, "faults": result.faults})
            lines = [f"LOST {one} ({result.where})", *result.faults, one.again]
            said = [] if result.ended is None else result.ended.said.splitlines()[-SAID_LINES:]
            print("\n     ".join(line[:400] for line in [*lines, *(f"| {line}" for line in said)]), flush=True)

    def _tries(self, family: str, words: list[str]) -> Iterator[Try]:
        """One try of each fault in each command, then another one of each, until there are no more."""
        pairs = [pair for pair in FAMILIES[family].pairs() if all(word in " / ".join(pair) for word in words)]
        random.Random(f"{self.seed} {family}").shuffle(pairs)
        left = {
            pair: FAMILIES[family].details(self.bench, *pair, random.Random(f"{self.seed} {family} {pair}"))
            for pair in pairs
        }
        while left:
            for pair in list(left):
                try:
                    detail = next(left[pair], None)
                except AssertionError as error:  # the command fails without a fault: `attempt` will say so
                    print(f"{pair}: {error}")
                    detail = "0"
                    left[pair] = iter(())
                if detail is None:
                    del left[pair]
                else:
                    yield Try(family, *pair, detail)

    def attempt(self, one: Try) -> Result:
        try:
            return FAMILIES[one.family].attempt(self.bench, one)
        except AssertionError as error:
            return Result(faults=[f"cannot be tried: {error}"])

    def replay(self, one: Try) -> int:
        """Repeat a try and show everything."""
        result = self.attempt(one)
        print(f"{one}\nat: {result.where}\nreached: {result.reached}")
        if result.ended is not None:
            ended = result.ended
            print(f"exit {ended.code} after {ended.seconds:.1f} s; stderr:\n{ended.said}\nstdout:\n{ended.out}")
        print("\n".join(result.faults) or "nothing lost")
        return int(bool(result.faults))

    def as_json(self, arguments: list[str]) -> dict[str, Any]:
        """What the table is made from."""
        return {
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, {sys.platform}",
            "command": " ".join(["python -m tests.faults", *arguments]),
            "rows": [attrs.asdict(row) for row in self.rows.values()],
            "found": self.found,
        }
