"""The table of a campaign, for people and for `README.md`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.faults.campaign import Row

README = Path(__file__).with_name("README.md")
CAMPAIGN = Path(__file__).with_name("campaign.json")
"""The campaign whose table the README shows."""
BLOCK = re.compile(r"(<!-- campaign -->\n)(.*?)(<!-- end -->\n)", re.S)


def as_table(rows: Iterable[Row]) -> str:
    """Rows for a terminal."""
    lines = [f"{'fault':40} {'command':32} {'tries':>6} {'survived':>8} {'lost':>5}"]
    total = [0, 0, 0]
    for row in sorted(rows, key=lambda row: (row.family, row.fault, row.command)):
        lines.append(f"{row.fault:40} {row.command:32} {row.tries:6} {row.survived:8} {row.lost:5}")
        total = [total[0] + row.tries, total[1] + row.survived, total[2] + row.lost]
    lines.append(f"{'all':73} {total[0]:6} {total[1]:8} {total[2]:5}")
    return "\n".join(lines)


def written(text: str, campaign: dict[str, Any]) -> str:
    """The README with the campaign's table put in anew."""
    return BLOCK.sub(lambda found: found[1] + block(campaign) + found[3], text)


def block(campaign: dict[str, Any]) -> str:
    """What stands between the markers: a row for each fault of a family, over all its commands."""
    rows: dict[tuple[str, str], list[int]] = {}
    commands: dict[tuple[str, str], list[str]] = {}
    for row in campaign["rows"]:
        key = row["family"], row["fault"]
        counts = rows.setdefault(key, [0, 0])
        counts[0] += row["tries"]
        counts[1] += row["lost"]
        commands.setdefault(key, []).append(row["command"])
    lines = ["| fault | in | tries | survived | lost | command |", "| --- | --- | --- | --- | --- | --- |"]
    for (family, fault), (tries, lost) in sorted(rows.items()):
        within = ", ".join(f"`{name}`" for name in commands[family, fault])
        again = f"`python -m tests.faults --only {family} --only {shlex.quote(fault)}`"
        lines.append(f"| {fault} | {within} | {tries} | {tries - lost} | {lost or 'nothing'} | {again} |")
    total, lost = (sum(counts[n] for counts in rows.values()) for n in (0, 1))
    lines.append(f"| all | | {total} | {total - lost} | {lost or 'nothing'} | `{campaign['command']}` |")
    head = f"{campaign['date']}, {campaign['machine']}: `{campaign['command']}`"
    return head + "\n\n" + "\n".join(lines) + "\n"
