"""The lots of `tests.benchmarks.quality` at tiny sizes: resumed, killed, written as tables."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from clt_plugins.contract.recipe import TrainConfig
from clt_plugins.training.optimizers.rate import with_rate
from tests.benchmarks.quality import data, setups, tables
from tests.benchmarks.quality.__main__ import LOTS, main
from tests.benchmarks.quality.data import Stored
from tests.benchmarks.quality.earlier import take
from tests.benchmarks.quality.lot import Lot, differences, result, today
from tests.benchmarks.quality.one import Job
from tests.benchmarks.quality.recipes import BASE, RECIPES, merged
from tests.support import tables as documents
from tests.support.commands import Python

TINY = setups.shipped(tokens=2048, choose_tokens=256, report_tokens=384, model_tokens=64, features=16, k=6, batch=256)
TINY = attrs.evolve(TINY, source={**TINY.source, "buffer_tokens": 2048})


@pytest.fixture(scope="module", autouse=True)
def forked() -> Iterator[None]:
    """Processes without the seconds of imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "python", lambda *arguments, **options: Python(*arguments, cwd=setups.ROOT, **options))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, forked: None) -> Path:
    """A lot's folder with stored activations."""
    folder = tmp_path_factory.mktemp("lot")
    Stored(TINY, folder).prepare()
    return folder


def lot(folder: Path, *options: str) -> int:
    return main(["ablation", "--folder", str(folder), "--seeds", "1", *options], [TINY])


def test_a_lot_resumes_after_a_kill_and_makes_a_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lot(folder, "--only", BASE) == 0
    (first,) = (folder / "results").rglob("*.json")
    before = first.stat().st_mtime_ns

    one = Lot(folder.resolve())
    killed = one._start(one.job(TINY, "topk", 0, RECIPES["topk"].tables(TINY, 0)))
    while not list((folder / "runs").glob("*/run")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert list((folder / "runs").iterdir())

    assert lot(folder, "--only", BASE, "--only", "topk") == 0
    assert not list((folder / "runs").iterdir())
    assert first.stat().st_mtime_ns == before
    figures = [json.loads(path.read_text()) for path in (folder / "results").rglob("*.json")]
    assert sorted(run["recipe"] for run in figures) == [BASE, "topk"]
    for run in figures:
        assert run["steps"] == TINY.tokens // TINY.batch and run["l0_report"] == pytest.approx(TINY.k)
        assert 0 < run["nmse_report"] != run["nmse_choose"] > 0
        assert run["kl"] > 0 and run["cpu_step_s"] > 0
        assert str(folder) not in json.dumps(run) and str(setups.ROOT) not in json.dumps(run)

    for module in (tables, documents):
        monkeypatch.setattr(module, "MEASUREMENTS", folder)
    assert lot(folder, "--only", BASE, "--only", "topk", "--write") == 0
    written = documents.block("ablation")
    ratio = next(run["nmse_report"] for run in figures if run["recipe"] == "topk") / next(
        run["nmse_report"] for run in figures if run["recipe"] == BASE
    )
    assert f"| topk | {RECIPES['topk'].source} | 1 |" in written and f"| {ratio:.3f} |" in written

    # In another folder, the written table's runs are not run again.
    another = folder / "another"
    assert lot(another, "--only", BASE, "--only", "topk", "--take", "--list") == 0
    results = [json.loads(path.read_text()) for path in (another / "results").rglob("*.json")]
    assert sorted(run["recipe"] for run in results) == [BASE, "topk"]
    for run in results:
        (same,) = (one for one in figures if one["recipe"] == run["recipe"])
        assert run == {**same, "elsewhere": True, "settings": run["settings"]}
    before = documents.block("ablation")
    assert lot(another, "--only", BASE, "--only", "topk", "--no-run", "--write") == 0
    assert documents.block("ablation") == before
    assert lot(folder / "third", "--only", "batchtopk, k per layer", "--take", "--list") == 0
    assert not list((folder / "third").rglob("*.json"))


def test_held_out_sets_are_of_the_right_size_and_differ(folder: Path) -> None:
    stored = Stored(TINY, folder)
    choose, report = (stored.batches(which) for which in ("choose", "report"))
    assert [batch.tokens for batch in choose] == [256] and [batch.tokens for batch in report] == [256, 128]
    assert not bool((choose[0].inputs[:, None, 0] == report[0].inputs[None, :, 0]).all(-1).any())


def test_a_run_that_fails_is_told_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        RECIPES, "broken", attrs.evolve(RECIPES[BASE], changes=lambda _: {"transcoder": {"features": 0}})
    )
    monkeypatch.setattr("tests.benchmarks.quality.lot.today", lambda job: {})
    assert lot(folder, "--only", "broken") == 1
    assert not list((folder / "runs").iterdir())


