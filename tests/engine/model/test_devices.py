"""Which device a run takes, with a stand-in for a machine with GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clt_plugins import CrossLayerTranscoder, Refused
from clt_plugins.model import devices
from clt_plugins.model.assemble import assemble
from tests.support.helpers import plugins, recipe


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with GPUs, as torch shows it; the list is of what was made the current one."""
    made: list[torch.device] = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    return made


@pytest.mark.parametrize(
    "name, local_rank, expected",
    [
        ("cuda:1", None, "cuda:1"),
        ("cuda:1", "0", "cuda:1"),
        ("auto", None, "cuda:0"),
        ("auto", "3", "cuda:3"),
        ("cuda", "2", "cuda:2"),
    ],
)
def test_a_gpu_becomes_the_current_one(monkeypatch, current, name, local_rank, expected):
    # Triton launches on the current device: with another one, kernels would get addresses of another GPU.
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    device = devices.make_device(name)
    assert device == torch.device(expected)
    assert current == [device]


def test_a_cpu_leaves_the_gpus_alone(current):
    assert devices.make_device("cpu") == torch.device("cpu")
    assert not current


def test_auto_without_a_gpu_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.make_device("auto") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.device_count() > 99:
        pytest.skip("this machine has it")
    with pytest.raises(Refused, match=r"^transcoder\.device: 'cuda:99' cannot be used here"):
        devices.make_device("cuda:99")


def test_a_saved_transcoder_is_loaded_onto_a_device_that_becomes_the_current_one(monkeypatch, tmp_path):
    assemble(recipe(), device=torch.device("cpu")).transcoder.save(tmp_path / "transcoder")
    asked: list[Any] = []
    monkeypatch.setattr(
        "clt_plugins.model.saved.load.make_device", lambda name: asked.append(name) or torch.device("cpu")
    )
    CrossLayerTranscoder.load(tmp_path / "transcoder", device="cuda:1")
    assert asked == ["cuda:1"]


def test_two_ranks_of_a_machine_on_one_gpu_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    choice = plugins().pick("parallel", "tensor")
    context = devices.bare_context(torch.device("cuda:0"))
    with pytest.raises(Refused, match=r'^transcoder\.device: local rank 1 cannot use cuda:0: use "auto"'):
        choice.spec.build(choice.spec.config(), context)
