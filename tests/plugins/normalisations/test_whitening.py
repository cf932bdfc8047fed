"""Whitening against its definition: the identity as covariance, an exact way back, and the same after an export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from clt_normalisations.whitening import Covariance
from clt_plugins import Batch, CrossLayerTranscoder, Features, Forward, Single, run
from clt_plugins.model.normalisation.fit import fit_to_batches
from clt_plugins.training.plan.build import plan
from tests.support.exports import circuit_tracer_forward, close, export, load, make
from tests.support.helpers import parts, plugins, recipe, tables

L, D = 3, 6
SIDES = ("inputs", "targets")


def batches(tokens: int = 400) -> list[Batch]:
    """Activations whose dimensions go together, of different sizes and with means."""
    numbers = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, L, D, D, generator=numbers, dtype=torch.float64) * torch.logspace(-1, 1, D)
    means = 5 * torch.randn(2, L, D, generator=numbers, dtype=torch.float64)
    drawn = []
    for size in (tokens // 4, tokens // 8, tokens - tokens // 4 - tokens // 8):
        plain = torch.randn(2, size, L, D, generator=numbers, dtype=torch.float64)
        sides = zip(plain, mixing, means, strict=True)
        drawn.append(Batch(*(torch.einsum("bld,lde->ble", x, matrix) + mean for x, matrix, mean in sides)))
    return drawn


def fitted(drawn: list[Batch] | None = None, dtype: str = "float64", **settings: Any) -> CrossLayerTranscoder:
    transcoder = parts(normalisation={"name": "whitening", **settings}, transcoder={"dtype": dtype}).transcoder
    fit_to_batches(transcoder, drawn or batches())
    return transcoder


def whole(side: str) -> Tensor:
    return torch.cat([getattr(batch, side) for batch in batches()])


def covariance(x: Tensor) -> Tensor:
    """By loops over pairs of dimensions."""
    out = torch.zeros(L, D, D, dtype=torch.float64)
    for layer in range(L):
        for i in range(D):
            for j in range(D):
                a, b = x[:, layer, i], x[:, layer, j]
                out[layer, i, j] = ((a - a.mean()) * (b - b.mean())).sum() / (len(x) - 1)
    return out


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("method", ["zca", "pca"])
def test_without_shrinkage_the_covariance_is_the_identity_and_the_mean_is_zero(method, side):
    normaliser = fitted(method=method, shrinkage=0.0).normaliser
    x = getattr(normaliser, side)(whole(side))
    # Sums of float64 over 400 tokens, through matrices of condition 1e3: 1e-9 leaves a factor of ten.
    torch.testing.assert_close(x.mean(0), torch.zeros(L, D, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(covariance(x), torch.eye(D, dtype=torch.float64).expand(L, D, D), rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_zca_is_the_symmetric_root_and_pca_is_along_the_components_the_largest_first(side):
    expected = covariance(whole(side))
    folding = fitted(shrinkage=0.0).normaliser.fold()
    root = getattr(folding, side).scale
    torch.testing.assert_close(root, root.mT)
    torch.testing.assert_close(root @ root, expected, rtol=1e-9, atol=1e-9)
    rows = getattr(fitted(shrinkage=0.0, method="pca").normaliser.fold(), side).scale
    # Each row is a component, as long as the activations deviate along it.
    along = rows @ rows.mT
    deviations = along.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(along, deviations.diag_embed(), rtol=0, atol=1e-8)
    assert bool((deviations.diff(dim=1) < 0).all())
    for layer in range(L):
        for row in rows[layer]:
            torch.testing.assert_close(expected[layer] @ row, row * row.square().sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("share", [0.001, 0.3, 1.0])
def test_shrinkage_replaces_a_share_of_the_covariance_by_the_mean_variance(share):
    found = covariance(whole("inputs"))
    mean = found.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(D, dtype=torch.float64)
    root = fitted(shrinkage=share).normaliser.fold().inputs.scale
    torch.testing.assert_close(root @ root, (1 - share) * found + share * mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"method": "pca"}, {"shrinkage": 0.0}, {"sides": "inputs"}])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("bfloat16", 1e-5)])
def test_restoring_undoes_it(settings, dtype, tolerance):
    normaliser = fitted(dtype=dtype, **settings).normaliser
    x = whole("targets").to(normaliser.units().shift.dtype)  # float32 beside weights in bfloat16
    close(normaliser.restore(normaliser.targets(x)), x, tolerance)


@pytest.mark.parametrize("sides", SIDES)
def test_the_other_side_is_normalised_as_by_mean_std(sides):
    other = "targets" if sides == "inputs" else "inputs"
    plain = parts(normalisation="mean_std", transcoder={"dtype": "float64"}).transcoder
    fit_to_batches(plain, batches())
    ours = fitted(sides=sides).normaliser.fold()
    theirs = plain.normaliser.fold()
    for name in ("shift", "scale"):
        torch.testing.assert_close(getattr(getattr(ours, other), name), getattr(getattr(theirs, other), name))
    assert getattr(ours, other).diagonal and not getattr(ours, sides).diagonal


@pytest.mark.parametrize("shrinkage", [0.0, 0.001])
def test_constant_dimensions_and_layers_stay_finite(shrinkage):
    drawn = batches()
    for batch in drawn:
        batch.inputs[:, 0, 2] = 0.3
        batch.targets[:, 1] = -2.0
    normaliser = fitted(drawn, "float32", shrinkage=shrinkage).normaliser
    for side in SIDES:
        assert getattr(normaliser, side)(getattr(drawn[0], side)).isfinite().all()
    close(normaliser.restore(normaliser.targets(drawn[0].targets.float())), drawn[0].targets.float(), 1e-5)


@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_the_streamed_covariance_is_that_of_all_tokens_on_one_rank_or_two(mean):
    x = whole("inputs") + mean
    expected = covariance(x)
    sums = Covariance(L, D, torch.device("cpu"))
    for part in x.split(70):
        sums.add(part)
    # A mean 1e5 times the smallest deviation leaves six digits of float64 for its square.
    tolerance = 1e-12 if mean == 0 else 1e-8
    close(torch.stack(list(sums.layers(Single()))), expected, tolerance)
    ranks = [Covariance(L, D, torch.device("cpu")) for _ in range(2)]
    for rank, part in zip(ranks, x.split([90, 310]), strict=True):
        rank.add(part)
    totals = Totals(ranks)
    close(torch.stack(list(ranks[0].layers(totals))), expected, tolerance)


class Totals(Single):
    """Two ranks in one process: the other one's part of each sum is worked out when it is asked for."""

    def __init__(self, ranks: list[Covariance]):
        super().__init__()
        self.other = iter(_sums(ranks))

    def total(self, x: Tensor, over: str = "features", what: str = "metrics") -> Tensor:
        assert over == "tokens"
        return x + next(self.other)


