"""Runs tries of all families until the time is over, and counts them."""

from __future__ import annotations

import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from types import ModuleType
from typing import Any

import attrs

from tests.faults import calls, damage, leak, limits, net, ranks
from tests.faults.bench import Bench
from tests.faults.tries import Result, Try

FAMILIES: dict[str, ModuleType] = {
    "calls": calls,
    "damage": damage,
    "limits": limits,
    "net": net,
    "ranks": ranks,
    "leak": leak,
}
"""Each has `pairs()`, `details(bench, fault, command, draw)` and `attempt(bench, one)`."""


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

    def close(self) -> None:
        self.bench.close()

    def knows(self, name: str) -> bool:
        """Whether a family, a fault or a command has this in its name."""
        return name in FAMILIES or any(
            name in " ".join(pair) for family in FAMILIES.values() for pair in family.pairs()
        )

    def run(
        self, seconds: float, only: Sequence[str] = (), show: Callable[[str], None] = print
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Run tries; families take turns, each with an equal share of the time.

        Returns:
            The rows, and a record of each try that lost something.
        """
        names = [name for name in FAMILIES if name in only] or list(FAMILIES)
        words = [word for word in only if word not in FAMILIES]
        left = {name: self._tries(name, words) for name in names}
        spent = dict.fromkeys(names, 0.0)
        rows: dict[tuple[str, str, str], Row] = {}
        found: list[dict[str, Any]] = []
        until = time.monotonic() + seconds
        while left and time.monotonic() < until:
            family = min(left, key=lambda name: spent[name])
            began = time.monotonic()
            one = next(left[family], None)
            if one is None:
                del left[family]
            else:
                result = self.attempt(one)
                if result.reached:
                    row = rows.setdefault((family, one.fault, one.command), Row(family, one.fault, one.command))
                    row.tries += 1
                    row.lost += bool(result.faults)
                if result.faults:
                    found.append({"try": str(one), "where": result.where, "faults": result.faults})
                    show(f"LOST {one} ({result.where})")
                    for line in result.faults:
                        show(f"     {line[:300]}")
                    show(f"     {one.again}")
            spent[family] += time.monotonic() - began
        return list(rows.values()), found

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

    def as_json(self, rows: list[Row], found: list[dict[str, Any]], arguments: list[str]) -> dict[str, Any]:
        """What the table is made from."""
        return {
            "date": date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, {sys.platform}",
            "command": " ".join(["python -m tests.faults", *arguments]),
            "rows": [attrs.asdict(row) for row in rows],
            "found": found,
        }
