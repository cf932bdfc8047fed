"""Statistics of raw activations against plain formulas; how they reach a transcoder, and which are refused."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from clt_plugins import (
    Affine,
    AffineNormalisation,
    Batch,
    CrossLayerTranscoder,
    Imported,
    Moments,
    PluginError,
    Refused,
)
from clt_plugins.model.normalisation.fit import fit_to_batches, fit_to_source, fit_to_statistics
from clt_plugins.model.normalisation.statistics import estimate
from clt_plugins.model.normalisation.stored import check_buffers, detected_normalisation
from clt_plugins.recipe.structure import plain
from tests.support.helpers import parts, random_batch


def batches(mean: float = 3.0) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for tokens in (5, 17, 30):
        pair = [torch.randn(tokens, 2, 4, generator=generator, dtype=torch.float64) * 2 + mean for _ in range(2)]
        drawn.append(Batch(*pair))
    return drawn


@pytest.mark.parametrize("mean", [3.0, 1e6])
def test_streamed_statistics_are_those_of_all_tokens_together(mean):
    statistics = estimate(batches(mean), 2, 4)
    for side in ("inputs", "targets"):
        x = torch.cat([getattr(batch, side) for batch in batches(mean)])
        torch.testing.assert_close(statistics[f"{side}.mean"], x.mean(0), rtol=1e-12, atol=0)
        # A mean 500,000 times the deviation leaves ten digits of float64 for it.
        torch.testing.assert_close(statistics[f"{side}.std"], x.std(0), rtol=1e-9, atol=0)
        torch.testing.assert_close(statistics[f"{side}.rms"], x.square().mean((0, 2)).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mean", [3.0, 1e6])
def test_merged_moments_are_those_of_all_tokens(mean):
    halves = Moments(2, 4), Moments(2, 4)
    for moments, some in zip(halves, (batches(mean)[:1], batches(mean)[1:]), strict=True):
        for batch in some:
            moments.add(batch)
    merged = Moments(2, 4)
    for moments in (*halves, Moments(2, 4)):
        merged.merge(moments)
    assert merged.count == 52
    expected = estimate(batches(mean), 2, 4)
    for name, value in merged.statistics().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=0)


def test_statistics_need_two_tokens():
    with pytest.raises(ValueError, match="at least 2 tokens, got 0"):
        Moments(2, 4).statistics()
    one = batches()[0].rows(slice(0, 1))
    with pytest.raises(Refused, match=r"^train\.statistics_tokens: statistics need at least 2 tokens, got 1"):
        estimate([one], 2, 4)


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("side", "name"), [("inputs", "MLP inputs"), ("targets", "MLP outputs")])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_activation_that_is_not_finite_is_named_with_layer_dimension_and_type(side, name, number, dtype):
    drawn = [
        Batch(*(getattr(batch, s).to(getattr(torch, dtype)) for s in ("inputs", "targets"))) for batch in batches()
    ]
    getattr(drawn[1], side)[3, 1, 2] = number
    text = (
        rf"^source: an activation of layer 1 is not a finite number in {dtype}: {float(number)} in dimension 2 of its "
        rf"{name}: set model\.dtype = "
    )
    with pytest.raises(Refused, match=text):
        estimate(drawn, 2, 4)


def test_large_numbers_of_float16_are_no_infinity():
    pair = torch.full((2, 2, 4), 60000.0, dtype=torch.float16)
    pair[0] = -60000.0
    statistics = estimate([Batch(pair, pair)], 2, 4)
    assert statistics["inputs.rms"].tolist() == [60000.0, 60000.0]


def test_a_batch_must_hold_two_tensors_of_one_shape():
    with pytest.raises(ValueError, match="one shape"):
        Batch(torch.zeros(3, 2, 4), torch.zeros(3, 2, 5))


def test_statistics_of_another_shape_or_not_finite_are_refused():
    transcoder = parts().transcoder
    statistics = estimate([random_batch(20, 3, 6)], 3, 6)
    with pytest.raises(Refused, match=r"^source: statistics inputs\.mean: expected numbers of shape \(3, 6\), got \(4"):
        fit_to_statistics(transcoder, statistics | {"inputs.mean": torch.zeros(4, 6)})
    std = torch.ones(3, 6)
    std[1, 2] = torch.nan
    with pytest.raises(Refused, match=r"^source: statistics targets\.std: nan at layer 1, dimension 2; estimate them"):
        fit_to_statistics(transcoder, statistics | {"targets.std": std})
    with pytest.raises(Refused, match=r"^source: statistics targets\.std: -1\.0 at layer 0, dimension 0"):
        fit_to_statistics(transcoder, statistics | {"targets.std": torch.full((3, 6), -1.0)})


@pytest.mark.parametrize(
    ("name", "index", "number", "told"),
    [
        ("input_scale", (1, 2), 0.0, "0.0 at layer 1, dimension 2"),
        ("target_scale", (0, 3), torch.nan, "nan at layer 0, dimension 3"),
        ("input_scale", (0, 0), -1.0, "-1.0 at layer 0, dimension 0"),
        ("target_shift", (1, 1), torch.inf, "inf at layer 1, dimension 1"),
        ("target_variance", (1,), torch.nan, "nan at layer 1"),
    ],
)
def test_stored_statistics_that_make_no_sense_are_refused_with_the_file(name, index, number, told, tmp_path):
    transcoder = parts().transcoder
    fit_to_batches(transcoder, [random_batch(20, 3, 6)])
    transcoder.save(tmp_path / "good")
    assert CrossLayerTranscoder.load(tmp_path / "good").statistics()["input_scale"].shape == (3, 6)
    transcoder.tensors()[f"normaliser.{name}"][index] = number
    transcoder.save(tmp_path / "bad")
    file = tmp_path / "bad/transcoder.safetensors"
    with pytest.raises(Refused, match=rf"^{re.escape(f'{file}: normaliser.{name}: {told}')}"):
        CrossLayerTranscoder.load(tmp_path / "bad")


class Stored:
    """A source that stores some statistics."""

    def __init__(self, source: Any, *kinds: str):
        self.source = source
        statistics = estimate([random_batch(30, 3, 6, seed=3)], 3, 6)
        self.stored = {name: x for name, x in statistics.items() if name.split(".")[1] in kinds}

    def statistics(self) -> dict[str, Tensor]:
        return self.stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)


@pytest.mark.parametrize(
    ("normalisation", "kinds", "streamed"),
    [
        ("mean_std", ("mean", "std", "rms"), False),
        ("mean_std", ("mean", "rms"), True),
        ("rms", ("rms", "std"), False),
        ("rms", ("rms",), True),  # the variance of the targets is needed in any case
        ("none", ("std",), False),
        ("sqrt_d_model", ("mean", "std", "rms"), True),
        ("sqrt_d_model", ("std", "norm"), False),
        ("whitening", ("mean", "std", "rms", "norm"), True),
    ],
)
def test_statistics_are_the_sources_own_only_where_it_has_all_that_is_needed(normalisation, kinds, streamed):
    built = parts(normalisation=normalisation)
    source = Stored(built.source, *kinds)
    position = source.state()
    fit_to_source(built.transcoder, source, 40, 16)
    assert source.state() == position, "the batches are trained on as well"
    other = parts(normalisation=normalisation)
    if streamed:
        fit_to_batches(other.transcoder, [other.source.next() for _ in range(3)])  # 40 tokens are 3 batches of 16
    else:
        fit_to_statistics(other.transcoder, source.stored)
    ours, theirs = built.transcoder.tensors(), other.transcoder.tensors()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({}, "none"),
        ({"input_shift": 0.0, "target_scale": 1.0}, "none"),
        ({"input_shift": 0.5}, "mean_std"),
        ({"target_scale": 2.0, "target_shift": 0.0}, "mean_std"),
    ],
)
def test_the_normalisation_of_another_tools_statistics_is_detected(tensors, expected):
    stored = {f"normaliser.{name}": torch.full((2, 4), value) for name, value in tensors.items()}
    nothing: dict[str, Any] = {}
    imported = Imported(
        kind="",
        n_layers=2,
        d_model=4,
        n_features=3,
        activation=nothing,
        tying=nothing,
        model=nothing,
        tensor=stored.get,
    )
    assert detected_normalisation(imported) == expected


class Faulty(AffineNormalisation):
    def fit(self, statistics):
        self.get_buffer("target_scale")[1, 2] = torch.nan


def test_a_normalisation_that_fits_no_numbers_is_named():
    built = parts()
    built.transcoder.normaliser = Faulty(built.context)
    with pytest.raises(PluginError, match=r"normalisation: 'mean_std' .*: `fit` set 'target_scale' to nan at layer 1"):
        fit_to_batches(built.transcoder, [random_batch(20, 3, 6)])


def test_a_normalisation_has_buffers_only():
    built = parts()
    chosen = built.transcoder.choices["normalisation"]
    wrong = {"weight": "has a parameter 'weight': a normalisation is fitted", "target_variance": "name of the engine"}
    for name, told in wrong.items():
        module = AffineNormalisation(built.context)
        if name == "weight":
            module.weight = torch.nn.Parameter(torch.ones(3))
        else:
            module.register_buffer(name, torch.ones(3))
        with pytest.raises(PluginError, match=told):
            check_buffers(module, chosen)
    with pytest.raises(PluginError, match=r"is object, not a torch\.nn\.Module"):
        check_buffers(object(), chosen)


def test_affine_maps_are_products_with_a_scale_or_a_matrix():
    numbers = torch.Generator().manual_seed(0)
    shift = torch.randn(2, 3, generator=numbers, dtype=torch.float64)
    scale = torch.rand(2, 3, generator=numbers, dtype=torch.float64) + 0.5
    matrix = torch.randn(2, 3, 3, generator=numbers, dtype=torch.float64)
    x, row = torch.randn(2, 5, 2, 3, generator=numbers, dtype=torch.float64)
    for units in (Affine(shift, scale), Affine(shift, matrix, matrix.inverse())):
        whole = units.scale.diag_embed() if units.diagonal else matrix
        for token in range(5):
            for layer in range(2):
                expected = x[token, layer] @ whole[layer]
                torch.testing.assert_close(units.raw(x)[token, layer], expected)
                torch.testing.assert_close(units.restore(x)[token, layer], expected + shift[layer])
        torch.testing.assert_close(units.normalised(units.raw(x)), x)
        torch.testing.assert_close(units.normalise(units.restore(x)), x)
        product = (row * units.normalised(x)).sum(-1)
        torch.testing.assert_close((units.readers(row) * x).sum(-1), product)
        torch.testing.assert_close(units.layers(1).raw(x[:, 1:]), units.raw(x)[:, 1:])
    for wrong in ((shift, scale[:1], None), (shift, matrix, None), (shift, scale, matrix)):
        with pytest.raises(ValueError, match="shift must be"):
            Affine(*wrong)
    assert attrs.fields_dict(Affine)["inverse"].default is None


def test_another_tools_reader_may_name_the_normalisation_itself(tmp_path, monkeypatch):
    chosen = {"name": "whitening", "method": "pca", "shrinkage": 0.1, "sides": "both"}
    transcoder = parts(normalisation=chosen, activation={"name": "relu"}).transcoder
    fit_to_batches(transcoder, [random_batch(40, 3, 6)])

    class Reader:
        def recognises(self, folder: Any) -> bool:
            return True

        def read(self, folder: Any) -> Imported:
            return Imported(
                kind="mine",
                n_layers=3,
                d_model=6,
                n_features=10,
                activation={"name": "relu"},
                tying={"name": "untied"},
                model={},
                tensor=transcoder.tensors().get,
                normalisation=chosen,
            )

    monkeypatch.setattr("clt_plugins.model.saved.other_tools.find_reader", lambda folder, plugins: ("other", Reader()))
    loaded = CrossLayerTranscoder.load(tmp_path)
    assert plain(loaded.choices["normalisation"]) == chosen
    x = random_batch(9, 3, 6, seed=4).inputs
    assert torch.equal(loaded(x), transcoder(x))


def test_a_transcoder_that_names_its_normalisation_by_a_word_alone_is_read(tmp_path):
    transcoder = parts(normalisation="rms").transcoder
    fit_to_batches(transcoder, [random_batch(40, 3, 6)])
    transcoder.save(tmp_path / "saved")
    file, manifest = (tmp_path / "saved" / name for name in ("transcoder.json", "manifest.json"))
    described = json.loads(file.read_text())
    assert described["normalisation"] == {"name": "rms"}
    # As files were before normalisations had settings.
    before = file.read_bytes()
    file.write_text(json.dumps({**described, "normalisation": "rms"}))
    listed = json.loads(manifest.read_text())
    entry = listed["files"]["transcoder.json"]
    assert entry["sha256"] == hashlib.sha256(before).hexdigest()
    listed["files"]["transcoder.json"] = {
        **entry,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "bytes": file.stat().st_size,
    }
    manifest.write_text(json.dumps(listed))
    loaded = CrossLayerTranscoder.load(tmp_path / "saved")
    x = random_batch(9, 3, 6, seed=4).inputs
    assert torch.equal(loaded(x), transcoder(x)) and loaded.choices["normalisation"].name == "rms"
