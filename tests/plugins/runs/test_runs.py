"""The command `runs`: what it says of runs in every state, of damaged folders, and of hundreds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clt_plugins import run
from clt_plugins.errors import Stopped
from clt_plugins.registry.plugins import load_plugins
from clt_runs.compare import flat
from clt_runs.find import RunState, find_runs
from clt_runs.table import age, size
from tests.support.commands import python, start
from tests.support.helpers import tables

INTERRUPTING = "tests.support.interrupting"
HOLD = "import sys; from pathlib import Path; from clt_plugins import Lock; "
HOLD += "print(Lock(Path(sys.argv[1])).try_acquire(), flush=True); sys.stdin.read()"


def by_name(folder: Path) -> dict[str, RunState]:
    return {one.name: one for one in find_runs(folder)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended and was evaluated; with what the report would have of a language model."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(tables(evaluate={"tokens": 64}), out=folder)
    report = folder / "evaluation/evaluation.json"
    with_model = {"tokens": 40, "ce_recovered": 0.75, "cross_entropy": {"model": 3.0, "zero": 5.0}}
    report.write_text(json.dumps(json.loads(report.read_text()) | {"model": with_model}))
    return folder


@pytest.fixture(scope="module")
def runs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in each state."""
    folder = tmp_path_factory.mktemp("states")
    shutil.copytree(finished, folder / "of a week/finished")
    stopping = tables(loggers=[{"name": "jsonl"}, {"name": "interrupt", "at": 6}], train={"log_every": 1})
    with pytest.raises(Stopped):
        run(stopping, out=folder / "interrupted", plugins=load_plugins(extra=[INTERRUPTING]))
    with pytest.raises(Stopped):
        run(tables(train={"lr": 1e30, "log_every": 1}), out=folder / "failed")
    (folder / "notes").mkdir()
    (folder / "notes/recipe.txt").write_text("no run")
    return folder


def test_the_states_of_runs_are_told_by_locks_and_files(runs: Path) -> None:
    found = by_name(runs)
    assert {name: one.status for name, one in found.items()} == {
        "of a week/finished": "ended",
        "interrupted": "interrupted",
        "failed": "failed",
    }
    assert "not finite" in found["failed"].detail
    assert not any(one.faults for one in found.values())


