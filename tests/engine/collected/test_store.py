"""A store is read as it was written; what is damaged, or cannot be true, is refused and names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from clt_plugins import Collected, CollectedText, CollectedWriter, Refused
from tests.support.collected import EMOJI, HOSTILE, make_store


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "collected"
    make_store(folder)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "collected"))


def test_examples_fit_together(made: Path) -> None:
    store = Collected.open(made)
    settings = store.info.settings
    seen = 0
    for layer in range(store.info.n_layers):
        arrays = store.layer(layer)
        assert np.array_equal(store.density(layer), arrays["active"] / store.info.tokens)
        for feature in range(store.info.n_features):
            examples = store.examples(layer, feature)
            assert len(examples.top) == min(settings.top, arrays["active"][feature])
            assert [one.row for one in examples.top] == [row for row in arrays["top_row"][feature] if row >= 0]
            for one in [*examples.top, *(one for group in examples.groups for one in group)]:
                seen += 1
                assert one.values[one.row - one.start] == one.value
                assert one.row - one.start <= settings.window
                assert one.stop - one.row <= settings.window + 1
                assert len(set(store.text.context[one.start : one.stop])) == 1
                assert one.values.max() <= arrays["maximum"][feature]
            assert all(len(group) <= settings.per_group for group in examples.groups)
    assert seen > 100


def test_arrays_cannot_be_written_to(made: Path) -> None:
    arrays = Collected.open(made).layer(0)
    assert arrays
    for array in arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_hostile_tokens_are_bytes(made: Path) -> None:
    store = Collected.open(made)
    assert store.spell(store.ids[: len(HOSTILE)]) == HOSTILE
    emoji = HOSTILE.index(EMOJI[:2])
    assert store.show(emoji, emoji + 3) == EMOJI.decode()
    assert store.show(emoji, emoji + 1) == "\ufffd"


def test_neighbours_end_where_the_position_does_not_go_on() -> None:
    context = np.array([0, 0, 0, 0, 4, 4, 4])
    position = np.array([1, 2, 4, 5, 1, 2, 3])
    text = CollectedText(np.arange(7), context, position)
    start, stop = text.around(np.arange(7), 1, 2)
    assert start.tolist() == [0, 0, 2, 2, 4, 4, 5]
    assert stop.tolist() == [2, 2, 4, 4, 7, 7, 7]
    start, stop = text.contexts_of(np.array([2, 6]))
    assert (start.tolist(), stop.tolist()) == ([0, 4], [4, 7])


def test_layers_and_features_that_are_not_there(made: Path) -> None:
    store = Collected.open(made)
    with pytest.raises(IndexError, match="no layer 2"):
        store.layer(2)
    with pytest.raises(IndexError, match="no feature -1"):
        store.examples(0, -1)


def test_a_writer_refuses_what_the_schema_does_not_have(made: Path, tmp_path: Path) -> None:
    store = Collected.open(made)
    names = load_file(made / "features_00.safetensors")
    writer = CollectedWriter(tmp_path, store.info)
    for wrong, text in (
        ({name: one for name, one in names.items() if name != "mean"}, "mean is missing"),
        (names | {"more": names["mean"]}, "there is no more in a store"),
        (names | {"mean": names["mean"][1:]}, "mean is float32 of shape 23, expected float32 of 24"),
        (names | {"top_row": names["top_row"].astype(np.int64)}, "top_row is int64"),
    ):
        with pytest.raises(ValueError, match=text):
            writer.features(0, wrong)


def test_without_a_spelling_tokens_are_numbers(made: Path, tmp_path: Path) -> None:
    store = Collected.open(made)
    writer = CollectedWriter(tmp_path, store.info)
    writer.text(store.text.ids, store.text.context, store.text.position)
    writer.finish(None)
    words = load_file(tmp_path / "vocabulary.safetensors")
    assert words["bytes"].tobytes().startswith(b"<0><1><2>")


def tensors(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damage that changes arrays of a file."""

    def damage(folder: Path) -> None:
        arrays = load_file(folder / file)
        change(arrays)
        save_file(arrays, folder / file)

    return damage


def info(**changes: Any) -> Callable[[Path], None]:
    """Damage that changes `collected.json`."""

    def damage(folder: Path) -> None:
        record = json.loads((folder / "collected.json").read_text())
        (folder / "collected.json").write_text(json.dumps(record | changes))

    return damage


def put(name: str, index: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][index] = value

    return change


