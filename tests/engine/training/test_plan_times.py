"""What a plan says of time: by hand at small shapes; what bounds a step; what would be faster; what does not fit."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from click.testing import CliRunner

from clt_plugins import Refused
from clt_plugins.cli.main import main_group
from clt_plugins.contract.reading.source import Outline
from clt_plugins.files.records import from_data
from clt_plugins.recipe.read import as_toml
from clt_plugins.training.plan.build import plan
from clt_plugins.training.plan.machines import GPUS, Rates, gpu_rates
from clt_plugins.training.plan.records import Plan
from clt_plugins.training.plan.table import as_table, refusal
from clt_plugins.training.plan.times import SIGMA, step, used_rows
from clt_plugins.training.plan.work import Work
from tests.support.helpers import plugins, recipe

WORK = Work(
    tokens=100,
    n_layers=2,
    d_model=10,
    n_features=1000,
    row_size=10,
    encoder_flops=0,
    encoder_bytes=0,
    pairs=400,
    extra=50,
    targets=1.5,
    selections=2,
    dense=False,
    keeps_pre=False,
    parameters=50_000,
    rows=5000,
    weight_bytes=4,
    state_bytes=400_000,
    compute_bytes=4,
    row_bytes=160,
    product="float32",
    exact=True,
    clips=False,
    tensor_ranks=1,
    data_ranks=1,
)
FREE = Rates(
    name="by hand",
    basis="",
    memory=float("inf"),
    products={"float32": float("inf"), "bfloat16": float("inf")},
    numbers=float("inf"),
    decoded=float("inf"),
    differentiated=float("inf"),
    touched=float("inf"),
    copied=float("inf"),
    link=float("inf"),
)
OUTLINE = Outline(n_layers=2, d_model=10, model_parameters=7000)


def seconds(rates: dict[str, Any], work: Work = WORK, **options: bool) -> dict[str, float]:
    """The pieces that take time on a machine on which everything else is free."""
    taken = step(work, attrs.evolve(FREE, **rates), OUTLINE, **options)
    return {piece.name: piece.seconds for piece in taken.pieces if piece.seconds}


def test_each_part_by_hand():
    numbers = 100 * 2 * 1000
    assert seconds({"products": {"float32": 1e6}}) == pytest.approx(
        {"encoder": 2 * numbers * 10 / 1e6, "language model": 2 * 7000 * 100 / 1e6}
    )
    assert seconds({"numbers": 1e6}) == pytest.approx({"selection": numbers / 1e6})
    assert seconds({"decoded": 1e6}) == pytest.approx({"decode": 400 * 1.5 * 10 / 1e6})
    assert seconds({"differentiated": 1e6}) == pytest.approx({"gradients": (400 * 1.5 + 400) * 10 / 1e6})
    assert seconds({"touched": 1e6}) == pytest.approx({"gradients": 5000 / 1e6})
    assert seconds({"copied": 1e6}, copied=True) == pytest.approx({"data": 100 * 160 / 1e6})
    assert seconds({"memory": 1e9})["optimizer"] == pytest.approx(50_000 * (3 * 4 + 2 * 8) / 1e9)
    several = attrs.evolve(WORK, tensor_ranks=4, data_ranks=2)
    sent = 2 * 3 / 4 * 100 * 2 * 10 * 4 + 2 * 1 / 2 * 50_000 * 4 + 3 / 4 * 100 * WORK.row_bytes
    assert seconds({"link": 1e6}, several) == pytest.approx({"network": sent / 1e6})
    products = {"encoder": 2 * numbers * 10 / 1e6, "language model": 2 * 7000 * 100 / 4 / 1e6}  # divided by ranks
    assert seconds({"products": {"float32": 1e6}}, several) == pytest.approx(products)


def test_what_losses_select_costs_time_only_while_features_are_dead():
    alive, dead = seconds({"decoded": 1e6}), seconds({"decoded": 1e6}, dead=True)
    assert dead == pytest.approx(alive | {"decode (dead)": 50 * 1.5 * 10 / 1e6})


def test_a_dense_step_is_all_products():
    dense = seconds({"products": {"float32": 1e6}}, attrs.evolve(WORK, dense=True))
    active = 100 * 2 * 1000
    products = {"encoder": 3 * 2 * active * 10, "decode": 2 * active * 1.5 * 10, "gradients": 4 * active * 1.5 * 10}
    del dense["language model"]
    assert dense == pytest.approx({name: flops / 1e6 for name, flops in products.items()})


def test_values_are_computed_again_where_the_product_is_not_exact():
    again = seconds({"decoded": 1e6}, attrs.evolve(WORK, exact=False))
    assert again["decode"] == pytest.approx((400 * 1.5 + 400) * 10 / 1e6)


def test_a_part_is_bound_by_the_slowest_of_what_it_needs():
    pieces = {p.name: p for p in step(WORK, attrs.evolve(FREE, memory=1e9, products={"float32": 1e12}), OUTLINE).pieces}
    assert pieces["encoder"].bound == "memory" and pieces["language model"].bound == "matrix product"
    slow = attrs.evolve(FREE, memory=1e15, launches=1000.0)
    waiting = step(WORK, slow, OUTLINE)
    assert waiting.seconds == pytest.approx((260 + 14 * 2) / 1000), "the CPU starts operations no faster"
    assert waiting.pieces[-1].bound == "the CPU's launches"
    assert sum(piece.share for piece in waiting.pieces) == pytest.approx(1)


def test_rows_that_are_read_once_against_a_drawn_batch():
    """Log-normal densities; of each feature, whether any of B tokens has it."""
    import numpy as np

    rng = np.random.default_rng(0)
    density = np.exp(SIGMA * rng.standard_normal(200_000))
    density *= 400 / (100 * 2 * 1000) / density.mean()
    drawn = (rng.random(200_000) < 1 - (1 - density.clip(0, 1)) ** 100).mean() * 2 * 1000 * 1.5
    # 64 quantiles stand for the distribution; its far tail is missing.
    assert used_rows(WORK) == pytest.approx(drawn, rel=0.03)


def test_ceilings_are_those_published():
    h100 = gpu_rates("H100")
    assert (GPUS["h100"].bandwidth, GPUS["h100"].bf16, GPUS["h100"].memory) == (3350, 989, 80)
    assert h100.memory == pytest.approx(0.8 * 3.35e12) and h100.products["bfloat16"] == pytest.approx(0.4 * 989e12)
    assert h100.cached == pytest.approx(5.5e12, rel=0.1), "read from the last level of cache, as measured by others"
    for name in GPUS:
        rates = gpu_rates(name)
        assert rates.capacity and rates.products["bfloat16"] > rates.products["float32"] > 0
    faster = [gpu_rates(name).memory for name in ("l4", "l40s", "4090", "a100", "h100", "h200")]
    assert faster == sorted(faster)


def on_gpu(name: str = "h100", gpus: int | None = None, **changes: Any) -> Plan:
    sized = recipe(**changes)
    return plan(sized, plugins(), n_layers=12, d_model=768, gpu=name, gpus=gpus)


LARGE: dict[str, Any] = {
    "transcoder": {"features": 24_576, "dtype": "bfloat16", "device": "auto"},
    "activation": {"name": "batchtopk", "k": 200},
    "losses": [{"name": "mse"}, {"name": "auxk"}],
    "train": {"batch_tokens": 4096, "steps": 24_000, "eval_tokens": 65_536, "dead_after_tokens": 2_000_000},
}


def test_a_large_recipe_on_a_gpu():
    needs = on_gpu(**LARGE)
    speed = needs.speed
    assert speed is not None and speed.fits and speed.smallest_gpus == 1 and speed.to_fit == []
    assert speed.first.seconds > speed.seconds > speed.last.seconds, "k falls over the run"
    assert speed.hours == pytest.approx(24_000 * speed.seconds / 3600)
    assert speed.tokens_per_s == pytest.approx(4096 / speed.seconds)
    told = {advice.set: advice for advice in speed.advice}
    larger = told["train.batch_tokens=16384"]
    twice = on_gpu(**LARGE | {"train": LARGE["train"] | {"batch_tokens": 16_384}})
    assert twice.speed is not None
    assert larger.times == pytest.approx(twice.speed.tokens_per_s / speed.tokens_per_s)
    assert larger.total_bytes == twice.total_bytes > needs.total_bytes
    assert "activation.anneal_from=1" in told and "losses.1.k=96" in told
    assert [advice.times for advice in speed.advice] == sorted((a.times for a in speed.advice), reverse=True)
    assert f"{larger.set} gives {larger.times:.2g} x tokens/s" in as_table(needs)


def test_several_gpus_share_the_features():
    one, four = on_gpu(**LARGE), on_gpu(gpus=4, **LARGE)
    assert four.ranks == 4 and four.bytes.parameters == pytest.approx(one.bytes.parameters / 4, rel=0.01)
    assert one.speed and four.speed and one.speed.tokens_per_s < four.speed.tokens_per_s < 4 * one.speed.tokens_per_s
    named = on_gpu(gpus=4, **LARGE, parallel={"name": "tensor", "tensor": 2})
    assert named.ranks == 4 and named.bytes.parameters == pytest.approx(one.bytes.parameters / 2, rel=0.01)
    # Two groups share the tokens. Ranks of a group split them when they compute the error: targets, of 4 bytes, are of
    # a quarter of the tokens either way.
    targets = 4096 // 4 * 12 * 768 * 4
    assert named.bytes.batch - targets == pytest.approx((four.bytes.batch - targets) / 2)


def test_gpus_are_split_as_ranks_of_a_run_are():
    """With `data` alone a run gives each group its share of the ranks; the plan gave all of them to one."""
    by_data = on_gpu(gpus=8, **LARGE, parallel={"name": "tensor", "data": 2})
    four = on_gpu(gpus=4, **LARGE)
    assert by_data.ranks == 8 and by_data.bytes.parameters == four.bytes.parameters
    with pytest.raises(Refused, match=r"--gpus: 3 is no multiple of parallel\.data, which is 2"):
        on_gpu(gpus=3, **LARGE, parallel={"name": "tensor", "data": 2})


def test_the_number_of_gpus_that_is_told_can_be_taken():
    """With ranks that the recipe names, `--gpus N` alone was refused, or held less."""
    huge = LARGE | {"transcoder": {"features": 49_152}}
    named = on_gpu("4090", 2, **huge, parallel={"name": "tensor", "tensor": 2})
    assert named.speed is not None and named.speed.fits is False and named.speed.smallest_gpus is not None
    count = named.speed.smallest_gpus
    assert named.speed.take == f"--gpus {count} --set parallel.tensor={count} --set parallel.data=1"
    assert named.speed.take in as_table(named)
    taken = on_gpu("4090", count, **huge, parallel={"name": "tensor", "tensor": count, "data": 1}).speed
    assert taken is not None and taken.fits


def test_what_does_not_fit_is_refused_with_the_remedy():
    huge = on_gpu("4090", **LARGE | {"transcoder": {"features": 49_152}})
    speed = huge.speed
    assert speed is not None and speed.fits is False and speed.smallest_gpus is not None
    fewer = on_gpu("4090", speed.smallest_gpus - 1, **LARGE | {"transcoder": {"features": 49_152}}).speed
    assert fewer is not None and fewer.fits is False
    told = refusal(huge, speed)
    assert told.startswith(f"needs {huge.total_bytes / 1e9:.0f} GB of 24: ") and f"--gpus {speed.smallest_gpus}" in told
    assert as_table(huge).endswith(f"does not fit: {told}")
    large = on_gpu("l40s", **LARGE | {"transcoder": {"features": 40_960}})
    assert large.speed is not None and large.speed.fits is False and large.speed.to_fit[0] == "optimizer.states=bf16"
    assert f"set {' and '.join(large.speed.to_fit)}" in as_table(large)


OPTIONS = {
    "one of two": ({"n_layers": 3}, "--d-model: missing: --n-layers and --d-model go together"),
    "none": ({"n_layers": 0, "d_model": 4}, "--n-layers, --d-model: must be at least 1: 0, 4"),
    "unknown": ({"gpu": "h1000"}, r"--gpu: unknown GPU 'h1000' \(known: h100, h100-pcie"),
    "two machines": ({"gpu": "h100", "measured": True}, "--measure: is for this machine, --gpu for another one"),
    "how many of what": ({"gpus": 2}, "--gpus: says how many there are; of which kind says --gpu"),
    "no GPU": ({"gpu": "h100", "gpus": 0}, "--gpus: must be at least 1: 0"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_make_no_sense_are_refused(case):
    options, text = OPTIONS[case]
    with pytest.raises(Refused, match=text):
        plan(recipe(), plugins(), **options)


def test_a_number_of_gpus_that_the_recipe_cannot_use():
    with pytest.raises(Refused, match=r"--gpus: 3 is no multiple of parallel\.tensor, which is 2"):
        plan(recipe(parallel={"name": "tensor", "tensor": 2}), plugins(), gpu="h100", gpus=3)


def test_the_command_measures_and_writes_all_as_json(tmp_path):
    (tmp_path / "r.toml").write_text(as_toml(recipe(kernels={"name": "torch"})))
    done = CliRunner().invoke(main_group, ["plan", str(tmp_path / "r.toml"), "--measure", "--json"])
    assert done.exit_code == 0, done.output
    needs = from_data(Plan, json.loads(done.stdout))
    speed = needs.speed
    assert speed is not None and speed.fits is None and speed.smallest_gpus is None
    assert "measured here: 10 features per layer, 16 tokens a step" in speed.device.basis
    names = [piece.name for piece in speed.first.pieces]
    assert names == ["encoder", "selection", "decode", "gradients", "optimizer", "rest", "data"]
    assert all(piece.seconds > 0 for piece in speed.first.pieces)
    done = CliRunner().invoke(main_group, ["plan", str(tmp_path / "r.toml"), "--gpu", "l4", "--gpus", "2"])
    assert "time on 2 x l4 (a model by published ceilings, not measured on a device)" in done.stdout
