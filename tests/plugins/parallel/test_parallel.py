"""Ranks against one process: outputs, losses, selections, every gradient, and weights after fifty steps."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import CrossLayerTranscoder, run
from clt_plugins.files.sliced import SlicedTensors
from clt_plugins.testing.processes.ports import free_port
from tests.support import rank_cases
from tests.support.commands import on_ranks
from tests.support.helpers import plugins, tables
from tests.support.rank_cases import CASES
from tests.support.rank_runs import RUN, RUNS, STEERED, STORED, STORED_RUNS
from tests.support.ranks import GRIDS, PASSES, TRAINED
from tests.support.stored_data import write_numbered


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The results of each rank of each grid."""
    folder = tmp_path_factory.mktemp("ranks")
    write_numbered(folder / STORED, [40, 25, 35], layers=3, d_model=6)
    # What Numba compiles is cached on disk: once here, not once on each rank at the same time.
    for case in CASES:
        passed_alone(case)
    ports = [free_port() for _ in [*RUNS, *STORED_RUNS, STEERED]]
    for done in on_ranks(4, "-m", "tests.support.ranks", folder, *ports):
        assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(data * tensor)]
        for name, (data, tensor) in GRIDS.items()
    }
    results["agreements"] = [torch.load(folder / f"agreements-{rank}.pt", weights_only=True) for rank in range(4)]
    results["folder"] = folder
    return results


def joined(name: str, key: str, axis: int | None, parts: list[torch.Tensor]) -> torch.Tensor:
    """The complete tensor, joined from the parts of the ranks."""
    data, tensor = GRIDS[name]
    rows = [parts[first : first + tensor] for first in range(0, data * tensor, tensor)]
    if axis is not None:
        rows = [[torch.cat(row, axis)] for row in rows]
    for row in rows:
        assert all(torch.equal(each, row[0]) for each in row), f"{key} differs between ranks that share the features"
    groups = [row[0] for row in rows]
    if key in ("reconstruction", "features", "chosen"):
        return torch.cat(groups)
    if key.startswith("term."):
        return torch.stack(groups).mean(0)
    assert all(torch.equal(each, groups[0]) for each in groups), f"{key} differs between data groups"
    return groups[0]


@cache
def passed_alone(case: rank_cases.Case) -> tuple[dict[str, int | None], dict[str, torch.Tensor]]:
    """The feature axis of each result, and the results of one process."""
    built = rank_cases.whole(case)
    axes = {f"grad.{key}": axis for key, (_, _, axis) in built.transcoder.views().items()}
    return {**axes, "features": 2, "chosen": 2}, rank_cases.one_pass(case, built)


@pytest.mark.parametrize("name, case", PASSES, ids=lambda part: getattr(part, "name", part))
def test_ranks_compute_what_one_process_computes(results, name, case):
    axes, alone = passed_alone(case)
    # The same numbers are summed in another order: the tolerance is a share of the largest entry of each tensor.
    tolerance = 1e-12 if case.dtype == "float64" else 1e-6
    theirs = [each[case.name] for each in results[name]]
    assert theirs[0].keys() == alone.keys()
    for key, expected in alone.items():
        value = joined(name, key, axes.get(key), [each[key] for each in theirs])
        if key == "chosen":
            assert torch.equal(value, expected), "other features were chosen"
            continue
        largest = expected.abs().max()
        assert largest > 0, f"{key} is zero: this test would not notice a wrong one"
        assert value.shape == expected.shape
        assert (value - expected).abs().max() <= tolerance * largest, key


@cache
def trained_alone(case: rank_cases.Case) -> tuple[dict[str, int | None], dict[str, torch.Tensor]]:
    built = rank_cases.whole(case)
    return {key: axis for key, (_, _, axis) in built.transcoder.views().items()}, rank_cases.steps(case, built)


@pytest.mark.parametrize("name, case", TRAINED, ids=lambda part: getattr(part, "name", part))
def test_weights_after_fifty_steps_are_those_of_one_process(results, name, case):
    axes, weights = trained_alone(case)
    for key, expected in weights.items():
        value = joined(name, key, axes[key], [each["trained"][case.name][key] for each in results[name]])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "trial, first, others",
    [
        ("failed read", "Faults : rank 3: source.text: 'corpus' is gone", "Stopped 2: "),
        ("failed later", "Faults : rank 3: source.text: 'corpus' is gone", "Stopped 2: "),
        ("failed everywhere", "Refused : source.text: 'corpus' is gone", "Stopped 2: "),
        (
            "other order",
            "Refused : source: ranks 0 and 1 share the tokens, but read different batches",
            "Stopped 2: ",
        ),
        (
            "other number",
            "Refused : source: ranks 2 and 3 share the tokens, but read different batches",
            "Stopped 2: ",
        ),
        (
            "plugins",
            "Refused : plugins differ between ranks: square is nothing on rank 0, but 2.0 on rank 2",
            "Stopped 2",
        ),
        ("disk", "OSError : rank 2: no space left", "Stopped 1: "),
    ],
)
def test_a_failure_of_one_rank_stops_all_with_one_message(results, trial, first, others):
    errors = [by_rank[trial] for by_rank in results["agreements"]]
    assert errors[0].startswith(first), errors
    assert all(error.startswith(others) and len(error) < 14 for error in errors[1:]), errors


def test_ranks_agree_when_all_is_well_and_when_one_is_asked_to_stop(results):
    for by_rank in results["agreements"]:
        assert (by_rank["well"], by_rank["stop"], by_rank["go on"]) == ("True", "True", "nobody")
        assert by_rank["asked"] == str([False, False, True, True]), "all ranks stop after the same step"


