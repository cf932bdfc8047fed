"""What a recipe does not say goes by the size of its run, and stands in the run's own recipe."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from clt_plugins import run
from clt_plugins.contract.recipe import TrainConfig
from clt_plugins.training.optimizers import rate
from clt_plugins.training.optimizers.rate import with_rate
from tests.support.helpers import tables


def test_dead_features_go_by_the_number_of_tokens() -> None:
    assert TrainConfig(steps=600, batch_tokens=1024).dead_after_tokens == 30_720
    assert TrainConfig(steps=1, batch_tokens=1).dead_after_tokens == 1
    assert TrainConfig(steps=24_000).dead_after_tokens == 1_000_000, "no longer than a million tokens"
    assert TrainConfig(steps=600, dead_after_tokens=9).dead_after_tokens == 9


def test_the_learning_rate_falls_with_the_root_of_the_number_of_features() -> None:
    rates = [with_rate(TrainConfig(steps=1), features).lr for features in (6144, 4 * 6144)]
    assert rates[0] == pytest.approx(2 * rates[1], rel=0.05), "rounded to two digits"
    assert with_rate(TrainConfig(steps=1, lr=3e-5), 6144).lr == 3e-5


def test_the_learning_rate_falls_with_the_root_of_the_steps_of_longer_runs() -> None:
    def of(**train: int) -> float | None:
        return with_rate(TrainConfig(**train), 10_000).lr

    assert of(steps=1) == of(steps=600) == 0.0025
    assert of(steps=2400) == pytest.approx(0.0025 / 2, rel=0.05), "rounded to two digits"
    assert of(steps=60_000) == 0.00025
    assert of(steps=60_000, schedule_steps=600) == 0.0025, "the steps that the schedule goes over"


def test_the_run_says_what_it_took(tmp_path: Path) -> None:
    table = tables(loggers=["jsonl"])
    for name in ("lr", "dead_after_tokens"):
        del table["train"][name]
    run(table, out=tmp_path / "run")
    written = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["train"]
    # 3 layers x 10 features; 12 steps of 16 tokens.
    assert written["lr"] == pytest.approx(0.25 / 30**0.5, rel=0.02)
    assert written["dead_after_tokens"] == 9
    assert run(table, out=tmp_path / "run", resume="latest").n_layers == 3, "it can be resumed by the same recipe"


def test_a_run_that_goes_on_for_longer_keeps_its_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "SHORT_STEPS", 3)
    table = tables()
    del table["train"]["lr"]

    def written() -> dict[str, Any]:
        return tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["train"]

    run(table, out=tmp_path / "run")
    assert written()["lr"] == pytest.approx(0.25 / 30**0.5 / 2, rel=0.02)  # 12 steps
    before = written()["lr"]
    table["train"]["steps"] = 48
    run(table, out=tmp_path / "run", resume="latest")
    assert written()["lr"] == before and written()["schedule_steps"] == 12
    run(table, out=tmp_path / "run", resume="latest", accept=["train.steps"])
    assert written()["lr"] == pytest.approx(before / 2, rel=0.05), "as if it had begun with so many steps"


def test_a_run_that_another_version_began_keeps_its_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tables()
    del table["train"]["lr"]

    def taken(**options: Any) -> float:
        run(table, out=tmp_path / "run", **options)
        lr: float = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["train"]["lr"]
        return lr

    before = taken()
    monkeypatch.setattr(rate, "LR_BY_SIZE", 2 * rate.LR_BY_SIZE)
    table["train"]["steps"] += 1
    assert taken(resume="latest") == before
    assert taken(resume="latest", accept=["train.lr"]) == pytest.approx(2 * before, rel=0.05)
    table["train"]["lr"] = 3e-3
    assert taken(resume="latest") == 3e-3, "one that the recipe names is taken"
