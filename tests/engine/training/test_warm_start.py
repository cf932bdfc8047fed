"""`[transcoder] from`: a run that begins with another transcoder computes what that one does, where it promises so.

A learning rate of 1e-30 changes no weight in float64, so one step shows what a run begins with.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins import CrossLayerTranscoder, Single, run
from clt_plugins.errors import Faults
from clt_plugins.model.assemble import assemble
from clt_plugins.model.warm_start.weights import WarmStart
from tests.support.helpers import ACTIVATIONS, TYINGS, plugins, recipe, tables
from tests.support.language_models import save_model, save_text

STILL = {"steps": 1, "lr": 1e-30, "eval_every": 1, "checkpoint_every": 1, "log_every": 1}
EXACT = {"rtol": 0.0, "atol": 1e-9}
"""In float64: weights that go through another normalisation lose some bits; the function is of the order of 1."""
TIED = {"name": "tied"}
SKIP = {"name": "untied", "skip": True}
SCALED = {"name": "per_source", "feature_scale": True, "skip": True}


def trained(folder: Path, **changes: Any) -> CrossLayerTranscoder:
    changes["transcoder"] = {"dtype": "float64", **changes.get("transcoder", {})}
    changes.setdefault("kernels", {"name": "torch"})  # nothing to compile
    return run(tables(**changes), out=folder, plugins=plugins())


def begun(folder: Path, old: Path, **changes: Any) -> CrossLayerTranscoder:
    """A run of one step that changes nothing."""
    changes["transcoder"] = {"from": str(old), **changes.get("transcoder", {})}
    changes["train"] = {**STILL, **changes.get("train", {})}
    return trained(folder, **changes)


def inputs(layers: int = 3, d_model: int = 6) -> torch.Tensor:
    return torch.randn(50, layers, d_model, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def stream_tables(tmp_path: Path) -> Callable[[list[int]], dict[str, Any]]:
    """A language model of three layers, of which some are transcribed."""
    model = save_model(tmp_path / "model", "llama")
    save_text(tmp_path / "text.jsonl", 60)
    source = {"name": "stream", "text": str(tmp_path / "text.jsonl"), "context": 24, "buffer_tokens": 64}
    return lambda layers: {"source": source, "model": {"path": str(model), "layers": layers}}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"as it is, {name}": ({"tying": tying}, {"tying": tying}) for name, tying in TYINGS.items()},
    **{
        f"as it is, {name}": ({"activation": one}, {"activation": one})
        for name, one in ACTIVATIONS.items()
        if name not in ("batchtopk", "topk-share")
    },
    "per_source to untied": ({"tying": SCALED}, {"tying": {"name": "untied", "skip": True}}),
    "per_target to untied": ({"tying": {"name": "per_target"}}, {}),
    "per_layer to untied": ({"tying": {"name": "per_layer"}}, {}),
    "tied encoder to a plain one": ({"encoder": {"name": "tied"}}, {"encoder": {"name": "plain"}}),
    "a skip path is added": ({}, {"tying": {"name": "untied", "skip": True}}),
    "wider, jumprelu": ({"activation": ACTIVATIONS["jumprelu"]}, {"transcoder": {"features": 17}}),
    "wider, ranked by norm": (
        {"activation": ACTIVATIONS["batchtopk-norm"]},
        {"activation": ACTIVATIONS["batchtopk-norm"], "transcoder": {"features": 17}},
    ),
    "new statistics": ({"tying": SCALED}, {"tying": SKIP, "transcoder": {"statistics": "new"}}),
    "another normalisation": ({"tying": SKIP, "normalisation": "rms"}, {"normalisation": "whitening"}),
    "from whitened": ({"tying": SKIP, "normalisation": "whitening"}, {"normalisation": "mean_std"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays(tmp_path, name):
    before, after = CASES[name]
    old = trained(tmp_path / "old", **before)
    kept = {key: before[key] for key in ("tying", "activation", "encoder") if key in before}
    # Other data: statistics that were not kept would be other ones.
    new = begun(tmp_path / "new", tmp_path / "old", seed=3, **{**kept, **after})
    x = inputs()
    torch.testing.assert_close(new(x), old(x), **EXACT)
    if new.n_features > old.n_features:
        added = new.tying.expand(0)[old.n_features :]
        assert added.abs().max() < 1e-29  # one step of training
        assert new.W_enc[:, old.n_features :].abs().min() > 0
    statistics = {**new.statistics()}
    same = all(
        torch.equal(value, old.statistics()[key]) for key, value in statistics.items() if key in old.statistics()
    )
    assert same == ("normalisation" not in after and "statistics" not in after.get("transcoder", {}))


def test_layers_are_added_between_those_that_there_were(tmp_path, stream_tables):
    # The layers of the language model say which is which.
    old = trained(tmp_path / "old", **stream_tables([0, 2]), activation=ACTIVATIONS["jumprelu"])
    new = begun(tmp_path / "new", tmp_path / "old", **stream_tables([0, 1, 2]), activation=ACTIVATIONS["jumprelu"])
    x = inputs(3, old.d_model)
    torch.testing.assert_close(new(x)[:, [0, 2]], old(x[:, [0, 2]]), **EXACT)
    assert new.target_variance[[0, 2]].equal(old.target_variance)
    with pytest.raises(Faults, match="layers can be added, not removed"):
        begun(tmp_path / "less", tmp_path / "new", **stream_tables([0, 2]), activation=ACTIVATIONS["jumprelu"])


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ({}, {"transcoder": {"features": 8}}, "transcoder.features: there are 10 features per layer"),
        ({}, {"tying": {"name": "per_source"}}, "tying: 'per_source' cannot hold exactly what 'untied'"),
        ({"tying": TYINGS["per_source-affine"]}, {"tying": {"name": "untied", "skip": True}}, "tying: .*offsets"),
        ({"tying": TYINGS["untied-skip"]}, {}, "tying: transcoder.from has W_skip, which this tying lacks"),
        ({"tying": SCALED}, {"transcoder": {"statistics": "new"}, "tying": SCALED}, "tying: 'per_source' cannot"),
        ({"activation": ACTIVATIONS["jumprelu"]}, {"activation": ACTIVATIONS["topk"]}, "activation: .*log_threshold"),
        ({"encoder": TIED}, {"encoder": TIED, "transcoder": {"features": 12}}, "encoder: .*added"),
        ({}, {"encoder": {"name": "tied"}}, "encoder: 'tied' cannot hold exactly what 'plain'"),
        ({"tying": {"name": "per_source"}}, {"tying": SCALED}, "tying: with these .* write feature_scale = false"),
        ({"encoder": {**TIED, "normalise": True}}, {"encoder": TIED}, "encoder: with these .* write normalise = true"),
        ({"encoder": TIED}, {"encoder": {**TIED, "normalise": True}}, "encoder: with these .* write normalise = false"),
        ({}, {"source": {"d_model": 8}}, "transcoder.from: d_model is 6 there and 8 here"),
    ],
)  # fmt: skip
def test_what_is_not_exact_is_refused_before_training(tmp_path, before, after, text):
    trained(tmp_path / "old", train=STILL, **before)
    with pytest.raises(Faults, match=text):
        begun(tmp_path / "new", tmp_path / "old", **after)
    assert not (tmp_path / "new" / "transcoder").exists()


def test_a_transcoder_that_is_not_there_and_a_setting_without_it_are_refused(tmp_path):
    with pytest.raises(Faults, match=r"^transcoder\.from: .*no such folder"):
        begun(tmp_path / "new", tmp_path / "nowhere")
    with pytest.raises(Faults, match=r"^transcoder\.statistics: is for a transcoder that begins `from` another"):
        trained(tmp_path / "new", transcoder={"statistics": "new"})


def test_a_change_of_the_function_is_told(tmp_path, caplog):
    trained(tmp_path / "old", train=STILL)
    begun(tmp_path / "k", tmp_path / "old", activation={"name": "batchtopk", "k": 3})
    begun(tmp_path / "f", tmp_path / "old", transcoder={"features": 11})
    told = [record.message for record in caplog.records if record.message.startswith("transcoder.from: the function")]
    assert len(told) == 2
    assert re.search("activation: batchtopk there; here batchtopk", told[0])
    assert re.search("added features compete", told[1])


@pytest.mark.parametrize("role", ["encoder", "decoder", "bias", "threshold"])
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_frozen_weights_stay_and_others_are_trained(tmp_path, role, path):
    names = {
        "encoder": {"W_enc"}, "decoder": {"W_dec.00", "W_dec.01", "W_dec.02", "W_skip"}, "bias": {"b_enc", "b_dec"},
        "threshold": {"log_threshold"},
    }  # fmt: skip
    changes = {"activation": ACTIVATIONS["jumprelu"], "tying": TYINGS["untied-skip"]}
    old = trained(tmp_path / "old", **changes)
    settings = {"from": str(tmp_path / "old"), "freeze": [role], "path": path}
    new = trained(tmp_path / "new", **changes, transcoder=settings, train={"clip_norm": 1.0})
    same = {name for name, value in new.tensors().items() if value.equal(old.tensors()[name])}
    assert same - {name for name in same if name.startswith("normaliser.")} == names[role]


def test_a_role_that_no_weight_has_is_refused():
    with pytest.raises(Faults, match=r"^transcoder\.freeze: there are no weights of the role 'threshold' here"):
        assemble(recipe(transcoder={"freeze": ["threshold"]}))


def test_a_resumed_run_needs_the_first_transcoder_no_more(tmp_path):
    trained(tmp_path / "old")
    settings = {"from": str(tmp_path / "old"), "freeze": ["encoder"]}
    straight = trained(tmp_path / "straight", transcoder=settings, train={"steps": 8})
    for steps in (4, 8):
        folder = tmp_path / "resumed"
        changes = {
            "transcoder": {"dtype": "float64", **settings},
            "train": {"steps": steps, "schedule_steps": 8},
            "kernels": {"name": "torch"},
        }
        resumed = run(tables(**changes), out=folder, resume="latest" if steps == 8 else None, plugins=plugins())
        (tmp_path / "old").rename(tmp_path / f"gone{steps}") if steps == 4 else None
    assert all(value.equal(straight.tensors()[name]) for name, value in resumed.tensors().items())


class Half(Single):
    """One of two tensor ranks, which sends nothing."""

    tensor_ranks = 2

    def __init__(self, rank: int):
        super().__init__()
        self.tensor_rank = rank

    def shard(self, features: int) -> range:
        first = -(-features // 2)
        return range(first) if self.tensor_rank == 0 else range(first, features)


@pytest.mark.parametrize("features", [11, 30])  # the second rank has 1 feature that there was, or none
def test_each_rank_gets_its_features(tmp_path, features):
    changes = {"tying": SCALED, "activation": ACTIVATIONS["jumprelu"]}
    old = trained(tmp_path / "old", **changes)
    made = recipe(**{**changes, "tying": {"name": "untied", "skip": True}},
                  transcoder={"features": features, "dtype": "float64"}, kernels={"name": "torch"})  # fmt: skip
    parts = [assemble(made, parallel=parallel) for parallel in (Single(), Half(0), Half(1))]
    for one in parts:
        WarmStart(one.transcoder, old).begin()
    single, *halves = (one.transcoder for one in parts)
    axes = single.feature_axes()
    for name, value in single.tensors().items():
        shares = [half.tensors()[name] for half in halves]
        for share in shares if axes[name] is None else [torch.cat(shares, axes[name])]:
            assert share.equal(value), name