def test_other_data_in_the_folder_are_refused(folder: Path) -> None:
    with pytest.raises(SystemExit, match="holds other data"):
        Stored(attrs.evolve(TINY, tokens=4096), folder).prepare()


@pytest.mark.parametrize("name", sorted(LOTS))
def test_every_recipe_of_a_lot_can_be_read(tmp_path: Path, name: str) -> None:
    both = [setups.shipped(), setups.smollm2(Path("SmolLM2-135M.gguf"))]
    jobs = LOTS[name](Lot(tmp_path, peer_python="python"), both, range(2), ()).jobs()
    ours = [job for job in jobs if not job.peer_python]
    assert len({job.digest for job in ours if job.seed == 0}) > 8
    for some in (ours, [job for job in jobs if job.peer_python]):
        assert all(one.digest != other.digest for one in some for other in some if one.seed != other.seed)
    for job in ours:
        if job.seed == 0:
            train = today(job)["train"]
            told = re.search(r"(\d+) times the tokens", job.recipe)
            times = int(told[1]) if told else 1
            assert train["lr"] > 0 and train["steps"] * train["batch_tokens"] == times * job.setup.tokens


def test_a_result_counts_while_its_settings_are_those_of_today(tmp_path: Path) -> None:
    job = Lot(tmp_path).job(TINY, BASE, 0, RECIPES[BASE].tables(TINY, 0))
    job.result.parent.mkdir(parents=True)

    def counts(**changes: Any) -> bool:
        job.result.write_text(json.dumps({"settings": merged(today(job), changes)}))
        return result(job) is not None

    settings = today(job)
    assert counts()
    assert not counts(train={"lr": settings["train"]["lr"] * 2})
    del settings["activation"]["anneal_from"]  # an older version had no such setting
    job.result.write_text(json.dumps({"settings": settings}))
    assert result(job) is not None
    assert differences({"losses": [{"name": "mse"}]}, {"losses": [{"name": "mse"}, {"name": "auxk"}]}) == [
        "losses.length"
    ]


def test_what_another_process_has_done_in_the_meantime_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lot = Lot(tmp_path)
    jobs = [lot.job(TINY, BASE, seed, RECIPES[BASE].tables(TINY, seed)) for seed in range(3)]
    started = []

    def start(_: Lot, job: Job) -> Any:
        """A run that is done at once, while another process does the second job."""
        started.append(job.seed)
        for done in (job, jobs[1]):
            done.result.parent.mkdir(parents=True, exist_ok=True)
            done.result.write_text(json.dumps({"settings": today(done)}))
        return Python("-c", "")

    monkeypatch.setattr(Lot, "_start", start)
    assert lot.run(jobs) == []
    assert started == [0, 2]
    assert "2/3  shipped: batchtopk, seed 1: another process has done it" in capsys.readouterr().err


def test_spreads_and_ratios_by_hand() -> None:
    base = [{"seed": 0, "nmse_report": 0.1}, {"seed": 1, "nmse_report": 0.2}]
    runs = [{"seed": 1, "nmse_report": 0.3}, {"seed": 0, "nmse_report": 0.1}, {"seed": 2, "nmse_report": 9.0}]
    assert tables.ratio(runs, base) == "1.250 ± 0.250"
    assert tables.spread([0.5], ".1f") == "0.5"
    assert tables.spread([0.5, None], ".1f") == "-"


