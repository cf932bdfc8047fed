"""What a user reads when a file is hostile or the machine is at its end: one line that is not too long."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from click.testing import CliRunner

from clt_plugins.cli.main import Commands, main_group
from clt_plugins.errors import PluginError, Refused
from clt_plugins.files import folders, sliced, tensors
from clt_plugins.registry.build import naming_plugins
from clt_plugins.registry.plugins import load_plugins
from tests.support.helpers import parts


def test_a_fault_of_millions_of_characters_is_cut() -> None:
    said = str(Refused("transcoder.features", "got " + "9" * 5_000_000))
    assert said.startswith("transcoder.features: got 999") and len(said) < 1100


ODD = """
import click
from clt_plugins.__main__ import main
from clt_plugins.cli.main import main_group
main_group.command("odd")(lambda: [click.echo("a\\ud800b", err=err) for err in (False, True)])
main()
"""


def test_a_text_that_no_encoding_knows_is_shown_by_its_numbers() -> None:
    """As JSON of strangers may hold it: half of a pair of surrogates."""
    done = subprocess.run([sys.executable, "-c", ODD, "odd"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\\ud800b\n", "a\\ud800b\n")


def no_thread() -> None:
    raise RuntimeError("can't start new thread")


def no_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def of_hdf5() -> None:
    raise OSError("Can't read data (time = Fri\n, filename = 'x.h5')")


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (lambda: bytearray(2**62), "out of memory\n"),
        (no_memory, "out of memory: "),
        (of_hdf5, "Can't read data (time = Fri , filename = 'x.h5')"),
        (no_thread, "can't start new thread: the limit of memory or of threads is too low"),
    ],
)
def test_what_ends_a_command_is_told_in_one_line(fails: Callable[[], object], told: str) -> None:
    group = Commands("clt", commands={})
    group.command("big")(lambda: fails())
    ended = CliRunner().invoke(group, ["big"])
    assert ended.exit_code == 1 and ended.stderr.startswith(told) and ended.stderr.count("\n") == 1
    assert "-v shows where" not in ended.stderr


def test_a_fault_is_told_where_there_is_no_memory_for_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find the line in the recipe, modules are loaded."""
    file = tmp_path / "recipe.toml"
    file.write_text('name = "x"\n[source]\nname = "none"\n')

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("clt_plugins.cli.main._file_and_line", no_memory)
    ended = CliRunner().invoke(main_group, ["validate", str(file)])
    assert ended.exit_code == 2 and "source: " in ended.stderr and "Traceback" not in ended.stderr


def test_a_command_that_cannot_even_tell_its_error_says_that_memory_is_out() -> None:
    code = """
import clt_plugins.cli.main as module
from clt_plugins.__main__ import main

def no_memory(*_):
    raise MemoryError

module.exhausted = no_memory
module.main_group.command("big")(no_memory)
main()
"""
    ended = subprocess.run([sys.executable, "-c", code, "big"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, "out of memory\n")


def other() -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("fails", "error"), [(other, PluginError), (no_memory, RuntimeError), (no_thread, RuntimeError)]
)
def test_a_machine_at_its_end_is_no_bug_of_a_plugin(fails: Callable[[], object], error: type[Exception]) -> None:
    here = attrs.evolve(load_plugins().infos[0], file=__file__, status="active")
    with pytest.raises(error) as raised, naming_plugins([here]):
        fails()
    assert type(raised.value) is error


@pytest.mark.parametrize(
    ("name", "number"),
    [("W_enc", torch.nan), ("b_dec", -torch.inf), ("log_threshold", torch.nan), ("log_threshold", torch.inf)],
)
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, name: str, number: float) -> None:
    transcoder = parts(activation={"name": "jumprelu"}).transcoder
    transcoder.tensors()[name].view(-1)[0] = number
    transcoder.save(tmp_path / "t")
    with pytest.raises(Refused, match=rf"t: tensor '{name}' holds numbers that are not finite"):
        type(transcoder).load(tmp_path / "t")


def test_a_threshold_of_zero_is_a_threshold(tmp_path: Path) -> None:
    transcoder = parts(activation={"name": "jumprelu"}).transcoder
    transcoder.activation.set_threshold(torch.zeros_like(transcoder.activation.threshold()))
    transcoder.save(tmp_path / "t")
    assert not bool(type(transcoder).load(tmp_path / "t").activation.threshold().any())


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
