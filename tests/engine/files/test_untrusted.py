"""What is there in place of a file is refused: a result would differ in silence without it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clt_plugins import CrossLayerTranscoder, Refused, has_file, identify, load_json, load_plugins
from clt_plugins.finished.curves import read_curves
from clt_plugins.finished.find import find_trained
from clt_plugins.finished.inspect import inspect_transcoder
from clt_plugins.model.assemble import assemble
from tests.support.helpers import recipe


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def test_a_file_is_there_or_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert has_file(tmp_path / "file") and has_file(tmp_path / "link")
    assert not has_file(tmp_path / "none") and not has_file(tmp_path / "no folder" / "none")
    assert not has_file(tmp_path / "file" / "none")


def test_what_fails_while_a_file_is_read_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own error names a file only when it is opened."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n')

    class Failing(io.BytesIO):
        def readline(self, *_: Any) -> bytes:
            raise OSError(5, "Input/output error")

        read = readline

    monkeypatch.setattr(os, "fdopen", lambda handle, _: os.close(handle) or Failing())
    for read in (read_curves, load_json):
        with pytest.raises(OSError, match=r"metrics\.jsonl: cannot be read: Input/output error"):
            read(file)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to_nothing])
def test_what_is_there_in_place_of_a_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "manifest.json")
    with pytest.raises(Refused, match=r"manifest\.json: not a regular file"):
        has_file(tmp_path / "manifest.json")
    # Without its manifest, a transcoder of ours would be one of which nothing is known.
    with pytest.raises(Refused, match=r"manifest\.json: not a regular file"):
        identify(tmp_path)


def test_a_folder_of_another_tool_that_cannot_be_read_is_not_called_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / name).touch()

    def refused(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(Refused, match="not a transcoder"):
        CrossLayerTranscoder.load(tmp_path)
    monkeypatch.setattr("clt_plugins.files.untrusted.open_regular", refused)
    with pytest.raises(PermissionError, match=r"cfg\.json"):
        CrossLayerTranscoder.load(tmp_path)


@pytest.mark.parametrize("damaged", ["converted", "transcoder"])
def test_a_folder_that_lacks_its_description_is_not_passed_over(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "recipe.toml").touch()
    for name in ("converted", "transcoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "transcoder.json").write_text("{}")
    (tmp_path / damaged / "transcoder.json").unlink()
    with pytest.raises(Refused, match=rf"{damaged}/transcoder\.json: missing"):
        find_trained(tmp_path, load_plugins())
    (tmp_path / damaged).rmdir()
    (tmp_path / damaged).symlink_to("nowhere")
    with pytest.raises(Refused, match=rf"{damaged}/transcoder\.json: missing"):
        find_trained(tmp_path, load_plugins())


@pytest.mark.parametrize("name", ["transcoder.json", "transcoder.safetensors"])
def test_a_manifest_that_leaves_a_file_of_the_transcoder_out_is_damaged(tmp_path: Path, name: str) -> None:
    """Its checksum would not be compared, and results would not name the weights that they are of."""
    assemble(recipe()).transcoder.save(tmp_path / "t")
    manifest = tmp_path / "t" / "manifest.json"
    listed = json.loads(manifest.read_text())
    del listed["files"][name]
    manifest.write_text(json.dumps(listed))
    for read in (CrossLayerTranscoder.load, identify):
        with pytest.raises(Refused, match=r"manifest\.json: damaged: it lists no transcoder"):
            read(tmp_path / "t")
    told = inspect_transcoder(tmp_path / "t", load_plugins(), verify=True)
    assert any("it lists no transcoder" in fault for fault in told.faults)
