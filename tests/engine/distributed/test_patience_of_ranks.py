"""What one rank does alone in a block of all ranks may take longer than an exchange of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clt_plugins.distributed.agree import all_or_none
from clt_plugins.errors import Refused
from clt_plugins.files.folders import atomic_folder


class Other:
    """Rank 0 of two; the other one always succeeds."""

    rank, world, tensor_rank, tensor_ranks, data_rank = 0, 2, 0, 1, 0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def barrier(self) -> None:
        self.calls.append("barrier")

    def gather(self, text: str) -> list[str]:
        self.calls.append("gather")
        return [text, text if text.startswith("{") else json.dumps(None)]  # the same files; no error


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_wait_before_they_tell_also_where_one_failed(fails: bool) -> None:
    """Else the others would give up, and what went wrong would not be told."""
    ranks: Any = Other()
    try:
        with all_or_none(ranks, patiently=True):
            if fails:
                raise Refused("here", "wrong")
    except Refused:
        assert fails
    assert ranks.calls == ["barrier", "gather"]


def test_while_a_folder_is_written_they_wait(tmp_path: Path) -> None:
    ranks: Any = Other()
    with atomic_folder(tmp_path / "result", ranks) as folder:
        (folder / "file").write_text("x")
        before = len(ranks.calls)
    assert ranks.calls[before:][:2] == ["barrier", "gather"]
    assert (tmp_path / "result/file").read_text() == "x"
