"""What a user reads when a file is hostile or the machine is at its end: one line that is not too long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from clt_plugins.cli.main import Commands
from clt_plugins.errors import Refused
from clt_plugins.files import folders, sliced, tensors
from tests.support.helpers import parts


def test_a_fault_of_millions_of_characters_is_cut() -> None:
    said = str(Refused("transcoder.features", "got " + "9" * 5_000_000))
    assert said.startswith("transcoder.features: got 999") and len(said) < 1100


def test_a_command_without_memory_says_so_in_one_line() -> None:
    group = Commands("clt", commands={})

    @group.command()
    def big() -> None:
        raise MemoryError

    ended = CliRunner().invoke(group, ["big"])
    assert (ended.exit_code, ended.stderr) == (1, "out of memory\n")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    transcoder = parts().transcoder
    with torch.no_grad():
        transcoder.W_enc[0, 0, 0] = torch.nan
    transcoder.save(tmp_path / "t")
    with pytest.raises(Refused, match=r"t: tensor 'W_enc' holds numbers that are not finite"):
        type(transcoder).load(tmp_path / "t")


@pytest.mark.parametrize(
    "read",
    [folders.read_tensors, tensors.tensor_shapes, lambda path: tensors.read_tensor(path, "x"), sliced._opened],
)
def test_tensors_that_cannot_be_mapped_are_refused_by_the_files_name(read, tmp_path: Path, monkeypatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("unable to open file: Input/output error (5)")

    for module in (folders, tensors, sliced):
        monkeypatch.setattr(module, "safe_open", failing)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(Refused, match=r"x\.safetensors: .*Input/output error"):
        read(tmp_path / "x.safetensors")