def test_a_run_is_running_while_its_process_has_the_lock_and_broken_off_when_that_dies(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    history = tmp_path / "run/history.jsonl"
    entry = json.loads(history.read_text())
    del entry["end"]
    history.write_text(json.dumps(entry) + "\n")
    assert by_name(tmp_path)["run"].status == "ended", "of a version that wrote no end"
    with start("-c", HOLD, tmp_path / "run/run.lock", stdin=-1) as other:
        assert other.stdout is not None and other.stdout.readline() == "None\n"
        assert (found := by_name(tmp_path)["run"]).status == "running"
        assert f"process {other.pid}" in found.detail
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert by_name(tmp_path)["run"].status == "broken off"


def test_numbers_are_those_of_the_run(finished: Path) -> None:
    (found,) = find_runs(finished)
    report = json.loads((finished / "evaluation/evaluation.json").read_text())
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert (found.step, found.steps, found.tokens) == (12, 12, 12 * 16)
    assert (found.nmse, found.l0, found.ce_recovered) == (report["nmse"], report["l0"], report["model"]["ce_recovered"])
    assert found.tokens_per_s == [one for one in logged if "time/tokens_per_s" in one][-1]["time/tokens_per_s"]
    assert found.size == sum(path.stat().st_size for path in finished.rglob("*") if path.is_file())
    assert found.age is not None and 0 <= found.age < 600
    assert found.name == "finished"


def test_without_an_evaluation_the_scores_are_the_last_of_training(runs: Path) -> None:
    found = by_name(runs)["interrupted"]
    logged = [json.loads(line) for line in (runs / "interrupted/metrics.jsonl").read_text().splitlines()]
    last = [one for one in logged if "eval/nmse" in one][-1]
    assert (found.nmse, found.l0, found.step) == (last["eval/nmse"], last["eval/l0"], 6)
    assert found.ce_recovered is None


DAMAGE: dict[str, Any] = {
    "recipe.toml": [b"\xff\xfe", b"= 3", b"a = " + b"[" * 5000, "fifo"],
    "history.jsonl": [b"{", b"[1]\n", b"\x00" * 100, b'{"end": 3}\n', "fifo"],
    "metrics.jsonl": [
        b"[1]\n",
        b"\xff\n",
        b'{"step": 1e999}\n',
        b'{"step": "a", "tokens": []}\n',
        b"[" * 9000 + b"\n",
        "fifo",
    ],
    "evaluation/evaluation.json": [b"[]", b"{}", b"", b'{"l0": 1, "model": 3}', b'{"l0": "x"}', "fifo"],
    "transcoder/transcoder.json": [b"", b"[]", b'{"step": {}}', "fifo"],
    "run.lock": [b"\x00", "fifo"],
}


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_leaves_columns_empty_and_breaks_nothing(file: str, finished: Path, tmp_path: Path) -> None:
    for number, content in enumerate(DAMAGE[file]):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        (folder / file).unlink(missing_ok=True)
        if content == "fifo":
            os.mkfifo(folder / file)
        else:
            (folder / file).write_bytes(content)
    text = python("-m", "clt_plugins", "runs", tmp_path)
    assert text.returncode == 0, text.stderr
    data = json.loads(python("-m", "clt_plugins", "runs", tmp_path, "--json").stdout)
    assert len(data) == len(DAMAGE[file])
    if file != "run.lock":
        assert data[0]["faults"][0].startswith(f"{file}: ")
        assert data[0]["faults"][0] in text.stdout
    assert all(one["size"] > 0 and one["status"] for one in data)


def test_results_of_a_run_are_no_runs(finished: Path, tmp_path: Path) -> None:
    """What `push` wrote has a recipe.toml: it was listed as a run that is broken off."""
    shutil.copytree(finished, tmp_path / "run")
    for name in ("recipe.toml", "versions.json"):
        target = tmp_path / "run/sent/hub/contents" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(finished / name, target)
    shutil.copy(finished / "transcoder/manifest.json", tmp_path / "run/sent/hub/manifest.json")
    assert list(by_name(tmp_path)) == ["run"]


def test_names_do_not_reach_the_terminal_as_control_characters(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "\x1b[31mred\nline")
    text = python("-m", "clt_plugins", "runs", tmp_path).stdout
    assert "\x1b" not in text and "\\x1b[31mred\\nline" in text
    assert len(text.splitlines()) == 2


def test_tables_are_sorted_by_any_column(runs: Path) -> None:
    def names(*flags: str) -> list[str]:
        return [one["name"] for one in json.loads(python("-m", "clt_plugins", "runs", runs, "--json", *flags).stdout)]

    assert names() == ["failed", "interrupted", "of a week/finished"]
    assert names("--sort", "-size")[0] == "of a week/finished"
    assert names("--sort", "ce_recovered")[0] == "of a week/finished", "those without come last"
    refused = python("-m", "clt_plugins", "runs", runs, "--sort", "nsme")
    assert refused.returncode == 2 and "--sort: no column 'nsme': one of name, " in refused.stderr
    refused = python("-m", "clt_plugins", "runs", runs / "nothing")
    assert refused.returncode == 2 and "no such folder" in refused.stderr
    assert "no runs below" in python("-m", "clt_plugins", "runs", runs / "notes").stdout


def test_two_runs_are_compared_by_the_keys_of_their_recipes_and_their_results(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "one")
    losses = [{"name": "mse", "weight": 0.5}]
    run(
        tables(activation={"name": "batchtopk", "k": 4}, losses=losses, evaluate={"tokens": 64}), out=tmp_path / "other"
    )
    printed = python("-m", "clt_plugins", "runs", tmp_path, "--compare", "one", "other", "--json")
    data = json.loads(printed.stdout)
    assert data["recipe"] == {"activation.k": [5, 4], "losses.mse.weight": [1.0, 0.5]}
    assert data["results"]["l0"] == [5.0, 4.0] and data["results"]["model.cross_entropy.zero"] == [5.0, None]
    assert "step" not in data["results"]
    text = python("-m", "clt_plugins", "runs", tmp_path, "--compare", "one", tmp_path / "other").stdout
    assert any(line.split() == ["activation.k", "5", "4"] for line in text.splitlines())
    refused = python("-m", "clt_plugins", "runs", tmp_path, "--compare", "one", "none")
    assert refused.returncode == 2 and "--compare: no run 'none'" in refused.stderr


def test_items_of_a_list_are_named_by_their_choice() -> None:
    tables_ = {"a": {"b": [1, 2]}, "losses": [{"name": "x", "w": 1}, {"name": "x", "w": 2}, {"w": 3}], "none": []}
    assert dict(flat(tables_)) == {
        "a.b": [1, 2],
        "losses.x.name": "x",
        "losses.x.w": 1,
        "losses.x[1].name": "x",
        "losses.x[1].w": 2,
        "losses.2.w": 3,
        "none": [],
    }


def test_hundreds_of_runs_are_listed_in_seconds_without_torch(finished: Path, tmp_path: Path) -> None:
    lines = (finished / "metrics.jsonl").read_bytes()
    for number in range(300):
        folder = tmp_path / f"{number:03}"
        folder.mkdir()
        for name in ("recipe.toml", "history.jsonl"):
            shutil.copy(finished / name, folder)
        for name in ("evaluation/evaluation.json", "transcoder/transcoder.json"):
            (folder / name).parent.mkdir()
            os.link(finished / name, folder / name)
        (folder / "metrics.jsonl").write_bytes(lines * 100)
    code = "import sys, time; from pathlib import Path; from clt_runs.find import find_runs; "
    code += "found = find_runs(Path(sys.argv[1])); assert len(found) == 300 and 'torch' not in sys.modules; "
    code += "assert all(one.nmse for one in found); print(time.process_time())"
    # In an interpreter of its own: a child of the tests' server has torch.
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 3, "seconds of a processor"


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (3, "3 s"), (61, "1 min"), (7300, "2 h"), (90000, "1 d")])
def test_ages(seconds: float | None, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3_400_000_000, "3.4 GB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
