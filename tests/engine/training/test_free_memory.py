"""How much memory a sweep may take: that of the machine, less what a container or a job may have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clt_plugins.training.host import free

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as Linux has them, of a machine with 100 GiB free."""
    for name, file in (("CGROUPS", "cgroup"), ("MEMBERSHIP", "self"), ("MEMINFO", "meminfo")):
        monkeypatch.setattr(free, name, tmp_path / file)
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {100 * GIB // 1024} kB\n")
    return tmp_path


def write(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def available() -> float | None:
    found = free.available_bytes(torch.device("cpu"))
    return None if found is None else found / GIB


def test_without_a_limit_it_is_what_the_machine_has(machine: Path) -> None:
    assert available() == 100
    write(machine / "cgroup", {"memory.max": "max", "memory.current": GIB})
    (machine / "self").write_text("0::/\n")
    assert available() == 100
    assert free.available_bytes(torch.device("meta")) is None


def test_page_cache_makes_room(machine: Path) -> None:
    """A container that had read a large data set had no memory left."""
    (machine / "self").write_text("0::/\n")
    stat = f"anon {3 * GIB}\ninactive_file {50 * GIB}\nactive_file {10 * GIB}"
    write(machine / "cgroup", {"memory.max": 64 * GIB, "memory.current": 63 * GIB, "memory.stat": stat})
    assert available() == 61


def test_the_least_of_the_groups_above_counts(machine: Path) -> None:
    (machine / "self").write_text("0::/slurm/job_7/step_0\n")
    top = machine / "cgroup"
    write(top / "slurm", {"memory.max": 90 * GIB, "memory.current": 10 * GIB})
    write(top / "slurm/job_7", {"memory.max": 32 * GIB, "memory.current": 2 * GIB})
    write(top / "slurm/job_7/step_0", {"memory.max": "max", "memory.current": GIB})
    assert available() == 30


def test_of_version_1_it_is_the_controller_of_memory(machine: Path) -> None:
    (machine / "self").write_text("5:cpu,cpuacct:/x\n4:memory:/box\n")
    stat = f"total_inactive_file {2 * GIB}\ntotal_active_file 0"
    files = {"memory.limit_in_bytes": 20 * GIB, "memory.usage_in_bytes": 8 * GIB, "memory.stat": stat}
    write(machine / "cgroup/memory/box", files)
    write(machine / "cgroup/memory", {"memory.limit_in_bytes": 2**63 - 4096, "memory.usage_in_bytes": 9 * GIB})
    assert available() == 14
