"""Checks for `[activation]`: see `clt_plugins.contract.model.activation.Activation`."""

from __future__ import annotations

from unittest import SkipTest

import torch

from clt_plugins.contract.model.activation import Scheduled
from clt_plugins.testing.bench import FEATURES, LAYERS, TOKENS, Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same

IN_PLACE = "`see`: an operation in place (`relu_`, `+=`, `out=`) on its argument"


@check("activation")
def schedule(bench: Bench) -> None:
    """In eval mode features do not depend on the schedule: a checkpoint is judged alike at any step.

    Skipped where the activation has no `schedule`.
    """
    parts = bench.parts(transcoder={"dtype": "float64", "path": "sparse"})
    transcoder, inputs = parts.transcoder, bench.batch(torch.float64).inputs
    if not isinstance(transcoder.activation, Scheduled):
        raise SkipTest("it has no `schedule`")
    kept = []
    for progress in (0.0, 0.5, 1.0):
        transcoder.train()
        transcoder.activation.schedule(progress)
        transcoder.eval()
        with torch.no_grad():
            kept.append(transcoder.encode(inputs).dense())
        what = f"the features in eval mode at {progress:.0%} of the steps as at the first one"
        same(
            kept[-1], kept[0], what, "`schedule` and `selection`: ask `self.training` before what is scheduled is used"
        )


@check("activation", trial=True, basic=True)
def selection(bench: Bench) -> None:
    """`selection` returns sorted pairs with their pre-activations; values are [N] and never negative."""
    parts = bench.parts(transcoder={"dtype": "float64"})
    activation, look = parts.transcoder.activation, "`selection`: what its `finish` returns"
    expect(
        isinstance(activation, torch.nn.Module),
        "a torch.nn.Module from `build`",
        type(activation).__name__,
        "the base class",
    )
    expect(
        isinstance(activation.fixed_size, bool),
        "`fixed_size`, True or False",
        repr(activation.fixed_size),
        "the class of what `build` returns",
    )
    sizes = []
    for seed in range(3):
        numbers = torch.Generator().manual_seed(seed)
        pre = torch.randn(TOKENS, LAYERS, FEATURES, generator=numbers, dtype=torch.float64)
        with torch.no_grad():
            chosen = activation.selection(TOKENS, parts.transcoder.tying.norms)
            for layer in range(LAYERS):
                # The block is gone afterwards, as in a run.
                block = pre[:, layer].clone()
                chosen.see(layer, block)
                same(block, pre[:, layer], "`see` to leave the block as it is: other selections read it too", IN_PLACE)
                block.fill_(torch.nan)
            pairs, kept = chosen.finish()
        shape = (pairs.tokens, pairs.n_layers, pairs.n_features)
        expect(shape == (TOKENS, LAYERS, FEATURES), f"pairs of {(TOKENS, LAYERS, FEATURES)}", str(shape), look)
        order = pairs.token * (LAYERS * FEATURES) + pairs.feature
        expect(bool((order[1:] >= order[:-1]).all()), "pairs sorted by token, then feature", "another order", look)
        same(
            kept,
            pre.flatten(1)[pairs.token, pairs.feature],
            "the pre-activation of each pair",
            f"{look}: is a block kept without a copy, or changed in place?",
        )
        values = activation(kept, pairs.feature)
        for some, feature in ((pre.flatten(1)[pairs.token, pairs.feature] - 1, pairs.feature), (pre.clone(), None)):
            before = some.clone()
            activation(some, feature)
            same(
                some,
                before,
                "`forward` to leave the pre-activations as they are: losses and the backward pass read them too",
                IN_PLACE.replace("`see`", "`forward`"),
            )
        look_values = "`forward`: an elementwise function of `pre`, ending in what cannot be negative"
        expect(values.shape == kept.shape, f"values {list(kept.shape)}", str(list(values.shape)), look_values)
        expect(bool((values >= 0).all()), "values >= 0", f"{float(values.detach().min()):g} among them", look_values)
        sizes.append(len(kept))
    if activation.fixed_size:
        expect(len(set(sizes)) == 1, "the same number of pairs in every batch (fixed_size)", str(sizes), look)
