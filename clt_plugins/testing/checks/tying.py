"""Checks for `[tying]`: see `clt_plugins.contract.model.tying.Tying`."""

from __future__ import annotations

from unittest import SkipTest

import torch

from clt_plugins.contract.model.tying import FeatureRows, Shifted
from clt_plugins.data.features import Features
from clt_plugins.errors import Faults
from clt_plugins.testing.bench import D_MODEL, FEATURES, LAYERS, Bench
from clt_plugins.testing.checks.training_step import ROUNDING, in_views
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same


@check("tying", trial=True, basic=True)
def decoder(bench: Bench) -> None:
    """Shapes; no feature writes to an earlier layer; `expand` and `norms` agree with `decode`; `views` names every
    parameter."""
    parts = bench.parts(transcoder={"dtype": "float64"})
    tying = parts.transcoder.tying
    expect(isinstance(tying, torch.nn.Module), "a torch.nn.Module from `build`", type(tying).__name__, "the base class")
    in_views(tying)
    for layer in range(LAYERS):
        active = torch.zeros(FEATURES, LAYERS, FEATURES, dtype=torch.float64)
        active[:, layer] = 2 * torch.eye(FEATURES, dtype=torch.float64)
        with torch.no_grad():
            written = tying.decode(Features(active))
        shape = [FEATURES, LAYERS, D_MODEL]
        expect(list(written.shape) == shape, f"decode to give {shape}", str(list(written.shape)), "`decode`")
        expect(
            not bool(written[:, :layer].any()),
            f"features of layer {layer} write to layers {layer} to {LAYERS - 1} only",
            "something in an earlier layer",
            "`decode`: which targets a source reaches",
        )
        try:
            rows = tying.expand(layer)
            shift = tying.shift(layer) if isinstance(tying, Shifted) else None
        except Faults:
            continue  # it refuses: no rows hold what it writes
        values = torch.full((FEATURES, 1, 1), 2.0, dtype=torch.float64)
        if shift is not None:
            values = values + shift.detach()[:, None, None]
        shape = [FEATURES, LAYERS - layer, D_MODEL]
        expect(list(rows.shape) == shape, f"expand({layer}) to give {shape}", str(list(rows.shape)), "`expand`")
        expect(not rows.requires_grad, "detached rows", "they require a gradient", "`expand`")
        same(
            written[:, layer:],
            values * rows,
            f"decode to write value · expand({layer})",
            "`expand` or `decode`",
            ROUNDING,
        )
        norms = rows.flatten(1).norm(dim=1).float()
        same(
            tying.norms()[layer].float(),
            norms,
            f"norms[{layer}] to be those of expand({layer}), over all targets",
            "`norms`",
            1e-5,
        )
    norms = tying.norms()
    shape = [LAYERS, FEATURES]
    expect(list(norms.shape) == shape, f"norms {shape}", str(list(norms.shape)), "`norms`")
    expect(not norms.requires_grad, "detached norms", "they require a gradient", "`norms`")
    x = torch.randn(5, LAYERS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    affine = tying.affine(x).expand(5, -1, -1)
    shape = [5, LAYERS, D_MODEL]
    expect(list(affine.shape) == shape, f"affine to broadcast to {shape}", str(list(affine.shape)), "`affine`")


@check("tying")
def feature_rows(bench: Bench) -> None:
    """Doubling a feature's rows through the view doubles what `expand` gives for it, and changes no other feature.

    Skipped where features have no rows of their own (`FeatureRows`).
    """
    tying = bench.parts(transcoder={"dtype": "float64"}).transcoder.tying
    if not isinstance(tying, FeatureRows):
        raise SkipTest("features have no rows of their own")
    assert isinstance(tying, torch.nn.Module)
    look = "`feature_rows`: the parameter's name, and a view of it (no copy), [F, n, D], with the rows of that layer"
    for layer in range(LAYERS):
        expected = [tying.expand(source).clone() for source in range(LAYERS)]
        name, view = tying.feature_rows(layer)
        with torch.no_grad():
            rows = view(tying.get_parameter(name))
            fits = rows.dim() == 3 and len(rows) == FEATURES and rows.shape[1] in (1, LAYERS - layer)
            expect(fits, f"[{FEATURES}, {LAYERS - layer} or 1, D] for layer {layer}", str(list(rows.shape)), look)
            rows[3] *= 2
        expected[layer][3] *= 2
        for source, before in enumerate(expected):
            what = f"expand({source}), where the rows of feature 3 of layer {layer} are doubled"
            same(tying.expand(source), before, what, look, ROUNDING)
