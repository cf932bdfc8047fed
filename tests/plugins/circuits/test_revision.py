"""A language model at a revision of the hub: circuit-tracer gets that one, not the newest."""

from __future__ import annotations

from pathlib import Path

import pytest

from clt_circuits.stage import at_revision, language_model
from tests.plugins.hub.conftest import hub  # noqa: F401 - a fixture
from tests.support.helpers import parts
from tests.support.hub.repositories import Repository
from tests.support.hub.small import add


def test_the_revision_of_the_recipe_is_loaded(hub, tmp_path, monkeypatch):  # noqa: F811
    hub.repositories["user/model"] = repository = Repository()
    for branch, files in {
        "main": {"config.json": b'{"step": 9}', "model.safetensors": b"newest", "onnx/model.onnx": b"other"},
        "step3": {"config.json": b'{"step": 3}', "model.safetensors": b"older"},
        "bin": {"config.json": b"{}", "pytorch_model.bin": b"pickled"},
    }.items():
        if branch == "bin":
            repository.commits[repository.branches["main"]] = {}
        add(repository, files, branch)
    transcoder = parts().transcoder
    monkeypatch.setattr(transcoder, "model_described", lambda: {"path": "user/model", "revision": "step3"})
    name, revision = language_model(transcoder)
    assert revision is not None
    folder = Path(at_revision(name, revision))
    assert (folder / "config.json").read_text() == '{"step": 3}'
    assert (folder / "model.safetensors").read_bytes() == b"older"
    assert (Path(at_revision(name, "bin")) / "pytorch_model.bin").is_file()
    with pytest.raises(OSError, match=r"model\.path: user/model at revision gone cannot be had from the hub: "):
        at_revision(name, "gone")
    monkeypatch.setattr(transcoder, "model_described", lambda: {"path": str(tmp_path), "revision": "step3"})
    assert language_model(transcoder) == (str(tmp_path), None)
