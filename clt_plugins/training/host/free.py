"""How much memory is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux has the limits of containers and of jobs."""
MEMBERSHIP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")

NAMES = {
    "": ("memory.max", "memory.current", "inactive_file", "active_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
}
"""Controller (version 2 has no name) -> the files of limit and use, and the lines of `memory.stat` that say how much of
the use is page cache, which makes room when it is asked for."""


def available_bytes(device: torch.device) -> int | None:
    """Memory of a device that is free now; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [int(line.split()[1]) * 1024 for line in _text(MEMINFO).splitlines() if line.startswith("MemAvailable:")]
    return min([*free, *_of_groups()], default=None)


def _of_groups() -> Iterator[int]:
    """What the process's own group and those above it leave: a job's limit may be deep in the tree, or above."""
    for line in _text(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        controller = "memory" if controllers else ""
        top = CGROUPS / controller
        # In a container the path may be that of the machine, and only the top is there.
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            yield from _of_group(group, *NAMES[controller])
            if group == top:
                break


def _of_group(folder: Path, most: str, used: str, *cached: str) -> Iterator[int]:
    limit, usage = (_text(folder / name).strip() for name in (most, used))
    if limit.isdecimal() and usage.isdecimal():
        stat = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
        yield max(0, int(limit) - int(usage) + sum(int(stat.get(name, 0)) for name in cached))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
