"""Documents: what is read from where, in which order, and how the held-out part is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from clt_plugins import Refused
from clt_stream import StreamConfig
from clt_stream.text import open_texts
from clt_stream.text.documents import Texts
from clt_stream.text.stdlib import python_stdlib

TEXTS = [f"document {n}\n\nof two paragraphs" for n in range(200)]


def write(folder: Path, kind: str, texts: list[str] = TEXTS) -> Path:
    """The texts as one file, or as a folder of text files."""
    if kind == "txt":
        folder.mkdir(exist_ok=True)
        for n, text in enumerate(texts):
            (folder / f"{n:03}.txt").write_text(text)
        return folder
    path = folder / f"text.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)))
    else:
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return path


def epoch(texts: Texts) -> list[str]:
    found = []
    while (document := texts.next()) is not None:
        found.append(document[1])
    return found


def opened(path: Path | str, seed: int = 0, **config: Any) -> Texts:
    return open_texts(StreamConfig(text=str(path), **config), seed)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_document_comes_once_in_an_epoch(kind: str, streaming: bool, tmp_path: Path) -> None:
    texts = opened(write(tmp_path / "t" if kind == "txt" else tmp_path, kind), streaming=streaming)
    first, second = epoch(texts), epoch(texts)
    assert sorted(first) == sorted(second) == sorted(TEXTS)
    assert (first == second) == streaming


@pytest.mark.parametrize(("sample_by", "count"), [("document", 200), ("paragraph", 400), ("line", 600)])
def test_text_files_are_cut_into_documents_as_asked(sample_by: str, count: int, tmp_path: Path) -> None:
    path = write(tmp_path / "t", "txt")
    assert len(epoch(opened(path, sample_by=sample_by))) == count


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mark_leads_back_to_its_place(streaming: bool, tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    texts = opened(path, streaming=streaming)
    marks, found = [], []
    for _ in range(450):
        marks.append(json.dumps(texts.mark()))
        found.append(texts.next())
    for place in (0, 1, 63, 64, 199, 200, 201, 402):
        other = opened(path, streaming=streaming)
        other.next()
        other.seek(json.loads(marks[place]))
        assert [other.next() for _ in range(40)] == found[place : place + 40]


def test_orders_depend_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl")
    assert epoch(opened(path, seed=1)) == epoch(opened(path, seed=1))
    assert epoch(opened(path, seed=1)) != epoch(opened(path, seed=2))


def test_equal_documents_have_one_identity_and_others_do_not(tmp_path: Path) -> None:
    texts = opened(write(tmp_path, "jsonl", ["one", "two", "one"]), streaming=True)
    identities = [texts.next() for _ in range(3)]
    assert identities[0] == identities[2] != identities[1]


def test_the_standard_library_needs_no_files() -> None:
    texts = opened("python-stdlib")
    assert {texts.next() for _ in range(20)} <= set(python_stdlib())


def test_a_column_of_another_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"body": "words"}\n{"body": null}\n')
    assert sorted(epoch(opened(tmp_path / "t.jsonl", text_column="body"))) == ["", "words"]


def refused(path: Path | str, message: str, **config: Any) -> None:
    with pytest.raises(Refused, match=message) as raised:
        epoch(opened(path, **config))
    assert len(str(raised.value).splitlines()) == 1


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.jsonl", r"^source\.text: no file or folder '.*none\.jsonl'$")


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"")
    refused(tmp_path, r"^source\.text: no \.txt, \.jsonl, \.parquet files in '.*'$")


def test_a_folder_of_two_kinds(tmp_path: Path) -> None:
    write(tmp_path, "jsonl")
    (tmp_path / "more.txt").write_text("text")
    refused(tmp_path, r"^source\.text: '.*' mixes \.jsonl and \.txt files: put each kind in its own folder$")


def test_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "text.doc").write_text("text")
    refused(tmp_path / "text.doc", r"^source\.text: '.*text\.doc': expected one of \.txt, \.jsonl, \.parquet$")


def test_a_missing_column(tmp_path: Path) -> None:
    message = r"^source\.text_column: '.*' has no column 'body' \(it has: text, n\)$"
    refused(write(tmp_path, "jsonl"), message, text_column="body")
    refused(write(tmp_path, "jsonl"), message, text_column="body", streaming=True)


def test_a_column_of_numbers(tmp_path: Path) -> None:
    refused(write(tmp_path, "jsonl"), r"^source\.text_column: column 'n' of '.*' holds int, not text", text_column="n")


def test_lines_that_are_not_json(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": \n')
    refused(tmp_path / "t.jsonl", r"^source\.text: cannot read .*t\.jsonl: .+")
    refused(tmp_path / "t.jsonl", r"^source\.text: cannot read .*t\.jsonl: .+", streaming=True)


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet")
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, r"^source\.text: cannot read .*text\.parquet: .+")


def test_a_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"caf\xe9")
    refused(tmp_path / "t.txt", r"^source\.text: cannot read .*t\.txt: .+")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("")
    refused(tmp_path / "t.jsonl", r"^source\.text: '.*t\.jsonl' is empty$")


def test_a_hub_data_set_while_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused("nobody/nothing", r"^source\.text: cannot get 'nobody/nothing': .+'python-stdlib'\)$")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_subset_or_split_that_a_hub_data_set_does_not_have(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a card stands in for the hub; `datasets` reads the subsets of both from the card."""
    for name in ("one", "two"):
        (tmp_path / "repository" / name).mkdir(parents=True)
        write(tmp_path / "repository" / name, "jsonl")
    subsets = "".join(f"- config_name: {name}\n  data_files: {name}/text.jsonl\n" for name in ("one", "two"))
    (tmp_path / "repository" / "README.md").write_text(f"---\nconfigs:\n{subsets}---\n")
    load = datasets.load_dataset_builder

    def from_folder(_: str, *arguments: Any, **settings: Any) -> Any:
        return load(str(tmp_path / "repository"), *arguments, **settings)

    monkeypatch.setattr(datasets, "load_dataset_builder", from_folder)
    assert sorted(epoch(opened("org/data", subset="one", streaming=streaming))) == sorted(TEXTS)
    refused("org/data", r"^source\.subset: cannot load 'org/data': .*'one', 'two'", streaming=streaming)
    refused("org/data", r"^source\.subset: cannot load 'org/data': .*three.*'one', 'two'", subset="three")
    message = r"^source\.split: cannot load 'org/data': .*test.*train"
    refused("org/data", message, subset="one", split="test", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_nulls_of_a_hub_data_set_are_counted_and_it_has_an_identity(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder stands in for the hub."""
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    load = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: load("json", data_files=str(tmp_path / "t.jsonl")))
    texts = opened("org/data", streaming=streaming)
    assert sorted(epoch(texts)) == ["", "one", "two"]
    assert "source.text: 1 of 3 documents are null" in caplog.text
    assert texts.identity().startswith("revision ")
    assert texts.identity() == texts.again(1).identity()
