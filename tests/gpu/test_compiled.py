"""Every Triton kernel of a training step compiles for A100 and H100 as it is launched: nothing spills, and rows are
loaded 16 bytes at a time."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from clt_plugins.registry.plugins import load_plugins
from tests.gpu.compiled import Compiled, compiled
from tests.gpu.count import Launch, Place
from tests.gpu.shapes import counted, shapes

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="triton's assembler for GPUs is for x86-64"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

ROWS = {"adam", "decode", "gradients", "pieces"}
"""Kernels that read rows of a weight or of activations."""

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}


def _distinct(launches: list[Launch]) -> Iterator[Launch]:
    """One launch of each that Triton compiles anew."""
    seen = set()
    for launch in launches:
        key = launch.kernel, *sorted((name, _kind(value)) for name, value in launch.arguments.items())
        if key not in seen:
            seen.add(key)
            yield launch


def _kind(value: Any) -> str:
    """What Triton distinguishes by."""
    if isinstance(value, Place):
        return f"{value.dtype} {value.offset % 16}"
    if isinstance(value, int) and not isinstance(value, bool):
        return "1" if value == 1 else f"int {value % 16 == 0} {value < 2**31}"
    return str(value)


@lru_cache(maxsize=8)
def _kernels(shape: str, architecture: str) -> list[Compiled]:
    launches = counted(shapes()[shape], load_plugins()).count.launched
    return [compiled(launch, ARCHITECTURES[architecture]) for launch in _distinct(launches)]


def _assert_fast(kernels: list[Compiled], *, wide: bool) -> None:
    assert kernels and (not wide or ROWS & {one.kernel for one in kernels})
    for one in kernels:
        assert not one.stack and not one.spills(), f"{one.kernel}: {one.stack} bytes of a thread spill"
        if wide and one.kernel in ROWS:
            assert one.loads()["128"], f"{one.kernel} loads rows by {dict(one.loads())} bits"


def test_the_kernels_of_gpt2_compile_for_an_h100():
    _assert_fast(_kernels("G k 600", "sm_90"), wide=True)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", ["G k 600", "M/8", "S"])
def test_all_kernels_compile(shape, architecture):
    # The quickstart's rows are too short for 16 bytes of each thread.
    _assert_fast(_kernels(shape, architecture), wide=shape != "S")


def test_a_spill_would_be_seen():
    """The parser on a listing like nvdisasm's."""
    from tests.gpu.compiled import _parse

    listing = """
    .L_x_1:
            /*0050*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
            /*0060*/              @!P0 STL [R1+0x8], R4 ;
            /*0070*/               @P1 BRA `(.L_x_1) ;
            /*0080*/                   EXIT ;
    .L_x_2:
            /*0090*/                   BRA `(.L_x_2);
    """
    instructions, loops = _parse(listing)
    kernel = Compiled("example", 32, 8, 0, instructions, loops)
    assert kernel.spills() == 1 and kernel.loads() == {"128": 1}
    assert [len(loop) for loop in loops] == [3]
