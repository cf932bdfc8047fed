"""Which kernels serve which device; and Triton's kernels under its interpreter.

The conformance kit, in tests/kit, shows that the other kernels compute the right numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clt_plugins import Preferred
from clt_plugins.model.devices import make_kernels
from clt_plugins.registry.plugins import load_plugins


def test_numba_refuses_a_gpu():
    with pytest.raises(ValueError, match="CPU only"):
        make_kernels("numba", torch.device("cuda"), load_plugins())


def test_triton_refuses_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA GPUs only"):
        make_kernels("triton", torch.device("cpu"), load_plugins())


def test_auto_takes_numba_on_a_cpu():
    assert make_kernels("auto", torch.device("cpu"), load_plugins()).name == "numba"


def test_each_kind_of_kernels_says_how_well_it_suits_a_device():
    for name in ("torch", "numba"):
        assert isinstance(make_kernels(name, torch.device("cpu"), load_plugins()), Preferred)


@pytest.mark.parametrize("file", ["triton_interpreted.py", "triton_select_interpreted.py"])
def test_triton_computes_the_right_numbers_under_its_interpreter(file):
    """In its own process, because Triton looks for the interpreter once, when it is first imported."""
    _interpreted(file)


@pytest.mark.slow
def test_triton_selects_every_kind_of_numbers_under_its_interpreter():
    _interpreted("triton_select_interpreted.py", "-m", "slow")


def _interpreted(file: str, *options: str) -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(root / "tests" / "support" / file),
            *options,
        ],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