def _sums(ranks: list[Covariance]) -> Any:
    """What the second rank would hand in, in order: its count, its sum, and its products about the mean of all."""
    first, second = ranks
    assert first.shift is not None and second.shift is not None
    yield torch.tensor(second.count)
    own = second.first + second.count * second.shift
    yield own
    mean = (own + first.first + first.count * first.shift) / (first.count + second.count)
    for layer in range(L):
        step = second.shift[layer] - mean[layer]
        cross = torch.outer(step, second.first[layer])
        yield second.second[layer] + cross + cross.T + second.count * torch.outer(step, step)


def test_a_trained_whitening_transcoder_is_the_same_in_circuit_tracers_format(tmp_path):
    chosen = tables(
        normalisation={"name": "whitening", "shrinkage": 0.01},
        activation={"name": "jumprelu", "threshold": 0.05},
        losses=[{"name": "mse"}],
    )
    trained = run(chosen, out=tmp_path / "run").eval()
    trained.described_model = {"path": "some/model"}
    x = torch.cat([parts(**chosen).source.next().inputs for _ in range(3)])
    outputs = trained(x).detach()
    assert trained.encode(x).dense().any() and outputs.std() > 0.01
    folder = export(trained, "circuit-tracer", tmp_path / "out")
    close(circuit_tracer_forward(folder, x), outputs, 1e-5)
    close(load(folder)(x).detach(), outputs, 1e-5)


