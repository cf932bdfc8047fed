"""Safetensors files for authors of exporters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clt_plugins import Refused, read_tensor, tensor_shapes, write_tensors


def test_tensors_are_written_in_one_type_and_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    matrix = torch.arange(6, dtype=torch.float64).view(2, 3)
    write_tensors(path, {"matrix": matrix.T, "bias": torch.ones(4, requires_grad=True)}, "bfloat16")
    assert tensor_shapes(path) == {"matrix": [3, 2], "bias": [4]}
    assert torch.equal(read_tensor(path, "matrix"), matrix.T.to(torch.bfloat16))
    with pytest.raises(Refused, match=r"x\.safetensors: tensor 'other' cannot be read"):
        read_tensor(path, "other")


def test_a_missing_or_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"none\.safetensors: missing"):
        tensor_shapes(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"no")
    with pytest.raises(Refused, match=r"cut\.safetensors: not a readable safetensors file"):
        tensor_shapes(tmp_path / "cut.safetensors")
    with pytest.raises(Refused, match=r"cut\.safetensors: tensor 'x' cannot be read"):
        read_tensor(tmp_path / "cut.safetensors", "x")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing/x\.safetensors"):
        write_tensors(tmp_path / "missing/x.safetensors", {"x": torch.ones(1)}, "float32")
