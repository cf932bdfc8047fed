"""The table of scores that a command shows."""

from __future__ import annotations

from clt_circuits.records import Circuit, Circuits, as_table


def test_a_prompt_moves_no_cursor() -> None:
    numbers = {"tokens": 2, "active_features": 3, "features": 3, "edges": 4, "replacement": 0.5, "completeness": 0.5}
    graph = Circuit(slug="one", prompt="x \x1b[31m\x1b]0;t\x07 y", logits=[], seconds=1.0, **numbers)
    table = as_table(Circuits(replacement=0.5, completeness=0.5, graphs=[graph], versions={}))
    assert "\x1b" not in table and r"x \x1b[31m\x1b]0;t\x07 y" in table
    assert len(table.splitlines()) == 4
