"""A training step on a GPU waits for nothing and mixes no devices: every activation × tying × loss, on one rank and
several."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from clt_plugins.registry.plugins import Plugins, load_plugins
from tests.gpu.absent import absent_gpu
from tests.gpu.steps import Ranks, Sizes, assembled, joined, recipe, run
from tests.gpu.watch import Watch
from tests.support.helpers import ENCODERS

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

LEVELS: dict[str, list[Any]] = {
    "activation": ["relu", "jumprelu", "topk", "batchtopk"],
    "scope": ["global", "layer", "k of each layer"],
    "ranking": ["raw", "norm", "zscore"],
    "encoder": ["plain", "pre_bias", "tied", "tied-scaled", "low_rank"],
    "tying": ["untied", "per_source", "per_target", "per_layer"],
    "options": ["plain", "skip", "offset, scale and skip"],
    "loss": ["mse", "auxk", "tanh_sparsity", "preactivation", "depth"],
    "numbers": ["bf16 weights", "fp32", "fp32, bf16 product", "fp32, bf16 moments"],
    "way": ["sparse, triton", "sparse, torch", "dense"],
    # Of three, the batch of 16 tokens is no multiple: they do not split it, as others do.
    "ranks": [Ranks(), Ranks(tensor=3), Ranks(tensor=2, data=2)],
}

NUMBERS = {
    "bf16 weights": ({"dtype": "bfloat16"}, {}, "fp32"),
    "fp32": ({}, {}, "fp32"),
    "fp32, bf16 product": ({}, {"precision": "bf16"}, "fp32"),
    "fp32, bf16 moments": ({}, {}, "bf16"),
}

Combination = dict[str, Any]

PLAIN: Combination = {name: levels[0] for name, levels in LEVELS.items()} | {"activation": "batchtopk"}

KNOWN: dict[tuple[str, str], tuple[Combination, str]] = {}
"""(kind, function) that is not mended yet -> where it shows, and why. The test of it fails as soon as it is mended."""


def _tables(chosen: Combination) -> dict[str, Any]:
    activation: dict[str, Any] = {"name": chosen["activation"]}
    if activation["name"] in ("topk", "batchtopk"):
        of_each = chosen["scope"] == "k of each layer"
        activation |= {"k": [3, 1, 2]} if of_each else {"k": 6, "scope": chosen["scope"]}
        activation["ranking"] = chosen["ranking"]
    tying: dict[str, Any] = {"name": chosen["tying"]}
    if chosen["options"] != "plain":
        tying["skip"] = True
    if chosen["options"].startswith("offset") and tying["name"] in ("per_source", "per_target"):
        tying |= {"feature_offset": True, "feature_scale": True}
    losses: list[dict[str, Any]] = [{"name": "mse"}]
    # A decoder that writes to no later layer is refused with `depth`.
    if chosen["loss"] != "mse" and (chosen["loss"], tying["name"]) != ("depth", "per_layer"):
        losses.append({"name": chosen["loss"]} | ({"k": 4} if chosen["loss"] == "auxk" else {}))
    transcoder, train, states = NUMBERS[chosen["numbers"]]
    way, _, kernels = chosen["way"].partition(", ")
    optimizer = {"name": "adam", "states": states} if "optimizer" not in chosen else {"name": chosen["optimizer"]}
    return {
        "transcoder": {"path": way, **transcoder},
        "encoder": ENCODERS[chosen["encoder"]],
        "activation": activation,
        "tying": tying,
        "losses": losses,
        "kernels": {"name": kernels or "auto"},
        "train": {"clip_norm": 1.0, **train},
        "optimizer": optimizer,
    }


def _events(chosen: Combination, plugins: Plugins) -> Counter[tuple[str, str]]:
    """What waits or mixes devices in a steady step: kind and function."""
    sizes = Sizes(n_layers=3, d_model=32, dtype=torch.bfloat16)

    with absent_gpu(Watch()) as watch, joined(chosen["ranks"]) as parallel:
        wanted = recipe(plugins, _tables(chosen))
        run(assembled(wanted, sizes, parallel), wanted, watch, watch.events.clear)
    found: Counter[tuple[str, str]] = Counter()
    for (kind, operation, place), count in watch.events.items():
        function = place.partition(" < ")[0].rpartition(":")[0]
        assert function, (kind, operation)
        found[kind, function] += count
    return found


def covering(strength: int) -> Iterator[Combination]:
    """Few combinations that have every two levels of every two choices together (strength 2); every three of three."""
    names = list(LEVELS)
    missing: dict[tuple[tuple[str, int], ...], None] = {}  # a set that keeps its order
    for some in itertools.combinations(names, strength):
        for levels in itertools.product(*(range(len(LEVELS[name])) for name in some)):
            missing[tuple(zip(some, levels, strict=True))] = None
    draw = random.Random(0)
    while missing:
        best: tuple[int, dict[str, int]] = (0, {})
        left = list(missing)
        # Begin with one that is missing, draw the rest, keep the draw that covers most.
        for _ in range(60):
            one = dict(draw.choice(left))
            one |= {name: draw.randrange(len(levels)) for name, levels in LEVELS.items() if name not in one}
            covered = sum(some in missing for some in itertools.combinations([(n, one[n]) for n in names], strength))
            best = max(best, (covered, one), key=lambda scored: scored[0])
        chosen = best[1]
        for some in itertools.combinations([(n, chosen[n]) for n in names], strength):
            missing.pop(some, None)
        yield {name: levels[chosen[name]] for name, levels in LEVELS.items()}


def _name(chosen: Combination) -> str:
    ranks = chosen["ranks"]
    return "-".join([*(v for v in chosen.values() if isinstance(v, str)), f"{ranks.tensor}x{ranks.data}"])


def _assert_asynchronous(chosen: Combination, plugins: Plugins) -> None:
    unknown = {place: count for place, count in _events(chosen, plugins).items() if place not in KNOWN}
    assert not unknown, "\n".join(f"{count} × {kind} in {place}" for (kind, place), count in unknown.items())


@pytest.mark.parametrize("chosen", list(covering(2)), ids=_name)
def test_a_step_waits_for_nothing(chosen, plugins):
    _assert_asynchronous(chosen, plugins)


@pytest.mark.parametrize("optimizer", ["adamw", "rowwise_adam", "muon"])
def test_no_optimizer_waits(optimizer, plugins):
    _assert_asynchronous({**PLAIN, "numbers": "fp32", "optimizer": optimizer}, plugins)


def test_adafactor_waits_as_its_settings_say(plugins):
    """torch's own reads the norms of weights and updates, and nothing else waits."""
    assert {kind for kind, _ in _events({**PLAIN, "numbers": "fp32", "optimizer": "adafactor"}, plugins)} == {
        "reads a number"
    }


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=pytest.mark.xfail(strict=True, reason=why)) for place, (_, why) in KNOWN.items()],
)
def test_known(place, plugins):
    assert place not in _events(PLAIN | KNOWN[place][0], plugins)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_no_step_waits(part, plugins):
    """Every three choices together. The whole product, 10^5 steps, would take days."""
    for chosen in itertools.islice(covering(3), part, None, 12):
        _assert_asynchronous(chosen, plugins)


if __name__ == "__main__":  # what waits today, over all combinations of the short form
    seen: Counter[tuple[str, str]] = Counter()
    found = load_plugins()
    for each in covering(2):
        seen += _events(each, found)
    for (kind, place), count in sorted(seen.items()):
        print(count, kind, place)
