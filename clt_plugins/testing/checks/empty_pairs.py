"""Steps with empty pairs, as on a GPU, where sizes do not follow the numbers: they are as steps without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clt_plugins.errors import Faults
from clt_plugins.model.assemble import Parts
from clt_plugins.testing.bench import Bench, idle_tokens
from clt_plugins.testing.checks.tensor_parallel import ROUNDING, scale
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same
from clt_plugins.training import learned

LOOK = {
    "activation": "`forward`: an empty pair has a pre-activation of -inf, which must become 0, also in `active`. The "
    "gradient of 0 · inf is NaN, and `torch.where` behind a product does not stop it: replace -inf before, as "
    "`pre.relu()` does",
    "losses": "the loss: `features.values` of an empty pair is 0, `extra.values` is -inf, and its gradient must be 0: "
    "`masked_fill(x == -inf, 0)`. Count by `features.counts()`, `l0()` and `active()`, not by the length of `values`",
}


@check("activation", "losses", needs=("sparse_is_dense",))
def empty_pairs(bench: Bench) -> None:
    """A step with empty pairs, as on a GPU, is the step of the dense reference, in float64: terms, gradients.

    There, pairs above a threshold have a fixed number of places, and those left over are empty; so are the places of a
    loss's selection while few features are dead. Losses are tried with the activation `relu`, unless `recipe` names
    one.
    """
    cases = [("", idle_tokens())]
    if bench.slot == "losses":
        few = torch.zeros_like(idle_tokens())
        few[0, 0] = 1000
        cases.append((", where one feature is dead", few))
    for what, idle in cases:
        dense, padded = with_places(bench, path="dense"), with_places(bench, path="sparse", fixed=True)
        batch = bench.batch(torch.float64)
        expected, outcome = (bench.step(parts, batch, idle=idle) for parts in (dense, padded))
        look = LOOK[bench.slot]
        for name, value in outcome.terms.items():
            text = f"the term {name!r} as without empty pairs{what}"
            expect(bool(torch.isfinite(value)), text, f"{float(value)}", look)
            same(value, expected.terms[name], text, look, ROUNDING)
        wanted, found = _gradients(dense), _gradients(padded)
        largest = scale(wanted.values(), expected.terms.values())
        for name, grad in found.items():
            text = f"the gradient of {name} as without empty pairs{what}"
            expect(bool(torch.isfinite(grad).all()), text, "NaN or infinity in it", look)
            expect(name in wanted, text, "the dense reference has none", look)
            same(grad, wanted[name], text, look, ROUNDING, largest)


def _gradients(parts: Parts) -> dict[str, Tensor]:
    """Of the transcoder's parameters and of the losses' own, by name."""
    return {name: p.grad for name, p in learned.parameters(parts).items() if p.grad is not None}


def with_places(bench: Bench, *, path: str, fixed: bool = False) -> Parts:
    """A run in float64; for what does not itself select, with an activation that leaves places empty where `fixed`, if
    it can be built with that."""
    changes: dict[str, Any] = {"transcoder": {"dtype": "float64", "path": path}}
    selects = bench.slot == "activation" or "activation" in bench.tables
    if not selects and "relu" in bench.plugins.choices("activation"):
        try:
            return bench.parts(fixed=fixed, **changes, activation={"name": "relu"})
        except Faults:
            pass
    return bench.parts(fixed=fixed, **changes)