def test_a_folder_lists_what_slow_ranks_have_written(results):
    assert [by_rank["slow writer"] for by_rank in results["agreements"]] == ["True"] * 4


def test_a_parameter_of_all_ranks_features_has_their_gradients_sum_and_others_the_mean_over_data(results):
    # Rank r has gradient r. Summed over features: (0 + 1 and 2 + 3) / 2. Complete on every rank: (0 and 2) / 2 or
    # (1 and 3) / 2.
    for rank, by_rank in enumerate(results["agreements"]):
        assert by_rank["shared"] == str([3.0] * 2 + [1.0 + rank % 2] * 3)


def test_every_rank_goes_on_with_its_own_generator_and_of_fewer_states_with_that_of_its_number_modulo(results):
    for by_rank in results["agreements"]:
        assert by_rank["generators"] == "[True, True]"


# -- complete runs -----------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(one: Path, other: Path, tolerance: float) -> None:
    first, second = lines(one), lines(other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for mine, theirs in zip(first, second, strict=True):
        for key, number in mine.items():
            if key.startswith(("time/", "parallel/")):
                continue
            expected = torch.tensor(number, dtype=torch.float64)
            value = torch.tensor(theirs[key], dtype=torch.float64)
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=1e-12, msg=f"{key} at {mine['step']}")


@pytest.fixture(scope="module")
def folder(results: dict[str, Any]) -> Path:
    """Runs of `rank_runs.RUNS`, and `alone`: the same in one process."""
    run(tables(**RUN), out=results["folder"] / "alone", plugins=plugins())
    return results["folder"]


@pytest.mark.parametrize("name", [name for name, *_ in RUNS])
def test_a_run_on_ranks_is_the_run_of_one_process_also_when_resumed_from_two_ranks(folder, name):
    assert_same_metrics(folder / "alone", folder / name, 1e-6)
    assert any(line.get("callbacks/resampled") for line in lines(folder / name)), "callbacks had something to do"
    loaded = [CrossLayerTranscoder.load(folder / each / "transcoder") for each in ("alone", name)]
    for (key, value), other in zip(loaded[0].tensors().items(), loaded[1].tensors().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-9, msg=key)


def test_ranks_steer_to_an_l0_as_one_process_does(folder):
    run(tables(**STEERED), out=folder / "steered-alone", plugins=plugins())
    assert_same_metrics(folder / "steered-alone", folder / "steered", 1e-6)
    factors = [line["train/penalty_factor"] for line in lines(folder / "steered") if "train/penalty_factor" in line]
    assert factors[0] == 1 and len(set(factors)) == 12, "a factor of its own in every step"


def test_stored_rows_are_trained_on_once_though_each_resume_has_another_number_of_data_ranks(folder):
    ends = [*(step for _, _, step in STORED_RUNS[1:]), 9]
    steps: list[list[int]] = []
    for (name, world, begin), end in zip(STORED_RUNS, ends, strict=True):
        ranks_read = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world)]
        assert {len(read) for read in ranks_read} == {9 - begin}
        steps += [[row for read in ranks_read for row in read[step]] for step in range(end - begin)]
    assert [len(step) for step in steps] == [12] * 9
    # 8 steps are 96 rows, all of the first epoch; the ninth has its last four.
    rows = [row for step in steps for row in step]
    assert len(set(rows[:96])) == 96
    assert set(rows) == set(range(100))


def test_a_checkpoint_of_two_ranks_is_read_bit_for_bit_by_any_number(folder, tmp_path):
    checkpoint = folder / "two/checkpoints/step_000012"
    assert len(SlicedTensors.find(checkpoint, "training").pieces["idle_tokens"]) == 2
    CrossLayerTranscoder.load(checkpoint).save(tmp_path / "whole")
    cut, whole = SlicedTensors.find(checkpoint, "transcoder"), SlicedTensors.find(tmp_path / "whole", "transcoder")
    assert cut.shapes == whole.shapes and not whole.axes
    for name in cut.shapes:
        assert torch.equal(cut.read(name), whole.read(name)), name
        axis = cut.axes.get(name)
        for owned in () if axis is None else (range(3), range(4, 11), range(5, 6)):
            assert torch.equal(cut.read_part(name, axis, owned), whole.read_part(name, axis, owned)), name


def test_a_lost_slice_is_named(folder, tmp_path):
    shutil.copytree(folder / "two/transcoder", tmp_path / "t")
    (tmp_path / "t/transcoder-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"transcoder-00001-of-00002\.safetensors: missing"):
        CrossLayerTranscoder.load(tmp_path / "t")
    with pytest.raises(ValueError, match="1 slices of transcoder of 2"):
        SlicedTensors.find(tmp_path / "t", "transcoder")


@pytest.mark.parametrize("name, tokens", [("two", 16), ("2x2", 8)], ids=["whole sums", "shares"])
def test_bytes_sent_are_those_of_one_reduction_and_little_more(folder, name, tokens):
    (last,) = [line for line in lines(folder / name) if line["step"] == 12 and "loss/total" in line]
    layers, d_model, ranks = 3, 6, 2
    # In a ring each number is sent 2 (W - 1) / W times. AuxK needs one more reduction if features are dead.
    reductions = 2 if last["loss/auxk"] > 0 else 1
    reduced = 2 * (tokens * layers * d_model * 8) * (ranks - 1) / ranks * reductions
    # Sums over features: one number of tanh_sparsity, two of AuxK. Means over shares: one of mse, of AuxK three for
    # each
    # layer. 8 bytes each.
    numbers = 1 + 2 + (1 + 3 * layers if name == "2x2" else 0)
    assert last["parallel/features_bytes"] == reduced + 8 * numbers
