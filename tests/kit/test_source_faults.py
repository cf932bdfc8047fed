"""Sources that are wrong in one way each: the kit finds the fault and says where to look. Without it each conforms."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER, SOURCE


def test_a_source_that_repeats_a_row_after_resuming(failures: Any) -> None:
    assert failures(HEADER + SOURCE, OFFSET="0") == {}
    found = failures(HEADER + SOURCE, OFFSET="-1")
    assert found.keys() == {"mine/resume"}
    assert "the state that was loaded" in found["mine/resume"]


def test_a_source_that_repeats_a_row_though_its_state_is_right(failures: Any) -> None:
    """Batches are as before, since the row before the first one is the last one."""
    rows = "self.rows[[n * 31 % 64 for n in range(start, start + share)]]"
    again = {"self.rows[start : start + share]": rows}
    found = failures(HEADER + SOURCE, only="once", OFFSET="0", **again)
    assert "112 different rows, resumed after 48\n     got: 48 of them came before" in found["mine/exactly_once"]


def test_a_source_whose_position_is_that_of_one_rank(failures: Any) -> None:
    """As if the rows of every rank were its own: with other ranks some come again, and others never."""
    per_rank = {
        "start = self.position + share * parallel.data_rank": "start = self.position * parallel.data_ranks + "
        "share * parallel.data_rank",
        "self.position += self.context.batch_tokens": "self.position += share",
    }
    found = failures(HEADER + SOURCE, only="ranks", OFFSET="0", **per_rank)
    assert found.keys() == {"mine/other_ranks"}
    assert "no row twice before all rows came once" in found["mine/other_ranks"]


RANKS = "self.context.parallel.data_ranks"


def test_a_source_that_leaves_rows_out_with_other_ranks(failures: Any) -> None:
    skips = {
        'return {"position": self.position}': f'return {{"position": self.position, "n": {RANKS}}}',
        'self.position = state["position"]': f"self.position = state['position'] + 5 * (state['n'] != {RANKS})",
    }
    found = failures(HEADER + SOURCE, only="ranks", OFFSET="0", **skips)
    assert found.keys() == {"mine/other_ranks"}
    assert "rows have not come" in found["mine/other_ranks"]


def test_a_source_that_refuses_other_ranks_is_honest(failures: Any) -> None:
    refuses = {
        'return {"position": self.position}': f'return {{"position": self.position, "n": {RANKS}}}',
        'self.position = state["position"]': f"if state['n'] != {RANKS}:\n"
        "            raise Refused('parallel.data', 'not as many as before')\n"
        '        self.position = state["position"]',
    }
    assert failures(HEADER + SOURCE, only="ranks", OFFSET="0", **refuses) == {}


def test_a_source_whose_state_differs_between_ranks(failures: Any) -> None:
    differs = {
        'return {"position": self.position}': 'return {"position": self.position, "n": self.context.parallel.rank}'
    }
    found = failures(HEADER + SOURCE, only="other_ranks", OFFSET="0", **differs)
    assert "expected: the same state on every data rank" in found["mine/other_ranks"]


@pytest.mark.parametrize(
    ("end", "text"),
    [("raise StopIteration", "StopIteration"), ("return None", "got: none"), ("pass", "got: 0")],
)
def test_a_source_that_ends_without_a_word(failures: Any, end: str, text: str) -> None:
    line = "start = self.position + share * parallel.data_rank"
    replaced = {line: f"{line}\n        if start >= 320:\n            share = 0\n            {end}"}
    found = failures(HEADER + SOURCE, only="epochs", OFFSET="0", **replaced)
    assert text in found["mine/epochs"]


def test_a_source_with_a_short_batch_at_the_end_of_an_epoch(failures: Any) -> None:
    short = {"rows = self.rows[start : start + share]": "rows = self.rows[start % 300 : min(start % 300 + share, 300)]"}
    found = failures(HEADER + SOURCE, only="epochs", OFFSET="0", **short)
    assert "batch 18 of 16 tokens\n     got: 12" in found["mine/epochs"]


def test_a_source_whose_order_is_the_hash_of_python(failures: Any) -> None:
    by_hash = {
        "    def next(self):": "        order = sorted(range(2000), key=lambda n: hash(str(n)))\n"
        "        self.rows = self.rows[order]\n\n    def next(self):"
    }
    found = failures(HEADER + SOURCE, OFFSET="0", **by_hash)
    assert found.keys() == {"mine/other_process"}
    assert "`hash` of text" in found["mine/other_process"]


@pytest.mark.parametrize("value", [pytest.param("str(id(self))", marks=pytest.mark.slow), "str(hash('text'))"])
def test_a_source_whose_identity_is_that_of_a_process(failures: Any, value: str) -> None:
    identity = f"    def identity(self):\n        return {{'source.text': {value}}}\n\n    def next(self):"
    found = failures(HEADER + SOURCE, only="other", OFFSET="0", **{"    def next(self):": identity})
    assert found.keys() == {"mine/other_process"}
    assert "expected: the identity" in found["mine/other_process"]
