"""Compiled loops on disk: they are those of the files as they are now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OUTER = """
from clt_kernels.cpu.compiled import compiled
from inner import inner

@compiled()
def outer(x):
    return inner(x) + 1.0
"""
INNER = """
from clt_kernels.cpu.compiled import compiled

@compiled()
def inner(x):
    return x * {factor}
"""


def call(folder: Path) -> tuple[float, int]:
    """What the loop gives for 3 in a process of its own, and how often it was taken from the disk."""
    code = "from outer import outer; print(outer(3.0), sum(outer.stats.cache_hits.values()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "NUMBA_CACHE_DIR": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    value, hits = done.stdout.split()
    return float(value), int(hits)


def test_a_loop_is_compiled_anew_when_a_file_changes_that_it_calls(tmp_path):
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(factor="2.00"))
    assert call(tmp_path) == (7.0, 0)
    assert call(tmp_path) == (7.0, 1), "nothing has changed"
    (tmp_path / "inner.py").write_text(INNER.format(factor="10.0"))
    assert call(tmp_path) == (31.0, 0)
