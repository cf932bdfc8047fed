"""Normalisations that are wrong in one way each: the kit finds the fault and says where to look."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER

NORMALISATION = """
import torch

class Normalisation(AffineNormalisation):
    needs = ("std",)

    def __init__(self, context):
        super().__init__(context)
        self.context, self.size = context, 1.0
        self.sums = torch.zeros(2, context.n_layers, context.d_model, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)
        INIT

    def observe(self, batch):
        for total, raw in zip(self.sums, (batch.inputs, batch.targets)):
            total += raw.double().sum(0)
        self.count += batch.tokens
        OBSERVE

    def observed_bytes(self):
        return BYTES

    def fit(self, statistics):
        total = self.context.parallel.total
        MEANS
        for name, mean in zip(("input", "target"), means):
            self.get_buffer(f"{name}_shift").copy_(mean)
            std = statistics[f"{name}s.std"]
            self.get_buffer(f"{name}_scale").copy_(SCALE)
        RESET

    def inputs(self, raw):
        return INPUTS

    def restore(self, normalised):
        return RESTORE

    def units(self):
        return UNITS

    def fold(self):
        return FOLD

@hookimpl
def clt_normalisations():
    return [Spec("mine", Config, lambda config, context: Normalisation(context))]
"""
RIGHT = {
    "INIT": "pass",
    "OBSERVE": "pass",
    "BYTES": "0",
    "MEANS": 'means = total(self.sums, over="tokens") / total(self.count, over="tokens")',
    "SCALE": "std.clamp_min(1e-3)",
    "RESET": "self.sums, self.count = self.sums * 0, self.count * 0",
    "INPUTS": "super().inputs(raw)",
    "RESTORE": "super().restore(normalised)",
    "UNITS": "super().units()",
    "FOLD": "super().fold()",
}

APART = {"RESTORE": "normalised * self.target_scale + self.target_shift"}

FAULTS: list[tuple[str, dict[str, str], str]] = [
    ("there_and_back", {"SCALE": "std"}, "finite normalised inputs"),
    ("there_and_back", {"INPUTS": "super().inputs(raw.sub_(0.5))"}, "raw inputs as they were"),
    ("there_and_back", {"INPUTS": "super().inputs(raw.detach())"}, "a gradient through inputs"),
    ("there_and_back", {"RESTORE": "normalised * self.target_scale"}, "restore(targets(x)) to be x"),
    (
        "units",
        {"UNITS": "Affine(self.target_shift, 1 / self.target_scale)", **APART},
        "restore(x) = units().restore(x)",
    ),
    (
        "units",
        {"RESTORE": "super().restore(normalised) + 0 * self.size * normalised.mean(0)", "0 *": "0.1 *"},
        "restore",
    ),
    ("there_and_back", {"RESTORE": "super().restore(normalised.mul_(1.1))"}, "normalised targets as they were"),
    (
        "fold",
        {"FOLD": "Folding(super().fold().targets, super().fold().inputs)"},
        "fold().inputs.normalise(x) = inputs(x)",
    ),
    ("fold", {"INPUTS": "super().inputs(raw) * self.size", "1.0": "2.0"}, "fold().inputs.normalise(x) = inputs(x)"),
    ("fold", {"FOLD": "super().fold() if float(self.target_shift.sum()) else None"}, "check 'fold'"),
    (
        "needed",
        {"SCALE": "std.clamp_min(1e-3) + statistics[f'{name}s.rms'][:, None]"},
        "`fit` to read ('std',), as `needs`",
    ),
    ("needed", {"OBSERVE": "batch.inputs.mul_(2)"}, "batches as they were"),
    ("needed", {"RESET": "self.count = self.count * 0"}, "when fitted again"),
    ("sides", {"means)": "means[[0, 0]])"}, "normalised targets of layer 0 of the size"),
    ("sides", {"means)": "means[[1, 1]])"}, "they are shifted or scaled by what is known of targets"),
    ("sides", {"{name}s.std": "inputs.std"}, "normalised targets of layer 0 of the size"),
    (
        "sides",
        {"SCALE": "(std + statistics['targets.std']).clamp_min(1e-3)"},
        "normalised inputs of layer 0 of the size",
    ),
    ("causal", {"INPUTS": "super().inputs(raw) - super().inputs(raw).mean(0)"}, "as if it were alone"),
    (
        "causal",
        {"INPUTS": "super().inputs(raw) / super().inputs(raw).square().mean((1, 2), keepdim=True).sqrt()"},
        "`inputs` of layers up to 0 as before, when only later layers of x change",
    ),
    ("data_parallel", {"MEANS": "means = self.sums / self.count"}, "shift on data rank 0 of 2 as in one process"),
    (
        "data_parallel",
        {"MEANS": 'means = total(self.sums / self.count, over="tokens") / self.context.parallel.data_ranks'},
        "counts too",
    ),
    (
        "save_load",
        {"INPUTS": "super().inputs(raw) * self.size", "RESET": "self.size = 3.0"},
        "the same normalised inputs",
    ),
    (
        "save_load",
        {"INIT": "self.register_buffer('more', torch.zeros(3), persistent=False)", "RESET": "self.more += 1"},
        "save_load",
    ),
    (
        "precision",
        {"INIT": "self.register_buffer('more', torch.ones(3, dtype=context.dtype))"},
        "more in float32 or float64",
    ),
    ("precision", {"INPUTS": "super().inputs(raw).to(raw.dtype)"}, "normalised inputs in float32"),
    ("meta", {"INIT": "self.register_buffer('more', torch.ones(3))"}, "more on the CPU"),
    ("meta", {"BYTES": "self.sums.nbytes / 1"}, "a number of bytes"),
    ("no_sync", {"INPUTS": "super().inputs(raw) * float(self.input_scale.max() > 0)"}, "never waits for a GPU"),
    (
        "no_sync",
        {"RESTORE": "normalised", "INPUTS": "super().inputs(raw[raw[:, 0, 0].isfinite()])"},
        "never waits for a GPU",
    ),
]


@pytest.mark.parametrize(("check", "changes", "text"), FAULTS, ids=[f"{c}-{n}" for n, (c, _, _) in enumerate(FAULTS)])
def test_a_fault_is_found_by_the_check_that_is_for_it(failures: Any, check: str, changes: dict[str, str], text: str):
    found = failures(HEADER + NORMALISATION, only=f"/{check}", **{**RIGHT, **changes})
    assert f"mine/{check}" in found
    assert text in found[f"mine/{check}"]


def test_without_a_fault_it_conforms(failures: Any):
    assert failures(HEADER + NORMALISATION, **RIGHT) == {}
