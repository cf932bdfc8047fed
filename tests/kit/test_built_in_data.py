"""The conformance kit on the built-in sources, on transforms, and on what collects where features are active."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from clt_plugins.testing import Case, parametrize
from tests.support.serving import Serving
from tests.support.stored_data import write_numbered

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "stdlib-gpt2"


@parametrize("synthetic", settings={"synthetic": {"layers": 2, "d_model": 5, "features": 9, "noise": 0.1}})
def test_synthetic(case: Case) -> None:
    case.run()


@parametrize(
    "planted",
    settings={
        "planted": [
            {"layers": 2, "d_model": 9, "chains": 7, "noise": 0.1},
            {"hops": 3, "gates": ["and", "or", "and_not"], "consume": True, "activity": "hierarchical", "norms": 10.0},
            {"activity": "correlated"},
        ],
        "recovery": {"tokens": 64},
    },
    recipe={"source": {"name": "planted", "d_model": 6, "chains": 4, "hops": 2, "active": 2.0}},
)
def test_planted(case: Case) -> None:
    case.run()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of different lengths, no two with a line in common."""
    file = tmp_path_factory.mktemp("text") / "documents.jsonl"
    words = [[f"number_{doc}_{word} = {doc * word}" for word in range(5 + doc % 17)] for doc in range(120)]
    file.write_text("\n".join(json.dumps({"text": "\n".join(lines)}) for lines in words))
    return file


@parametrize(
    "stream",
    settings={"stream": {"text": "documents.jsonl", "context": 16, "model_batch": 2, "buffer_tokens": 48}},
    recipe={"model": {"path": str(MODEL)}},
)
def test_stream(case: Case, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    case.run()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the data set `data`."""
    folder = tmp_path_factory.mktemp("stored")
    write_numbered(folder / "data", [90, 70, 60], held_out=40)
    return folder


@pytest.fixture(scope="module")
def served(stored: Path) -> Iterator[str]:
    """The address of a server of that data set."""
    server = Serving(stored)
    yield server.url
    server.stop()


@parametrize(
    "datasets",
    settings={
        "local": {"path": "data", "buffer_tokens": 64},
        "remote": {"url": "http://127.0.0.1:9", "dataset": "data", "buffer_tokens": 64},
    },
)
def test_datasets(case: Case, stored: Path, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    if case.choice == "remote":  # its port is known only now
        case = attrs.evolve(case, settings={**case.settings, "url": served})
    case.run()


@parametrize("transforms", settings={"drop_outliers": {"factor": 1.25}, "drop_tokens": {"ids": [3, 4, 5, 6, 7]}})
def test_transforms(case: Case) -> None:
    case.run()


@parametrize(
    "collect",
    settings={"collect": {"tokens": 60, "top": 3, "groups": 2, "per_group": 2, "window": 2}},
    recipe={
        "model": {"path": str(MODEL)},
        "source": {
            "name": "stream", "text": "documents.jsonl", "context": 16, "model_batch": 2, "buffer_tokens": 48,
            "held_out": 0.3,
        },
    },
)  # fmt: skip
def test_collect(case: Case, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(text.parent)
    case.run()
