"""Compiled loops on disk: they are those of the files as they are now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


KILLED = """
import os
left, replace = [{after}], os.replace

def until_killed(*names):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
    replace(*names)

os.replace = until_killed
"""


def start(folder: Path, argument: str = "3.0", before: str = "") -> subprocess.Popen[str]:
    code = f"{before}\nfrom outer import outer; print(outer({argument}), sum(outer.stats.cache_hits.values()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "NUMBA_CACHE_DIR": ""}
    # Python's own cache knows a file by its second and its size, which these files have in common.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> tuple[float, int]:
    """What the loop gave in a process of its own, and how often it was taken from the disk."""
    out, _ = process.communicate()
    assert process.returncode == 0
    value, hits = out.split()
    return float(value), int(hits)


def call(folder: Path) -> tuple[float, int]:
    return result(start(folder))


def test_a_loop_is_compiled_anew_when_a_file_changes_that_it_calls(tmp_path):
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(factor="2.00"))
    assert call(tmp_path) == (7.0, 0)
    assert call(tmp_path) == (7.0, 1), "nothing has changed"
    (tmp_path / "inner.py").write_text(INNER.format(factor="10.0"))
    assert call(tmp_path) == (31.0, 0)


def test_of_processes_that_start_together_one_compiles_for_each_type(tmp_path):
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(factor="2.00"))
    processes = [start(tmp_path, argument) for argument in ("3.0", "3", "3.0", "3")]
    found = [result(process) for process in processes]
    assert [value for value, _ in found] == [7.0] * 4
    assert sorted(hits for _, hits in found) == [0, 0, 1, 1]
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("after", range(4))
def test_code_of_files_as_they_were_is_not_taken_after_a_kill(tmp_path, after):
    """Killed at each of the files that two loops write."""
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(factor="2.00"))
    assert call(tmp_path) == (7.0, 0)
    (tmp_path / "inner.py").write_text(INNER.format(factor="10.0"))
    killed = start(tmp_path, before=KILLED.format(after=after))
    killed.communicate()
    assert killed.returncode == 9
    assert call(tmp_path)[0] == 31.0
    assert len(list(tmp_path.rglob("outer*.nbc"))) == 1, "code of the files as they were is removed"


def test_a_folder_that_can_only_be_read_needs_no_lock(tmp_path):
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(factor="2.00"))
    assert call(tmp_path) == (7.0, 0)
    made = next(tmp_path.rglob("*.nbi")).parent
    refusing = "from clt_plugins import Lock\ndef no(self): raise OSError(30, 'read-only')\nLock.try_acquire = no"
    assert result(start(tmp_path, before=refusing)) == (7.0, 1)
    assert not list(made.glob("*.lock"))