def test_a_skip_path_and_offsets_are_folded_too(tmp_path):
    tying = {"name": "per_source", "feature_offset": True, "feature_scale": True, "skip": True}
    transcoder = make(tying=tying, normalisation="whitening")
    with torch.no_grad():  # the same for all targets, else no format holds it
        transcoder.tying.offset.copy_(transcoder.tying.offset[:1].abs().expand_as(transcoder.tying.offset))
    x = batches()[0].inputs.float()
    folder = export(transcoder, "safetensors", tmp_path / "out")
    close(plain_forward(folder / "clt.safetensors", x), transcoder(x).detach(), 1e-5)


def plain_forward(file: Any, x: Tensor) -> Tensor:
    """What the file's tensors amount to, as `SafetensorsConfig` describes them."""
    tensors = load_file(file)
    out = tensors["b_dec"].expand(len(x), -1, -1).clone()
    for layer in range(L):
        pre = x[:, layer] @ tensors["W_enc"][layer].T + tensors["b_enc"][layer]
        acts = pre * (pre > tensors["threshold"][layer])
        out[:, layer] += x[:, layer] @ tensors["W_skip"][layer]
        for target in range(layer, L):
            out[:, target] += acts @ tensors[f"W_dec.{layer:02}"][:, target - layer]
    return out


def test_saved_and_loaded_it_is_the_same_and_the_file_names_it(tmp_path):
    transcoder = fitted(dtype="float32", method="pca", sides="targets")
    transcoder.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    x = batches()[0]
    assert torch.equal(loaded.normaliser.targets(x.targets), transcoder.normaliser.targets(x.targets))
    chosen = loaded.choices["normalisation"]
    assert (chosen.name, chosen.config.method, chosen.config.sides) == ("whitening", "pca", "targets")


def test_a_plan_counts_its_matrices_and_what_it_gathers():
    needs = plan(recipe(normalisation="whitening"), plugins())
    assert needs.bytes.normalisation == 4 * (2 * L * D + 4 * L * D * D)
    assert needs.bytes.statistics == 2 * 8 * L * D * D
    assert plan(recipe(), plugins()).bytes.normalisation == 4 * 4 * L * D


@pytest.mark.parametrize("scale", ["raw", "variance"])
def test_the_squared_error_is_that_of_raw_activations_with_its_gradient(scale):
    transcoder, batch = fitted(), batches()[0]
    x, targets = transcoder.normaliser.inputs(batch.inputs), transcoder.normaliser.targets(batch.targets)
    reconstruction = (targets + 0.1 * x).requires_grad_()
    forward = Forward(
        batch=batch,
        inputs=x,
        targets=targets,
        features=Features(torch.zeros(len(x), L, 10)),
        reconstruction=reconstruction,
        units=transcoder.normaliser.units(),
        variance=transcoder.target_variance,
        norms=lambda: torch.ones(L, 10),
        idle_tokens=torch.zeros(L, 10, dtype=torch.int64),
        decode=lambda features: x,
        sum_features=lambda total: total,
        extra=None,
        pre=None,
        progress=0.0,
        step=0,
        steps=1,
        steps_done=0,
    )
    (term,) = parts(losses=[{"name": "mse", "scale": scale}]).losses[0](forward).values()
    by_layer = (transcoder.normaliser.restore(reconstruction) - batch.targets).square().mean((0, 2))
    expected = (by_layer / (transcoder.target_variance if scale == "variance" else 1)).sum()
    torch.testing.assert_close(term, expected, rtol=1e-10, atol=0)
    found, wanted = (torch.autograd.grad(loss, reconstruction)[0] for loss in (term, expected))
    close(found, wanted, 1e-10)
