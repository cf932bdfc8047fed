"""Compiles Triton launches ahead of time for a GPU that is not there, and reads what its assembler made of them.

A launch that was recorded on the absent GPU is compiled exactly as Triton would compile it: the same types, constants
and alignments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from tests.gpu.count import Launch, Place


class _Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _target(arch: int) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Driver(GPUTarget("cuda", arch, 32)))
    try:
        yield
    finally:
        driver._active = before


@attrs.frozen
class Compiled:
    """A kernel as the assembler made it."""

    kernel: str
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread in local memory."""
    shared: int
    """Bytes of a program in shared memory."""
    instructions: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]
    """The instructions of each loop, from its first to the branch back; outer ones hold the inner ones' too."""

    def spills(self) -> int:
        """Loads and stores of local memory."""
        return sum(text.startswith(("LDL", "STL")) for text in self.instructions)

    def loads(self) -> Counter[str]:
        """How many loads of global memory there are, by width in bits."""
        return Counter(_width(text) for text in self.instructions if text.startswith("LDG"))


def _width(text: str) -> str:
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", text.split()[0])
    return found.group(1).lstrip("US") if found else "32"


def compiled(launch: Launch, arch: int) -> Compiled:
    """A recorded launch, compiled for sm_80 (arch 80), sm_90 (90), ...

    Raises:
        Exception: Triton or its assembler refuses it.
    """
    arguments = {
        name: value.stand_in() if isinstance(value, Place) else value for name, value in launch.arguments.items()
    }
    with _target(arch):
        made = launch.function.run(grid=launch.grid, warmup=True, **arguments)
    return _read(launch.kernel, made)


def _read(name: str, made: Any) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        assembly = _output(tools / "nvdisasm", "-c", cubin)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    instructions, loops = _parse(assembly)
    return Compiled(name, numbers["REG"], numbers["STACK"], made.metadata.shared, instructions, loops)


def _output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _parse(assembly: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The instructions of an assembly listing without predicates, and those of each loop."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(lines)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(re.sub(r"^@!?U?P\w+\s+", "", found.group(1).strip()))
    loops = []
    for index, text in enumerate(lines):
        target = re.search(r"^BRA.*`\((\.L_\w+)\)", text)
        if target and labels.get(target.group(1), index + 1) <= index:
            loops.append(tuple(lines[labels[target.group(1)] : index + 1]))
    # The last branch of a listing jumps to itself: it only fills up.
    return tuple(lines), tuple(loop for loop in loops if len(loop) > 1)
