"""Transcoders that are set by hand: what the stage says of them is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from clt_planted.stage import Report, measure
from clt_plugins import Faults, run
from tests.support.helpers import Parts, parts, tables

TOKENS = 2048


@attrs.frozen
class Unit:
    """A feature of a transcoder, in terms of true features: their weights in its pre-activation, and what it writes to
    each layer."""

    layer: int
    reads: Mapping[int, float]
    writes: Mapping[int, Mapping[int, float]]
    bias: float = 0.0


def planted(units: int = 64, **source: Any) -> Parts:
    return parts(
        source={"name": "planted", **source},
        transcoder={"features": units},
        # Not relu: pre-activations of 1e-8, which should be 0, are not active.
        activation={"name": "jumprelu", "threshold": 1e-3},
        normalisation={"name": "none"},
        train={"batch_tokens": 512},
    )


def by_hand(built: Parts, units: list[Unit]) -> Any:
    """The transcoder with these features; all others are never active."""
    truth, transcoder = built.source.truth(), built.transcoder  # type: ignore[attr-defined]
    directions = truth.directions
    dual = torch.linalg.pinv(directions).T
    weights = transcoder.tensors()
    for name in weights:
        if name.startswith(("W_", "b_")):
            weights[name].zero_()
    weights["b_enc"].fill_(-1)
    used = [0] * transcoder.n_layers
    for unit in units:
        number, layer = used[unit.layer], unit.layer
        used[layer] += 1
        weights["W_enc"][layer, number] = sum(value * dual[one] for one, value in unit.reads.items())
        weights["b_enc"][layer, number] = unit.bias
        for target, written in unit.writes.items():
            row = sum(value * directions[one] for one, value in written.items())
            weights[f"W_dec.{layer:02}"][number, target - layer] = row
    return transcoder.eval()


def judge(built: Parts, units: list[Unit]) -> Report:
    return measure(by_hand(built, units), built.source, TOKENS)  # type: ignore[arg-type]


def faithful(truth: Any, number: int, *, reads: Mapping[int, float] | None = None, bias: float = 0.0) -> Unit:
    """A feature that computes a true one, where and from what the model does: of copy, and, and_not."""
    feature = truth.features[number]
    own = {"copy": (1.0,), "and": (1.0, 1.0), "and_not": (1.0, -1.0)}[feature.gate]
    weights = dict(zip(feature.parents, own, strict=True)) | dict(reads or {})
    removed = dict.fromkeys(feature.exciting, -1.0) if truth.consume else {}
    bias -= float(feature.gate == "and")
    return Unit(feature.layer, weights, {feature.layer: {number: 1.0, **removed}}, bias)


CHAINS = {"hops": 3, "gates": ["and", "copy", "and_not"], "chains": 6, "active": 3.0}


@pytest.mark.parametrize("consume", [False, True])
def test_the_true_circuit_is_recovered_and_keeps_every_hop(consume: bool) -> None:
    built = planted(consume=consume, **CHAINS)
    truth = built.source.truth()  # type: ignore[attr-defined]
    report = judge(built, [faithful(truth, number) for number in truth.computed()])
    assert report.tokens == TOKENS
    assert report.true_features == 18
    assert report.nmse is not None and report.nmse < 1e-9
    for value in (report.mcc, report.decoder_mcc, report.closest, report.recovered, report.kept, report.written):
        assert value == pytest.approx(1, abs=1e-4)
    assert (report.direct, report.rewritten, report.other, report.splitting) == pytest.approx((0, 0, 0, 0), abs=1e-5)
    assert report.absorption is None
    assert len(report.hops) == 12
    assert {hop.gate for hop in report.hops} == {"and", "copy", "and_not"}


def test_a_shortcut_from_a_to_c_keeps_nothing_though_it_reconstructs_all() -> None:
    built = planted(layers=2, hops=2, chains=5)
    truth = built.source.truth()  # type: ignore[attr-defined]
    before = [next(iter(chain.before)) for chain in truth.chains()]
    units = [
        Unit(0, {a: 1.0}, {0: {chain.parent: 1.0}, 1: {chain.child: 1.0}})
        for a, chain in zip(before, truth.chains(), strict=True)
    ]
    report = judge(built, units)
    assert report.nmse is not None and report.nmse < 1e-9
    assert report.written == pytest.approx(1, abs=1e-5)
    assert (report.kept, report.direct, report.rewritten, report.other) == pytest.approx((0, 0, 1, 0), abs=1e-6)
    # One feature stands for B and C: it can be the match of one of them only.
    assert (report.mcc, report.recovered, report.closest) == pytest.approx((0.5, 0.5, 1), abs=1e-5)


def test_a_shortcut_through_a_gate_is_one() -> None:
    built = planted(layers=2, hops=2, gates=["and"], chains=4, active=3.0, together=0.9)
    truth = built.source.truth()  # type: ignore[attr-defined]
    units = []
    for chain in truth.chains():
        units.append(faithful(truth, chain.parent))
        inputs = [one for one in truth.ancestors(chain.child) if truth.features[one].layer == -1]
        units.append(Unit(0, dict.fromkeys(inputs, 1.0), {1: {chain.child: 1.0}}, bias=-2))
    report = judge(built, units)
    assert report.nmse is not None and report.nmse < 1e-9
    assert (report.kept, report.rewritten) == pytest.approx((0, 1), abs=1e-5)
    assert report.mcc == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_shares_of_what_is_written_are_told_apart(share: float) -> None:
    """C is written by a feature that reads B, by one that reads A past it, by a shortcut, and by one that reads none of
    them."""
    built = planted(layers=2, hops=2, chains=1, active=1.0)
    truth = built.source.truth()  # type: ignore[attr-defined]
    (chain,) = truth.chains()
    (a,), b, c = chain.before, chain.parent, chain.child
    rest = 1 - share
    units = [
        Unit(0, {a: 1.0}, {0: {b: 1.0}, 1: {c: 0.5 * rest}}),
        Unit(1, {b: 0.6, a: 0.4}, {1: {c: share}}),
        Unit(1, {a: 1.0}, {1: {c: 0.3 * rest}}),
        Unit(0, {}, {1: {c: 0.2 * rest}}, bias=1.0),
    ]
    report = judge(built, units)
    values = built.source.truth().values(torch.cat([built.source.amounts(x) for x in built.source.held_out(TOKENS)]))  # type: ignore[attr-defined]
    mean = float(values[:, c].mean())  # the last feature writes 1, the others C's value
    total = share + rest * (0.8 + 0.2 / mean)
    expected = (0.6 * share, 0.4 * share + 0.3 * rest, 0.5 * rest, 0.2 * rest / mean)
    assert (report.kept, report.direct, report.rewritten, report.other) == pytest.approx(
        tuple(value / total for value in expected), abs=1e-5
    )


def test_hops_are_those_of_a_loop_for_any_weights() -> None:
    built = planted(units=7, noise=0.05, **{**CHAINS, "chains": 2, "d_model": 12, "active": 1.5})
    truth, source = built.source.truth(), built.source  # type: ignore[attr-defined]
    random = torch.Generator().manual_seed(1)
    for name, weight in built.transcoder.tensors().items():
        if name.startswith(("W_", "b_")):
            weight.copy_(torch.randn(weight.shape, generator=random))
    transcoder = built.transcoder.eval()
    report = measure(transcoder, source, 60)  # type: ignore[arg-type]
    weights = {name: value.double() for name, value in transcoder.tensors().items()}
    directions = truth.directions.double()
    expected: list[list[float]] = []
    for chain in truth.chains():
        sums, values = [0.0] * 5, 0.0
        layer, b_layer = truth.features[chain.child].layer, truth.features[chain.parent].layer
        own = [n for n in truth.computed() if truth.features[n].layer == layer]
        for batch in source.held_out(60):
            amounts = source.amounts(batch).double()  # type: ignore[attr-defined]
            z = transcoder.encode(batch.inputs).dense().detach().double()
            for token in range(batch.tokens):
                value = float(amounts[token, layer + 1, chain.child])
                values += value
                if value == 0:
                    continue
                for s in range(layer + 1):
                    for f in range(7):
                        row = weights[f"W_dec.{s:02}"][f, layer - s]
                        solved = torch.linalg.lstsq(directions[own].T, row[:, None]).solution[:, 0]
                        u = float(solved[own.index(chain.child)])
                        sums[4] += float(z[token, s, f]) * u
                        w = max(0.0, float(z[token, s, f]) * u)
                        read = {
                            n: max(0.0, float(weights["W_enc"][s, f] @ directions[n] * amounts[token, s, n]))
                            for n in (chain.parent, *chain.before)
                        }
                        b, everything = read[chain.parent], sum(read.values())
                        r = b / everything if b else 0.0
                        sums[0] += w * r
                        sums[3 if not everything else 2 if s <= b_layer else 1] += w * (1 - r)
        expected.append([one / values for one in sums])
    assert len(report.hops) == 4
    for hop, sums in zip(report.hops, expected, strict=True):
        assert [hop.kept, hop.direct, hop.rewritten, hop.other, hop.written] == pytest.approx(sums, rel=1e-4, abs=1e-6)
    total = sum(sum(sums[:4]) for sums in expected)
    assert report.kept == pytest.approx(sum(sums[0] for sums in expected) / total, rel=1e-4)
    assert all(sum(sums[i] for sums in expected) > 0 for i in range(4))


FAMILIES = {"activity": "hierarchical", "group": 4, "chains": 8, "active": 1.5, "layers": 2}


@pytest.mark.parametrize(("absorbing", "expected"), [(0, 0.0), (1, 1 / 3), (3, 1.0)])
def test_absorption_is_the_share_of_children_that_hold_their_parent(absorbing: int, expected: float) -> None:
    built = planted(**FAMILIES)
    truth = built.source.truth()  # type: ignore[attr-defined]
    absorbed: dict[int, list[int]] = {}
    for parent, child in truth.families:
        if len(absorbed.setdefault(parent, [])) < absorbing:
            absorbed[parent].append(child)
    units = []
    for number in truth.computed():
        # The parent's feature is silent where an absorbing child is active, whose feature writes the parent too.
        silencing = {truth.features[child].parents[0]: -5.0 for child in absorbed.get(number, [])}
        unit = faithful(truth, number, reads=silencing)
        parents = {parent: 1.0 for parent, children in absorbed.items() if number in children}
        units.append(attrs.evolve(unit, writes={unit.layer: {number: 1.0, **parents}}))
    report = judge(built, units)
    assert report.absorption == pytest.approx(expected, abs=1e-6)
    assert report.splitting == 0


def test_a_parent_that_is_active_itself_is_not_absorbed() -> None:
    built = planted(**FAMILIES)
    truth = built.source.truth()  # type: ignore[attr-defined]
    parent_of = {child: parent for parent, child in truth.families}
    units = []
    for number in truth.computed():
        unit = faithful(truth, number)
        parents = {parent_of[number]: 1.0} if number in parent_of else {}
        units.append(attrs.evolve(unit, writes={unit.layer: {number: 1.0, **parents}}))
    assert judge(built, units).absorption == 0


def test_a_silent_parent_that_nobody_writes_is_not_absorbed() -> None:
    built = planted(**FAMILIES)
    truth = built.source.truth()  # type: ignore[attr-defined]
    children = {child for _, child in truth.families}
    report = judge(built, [faithful(truth, number) for number in truth.computed() if number in children])
    assert report.absorption == 0
    assert report.recovered == pytest.approx(6 / 8)


@pytest.mark.parametrize("parts_of_it", [1, 2])
def test_a_feature_that_is_split_by_another_one_is_seen(parts_of_it: int) -> None:
    """Two features, each for one half of the tokens: with and without a feature of another chain."""
    built = planted(gates=["and"], chains=5, active=3.0, together=0.9)
    truth = built.source.truth()  # type: ignore[attr-defined]
    first, *others = truth.computed()
    splits_by = truth.features[others[0]].parents[0]
    units = [faithful(truth, number) for number in others]
    if parts_of_it == 1:
        units.append(faithful(truth, first))
    else:
        units.append(faithful(truth, first, reads={splits_by: -2.0}))
        units.append(faithful(truth, first, reads={splits_by: 1.0}, bias=-1.0))
    report = judge(built, units)
    assert report.nmse is not None and report.nmse < 1e-9
    assert report.splitting == pytest.approx((parts_of_it - 1) / 5)
    assert (report.recovered, report.mcc > 0.999) == ((1.0, True) if parts_of_it == 1 else (0.8, False))


def test_weights_in_normalised_units_are_judged_in_raw_ones() -> None:
    """Another normalisation, folded into encoder and decoder: the same transcoder, and the same report."""
    built = planted(**CHAINS)
    truth = built.source.truth()  # type: ignore[attr-defined]
    plain = judge(built, [faithful(truth, number) for number in truth.computed()])
    scaled = parts(
        source={"name": "planted", **CHAINS},
        transcoder={"features": 64},
        activation={"name": "relu"},
        normalisation={"name": "mean_std"},
        train={"batch_tokens": 512},
    )
    by_hand(scaled, [])
    theirs, ours = built.transcoder.tensors(), scaled.transcoder.tensors()
    random = torch.Generator().manual_seed(0)
    for name in ("input_shift", "input_scale", "target_shift", "target_scale"):
        ours[f"normaliser.{name}"].copy_(0.5 + torch.rand(3, 64, generator=random))
    ours["W_enc"].copy_(theirs["W_enc"] * ours["normaliser.input_scale"][:, None])
    shifts = torch.einsum("lfd,ld->lf", theirs["W_enc"], ours["normaliser.input_shift"])
    ours["b_enc"].copy_(theirs["b_enc"] + shifts)
    for s in range(3):
        ours[f"W_dec.{s:02}"].copy_(theirs[f"W_dec.{s:02}"] / ours["normaliser.target_scale"][s:])
    ours["b_dec"].copy_(-ours["normaliser.target_shift"] / ours["normaliser.target_scale"])
    report = measure(scaled.transcoder.eval(), scaled.source, TOKENS)  # type: ignore[arg-type]
    for name in ("mcc", "decoder_mcc", "kept", "rewritten", "written"):
        assert getattr(report, name) == pytest.approx(getattr(plain, name), abs=1e-4), name


RUN: dict[str, Any] = {
    "source": {"name": "planted", "chains": 6, "hops": 2, "layers": 3, "d_model": 20},
    "normalisation": {"name": "mean_std"},
    "train": {"batch_tokens": 32, "steps": 8},
    "loggers": ["jsonl"],
}


def test_a_run_writes_the_report_and_logs_its_numbers(tmp_path: Path) -> None:
    stage = {"name": "recovery", "tokens": 64, "every": 4}
    # A transform that drops rows: the truth of those that are left is known.
    transforms = [{"name": "drop_outliers", "factor": 1.5}]
    run(tables(**RUN, stages=[stage], transforms=transforms), out=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "recovery" / "recovery.json").read_text())
    assert report["true_features"] == 12
    assert len(report["hops"]) == 6
    assert report["kept"] + report["direct"] + report["rewritten"] + report["other"] == pytest.approx(1)
    assert report["absorption"] is None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if "recovery/mcc" in line]
    assert logged["step"] == 4
    assert 0 < logged["recovery/mcc"] <= 1
    assert "recovery/absorption" not in logged


def test_a_source_that_knows_no_truth_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(Faults) as raised:
        run(tables(stages=[{"name": "recovery"}]), out=tmp_path / "run")
    (fault,) = raised.value.faults
    assert fault.path == "stages[0]"
    assert fault.text == 'needs a source that knows its true features: use "planted", or leave the stage out'