LAYER, TEXT, WORDS, GEOMETRY = (f"{name}.safetensors" for name in ("features_01", "text", "vocabulary", "geometry_01"))
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a row beyond the text": (tensors(LAYER, put("top_row", (0, 0), 600)), "top_row must be from -1 to 599"),
    "a negative row": (tensors(LAYER, put("group_row", (0, 0, 0), -2)), "group_row must be"),
    "a feature that is not there": (tensors(LAYER, put("coactive", (0, 0), 48)), "coactive must be from -1 to 47"),
    "windows of others": (tensors(LAYER, put("window_start", 3, 10**9)), "window_start and window_count"),
    "negative windows": (tensors(LAYER, put("window_count", (2, 0), -1)), "window_start and window_count"),
    "a far window": (tensors(LAYER, put("window_offset", 0, 30000)), "window_offset reaches beyond 5"),
    "not a number": (tensors(LAYER, put("mean", 0, np.nan)), "mean has numbers that are not finite"),
    "infinite": (tensors(GEOMETRY, put("norms", (0, 0), np.inf)), "norms has numbers that are not finite"),
    "a similar one that is not there": (tensors(GEOMETRY, put("similar", (0, 0), 1000)), "similar must be"),
    "a missing array": (tensors(LAYER, lambda arrays: arrays.pop("active")), "active is missing"),
    "unsorted text": (tensors(TEXT, put("context", 5, 7)), "its rows are not sorted"),
    "a negative token": (tensors(TEXT, put("ids", 5, -1)), "ids below 0"),
    "bytes that are not there": (tensors(WORDS, put("start", -1, 10**12)), "start does not divide bytes"),
    "tokens that are not sorted": (tensors(WORDS, put("token", 0, 99)), "its tokens are not sorted"),
    "other sizes": (info(n_features=10**9), r"active is int64 of shape 24, expected int64 of 1000000000"),
    "a negative size": (info(tokens=-1), "tokens is -1"),
    "descending edges": (info(edges=[1.0, 0.5]), "edges must be ascending"),
    "another format": (info(format=2), "written in format 2"),
    "an unknown key": (info(more=1), "more"),
    "no safetensors": (lambda folder: (folder / LAYER).write_bytes(b"\xff" * 100), "not a readable safetensors"),
    "a huge header": (
        lambda folder: (folder / LAYER).write_bytes((2**60).to_bytes(8, "little") + b"{}"),
        "not a readable safetensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_without_checksums_too(store: Path, name: str) -> None:
    """Whoever writes a hostile store writes its checksums too."""
    damage, text = DAMAGES[name]
    damage(store)
    with pytest.raises(ValueError, match=text):  # noqa: PT012 - the one or the other
        opened = Collected.open(store, checksums=False)
        opened.layer(1)


def test_checksums_find_any_change(store: Path) -> None:
    data = bytearray((store / LAYER).read_bytes())
    data[-1] ^= 1
    (store / LAYER).write_bytes(data)
    with pytest.raises(Refused, match="its checksum is not the one"):
        Collected.open(store)


def test_what_is_no_store(store: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no collected\.json in it: make it with"):
        Collected.open(tmp_path)
    (store / TEXT).unlink()
    os.mkfifo(store / TEXT)  # reading it would wait for ever
    with pytest.raises(Refused, match="missing"):
        Collected.open(store)


def test_windows_beyond_their_context_are_refused(store: Path) -> None:
    def beyond(arrays: dict[str, Any]) -> None:
        # The first example of the first feature that has one, put at the first row: its window has no rows before it.
        feature = int(np.flatnonzero(arrays["active"])[0])
        arrays["top_row"][feature, 0] = 0
        arrays["window_offset"][arrays["window_start"][feature]] = -1

    tensors("features_00.safetensors", beyond)(store)
    opened = Collected.open(store, checksums=False)
    feature = int(np.flatnonzero(opened.layer(0)["active"])[0])
    with pytest.raises(Refused, match="window beyond its context"):
        opened.examples(0, feature)


def test_a_store_has_the_same_bytes_each_time(made: Path, tmp_path: Path) -> None:
    make_store(tmp_path / "again")
    assert all((tmp_path / "again" / path.name).read_bytes() == path.read_bytes() for path in made.iterdir())
    other = make_store(tmp_path / "other", layers=1, features=3, geometry=False, thresholds=False, hostile=False)
    assert attrs.asdict(other)["features"] == 3
    assert "threshold" not in Collected.open(tmp_path / "other").layer(0)
