"""Which kernels serve which device. That they compute the right thing is shown by the conformance kit, in tests/kit."""

from __future__ import annotations

import pytest
import torch

from clt_plugins.loading import load
from clt_plugins.setup import make_kernels


def test_numba_refuses_a_gpu():
    with pytest.raises(ValueError, match="CPU only"):
        make_kernels("numba", torch.device("cuda"), load())


def test_triton_refuses_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA GPUs only"):
        make_kernels("triton", torch.device("cpu"), load())


def test_auto_takes_numba_on_a_cpu():
    assert make_kernels("auto", torch.device("cpu"), load()).name == "numba"
