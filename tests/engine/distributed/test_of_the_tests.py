"""What the tests of several ranks stand on."""

from __future__ import annotations

from tests.support.commands import on_ranks

CHATTY = """
import os, sys, time
from pathlib import Path
came = Path(sys.argv[1])
if os.environ["RANK"] == "1":
    print("x" * 300_000, file=sys.stderr)  # more than a pipe holds
    came.touch()
until = time.monotonic() + 20
while not came.exists():
    assert time.monotonic() < until, "rank 1 does not come"
    time.sleep(0.01)
"""


def test_a_rank_that_says_much_is_read_while_another_waits_for_it(tmp_path):
    ended = on_ranks(2, "-c", CHATTY, tmp_path / "came")
    assert [rank.returncode for rank in ended] == [0, 0], ended[0].stderr[-500:]
    assert len(ended[1].stderr) == 300_001
