"""What is there in place of a file is refused: a result would differ in silence without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from clt_plugins import CrossLayerTranscoder, Refused, has_file, identify, load_plugins
from clt_plugins.finished.find import find_trained


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def test_a_file_is_there_or_not(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    assert has_file(tmp_path / "file") and has_file(tmp_path / "link")
    assert not has_file(tmp_path / "none") and not has_file(tmp_path / "no folder" / "none")
    assert not has_file(tmp_path / "file" / "none")


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