def test_the_best_value_of_a_grid_is_that_with_the_least_error_and_few_dead_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tables, documents):
        monkeypatch.setattr(module, "MEASUREMENTS", tmp_path)
    hundred_steps = attrs.evolve(TINY, tokens=100 * TINY.batch)
    plan = LOTS["defaults"](Lot(tmp_path), [hundred_steps], range(2), {"warm-up"})
    by_value = {
        "default": (0.3, 0.30, 0.0),
        "0 of the steps": (0.1, 0.15, 0.03),  # the least error, but too many dead features
        "0.05 of the steps": (0.2, 0.25, 0.02),
        "0.2 of the steps": (0.4, 0.10, 0.0),  # better only on the documents that choose nothing
    }
    first = [job for job in plan.jobs() if job.seed == 0]
    assert [job.recipe for job in first] == [f"warm-up: {value}" for value in by_value]
    for job, (choose, report, dead) in zip(first, by_value.values(), strict=True):
        assert job.setup.model_tokens == 0
        job.result.parent.mkdir(parents=True, exist_ok=True)
        dead_features = {"dead_fraction_choose": dead, "dead_fraction_report": dead}
        about = {
            "setup": "shipped",
            "recipe": job.recipe,
            "seed": 0,
            "commit": "abc",
            "lr": 1e-3,
            "settings": today(job),
        }
        figures = {"nmse_choose": choose, "nmse_report": report, **dead_features}
        job.result.write_text(json.dumps({**about, **figures}))
    second = [job.recipe for job in plan.jobs() if job.seed == 1]
    assert second == ["warm-up: 0.05 of the steps", "warm-up: default"]
    plan.write()
    lines = [line for line in documents.block("defaults").splitlines() if "warm-up" in line]
    assert len(lines) == 4 and [line for line in lines if "**" in line] == [
        "| shipped model | warm-up | **0.05 of the steps** | 0.001 | 1 | 0.2000 | 0.2500 | 2.0% | 0.833 |"
    ]


def test_runs_of_a_table_that_lacks_others_are_kept_beside_the_old_one(folder: Path, monkeypatch: Any) -> None:
    for module in (tables, documents):
        monkeypatch.setattr(module, "MEASUREMENTS", folder / "tables")
    (folder / "tables").mkdir()
    old = {"rows": [["a", "b"]], "runs": []}
    (folder / "tables" / "quality.json").write_text(json.dumps(old))
    setup = attrs.evolve(TINY, peer_lrs=(1e-3, 2e-3))
    lot = Lot((folder / "peer").resolve(), peer_python="python")
    plan = LOTS["peer"](lot, [setup], range(2), ())
    first = next(job for job in plan.jobs() if job.peer_python)
    first.result.parent.mkdir(parents=True)
    told = {"setup": "shipped", "recipe": first.recipe, "seed": 0, "commit": "abc", "nmse_choose": 0.5}
    run = {**told, "steps": first.tables["steps"], "batch": first.tables["batch"], "lr": 1e-3}
    first.result.write_text(json.dumps({**run, "settings": first.tables}))
    plan.write()
    assert json.loads((folder / "tables" / "quality.json").read_text()) == {**old, "unfinished": [run]}
    first.result.unlink()
    assert take(plan.jobs()) == [first] and result(first) == {**run, "elsewhere": True, "settings": first.tables}


def test_rates_are_told_by_steps_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tables, documents):
        monkeypatch.setattr(module, "MEASUREMENTS", tmp_path)
    # 800 steps of 256 tokens: the default rate is 0.022, below 0.25 / sqrt(96) = 0.026.
    setup = attrs.evolve(TINY, tokens=800 * TINY.batch)
    plan = LOTS["defaults"](Lot(tmp_path), [setup], range(1), {"batch 256", "batch 512"})
    for number, job in enumerate(plan.jobs()):
        job.result.parent.mkdir(parents=True, exist_ok=True)
        train = today(job)["train"]
        lr = train.get("lr") or with_rate(TrainConfig(steps=train["steps"]), 96).lr
        about = {"setup": "shipped", "recipe": job.recipe, "seed": 0, "commit": "abc", "lr": lr, "settings": today(job)}
        size = {"steps": train["steps"], "batch": train["batch_tokens"]}
        errors = {"nmse_choose": number / 10, "nmse_report": 9.0}
        dead = {"dead_fraction_choose": number / 100, "dead_fraction_report": 9.0}
        job.result.write_text(json.dumps({**about, **size, **errors, **dead}))
    plan.write()
    _, _, heading, _, *rows = documents.block("learning-rates").splitlines()
    assert heading == "| model | steps × batch | × 0.125 | × 0.25 | × 0.5 | × 1 | × 1.41 | × 2 | the default |"
    assert rows[:2] == [
        "| shipped model | 800 × 256 |  |  | 0.100, 1.0% | 0.200, 2.0% | 0.300, 3.0% | 0.400, 4.0% | "
        "× 0.85: 0.000, 0.0% |",
        "| shipped model | 400 × 512 |  |  | 0.600, 6.0% | 0.500, 5.0% | 0.700, 7.0% | 0.800, 8.0% | × 1 |",
    ]
