"""Tensors cut among ranks, read back whole or in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clt_plugins import Single
from clt_plugins.files.sliced import SlicedTensors, put_tensors

F = 11
AXES = {"rows": 0, "columns": 1, "shared": None, "number": None}


class Rank(Single):
    """One of several ranks that share the features."""

    def __init__(self, rank: int, ranks: int):
        super().__init__()
        self.rank = self.tensor_rank = rank
        self.world = self.tensor_ranks = ranks

    def shard(self, n_features: int) -> range:
        edges = [n_features * rank // self.tensor_ranks for rank in range(self.tensor_ranks + 1)]
        return range(edges[self.rank], edges[self.rank + 1])


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"rows": (F, 3), "columns": (2, F, 4), "shared": (5,), "number": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def put(folder: Path, ranks: int) -> SlicedTensors:
    for rank in range(ranks):
        parallel = Rank(rank, ranks)
        owned = parallel.shard(F)
        own = {
            name: value if AXES[name] is None else value.narrow(AXES[name], owned.start, len(owned))
            for name, value in tensors().items()
        }
        put_tensors(folder, "t", own, AXES, parallel, F)
    return SlicedTensors.find(folder, "t")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_part_can_be_read_whatever_number_of_ranks_wrote(ranks, tmp_path):
    stored = put(tmp_path, ranks)
    assert len(list(tmp_path.iterdir())) == ranks
    for name, value in tensors().items():
        assert stored.shapes[name] == list(value.shape)
        assert torch.equal(stored.read(name), value)
        axis = AXES[name]
        if axis is None:
            continue
        for start in range(F):
            for stop in range(start + 1, F + 1):
                part = stored.read_part(name, axis, range(start, stop))
                assert torch.equal(part, value.narrow(axis, start, stop - start)), (name, start, stop)


def test_a_missing_file_and_a_gap_are_named(tmp_path):
    put(tmp_path, 3)
    (tmp_path / "t-00001-of-00003.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=rf"^{tmp_path}: 2 slices of t of 3: the folder is not complete"):
        SlicedTensors.find(tmp_path, "t")
    (tmp_path / "t-00001-of-00003.safetensors").write_bytes((tmp_path / "t-00002-of-00003.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"slices of tensor '\w+' leave a gap: the folder is not complete"):
        SlicedTensors.find(tmp_path, "t")
    (tmp_path / "t-00001-of-00003.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match=r"t-00001-of-00003\.safetensors: not a readable safetensors file"):
        SlicedTensors.find(tmp_path, "t")
    with pytest.raises(ValueError, match=r"u\.safetensors: not a readable safetensors file"):
        SlicedTensors.find(tmp_path, "u")
