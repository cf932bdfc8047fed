"""Cases that ranks and one process compute: transcoders with their losses, and a rank's part of each. What is compared
is one pass forward and backward, and weights after some steps.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch

from clt_parallel.grid import Grid
from clt_plugins import Forward
from clt_plugins.contract.recipe import Recipe
from clt_plugins.model.assemble import Parts, assemble
from clt_plugins.model.devices import make_parallel
from clt_plugins.training.objective import objective
from clt_plugins.training.optimizers.clip import clip_gradients, gradient_norm
from clt_plugins.training.optimizers.make import make_optimizer
from tests.support.helpers import ACTIVATIONS, ALL_LOSSES, ENCODERS, TYINGS, plugins, random_batch, recipe, stir

TOKENS, FEATURES = 12, 10
LOSSES = [
    *ALL_LOSSES,
    {"name": "preactivation", "weight": 0.3},
    {"name": "matryoshka", "weight": 0.4, "prefixes": [0.3, 0.6]},
    {"name": "depth", "weight": 0.2},
]
TYPES = {"float64": torch.float64, "float32": torch.float32}


@attrs.frozen
class Case:
    """One transcoder and its losses."""

    activation: str
    tying: str
    path: str = "sparse"
    dtype: str = "float64"
    losses: tuple[str, ...] = ("mse", "tanh_sparsity", "auxk")
    kernels: str = "torch"
    encoder: str = "plain"

    @property
    def name(self) -> str:
        return "-".join((self.activation, self.tying, self.path, self.dtype, *self.losses, self.kernels, self.encoder))

    def recipe(self) -> Recipe:
        return recipe(
            encoder=ENCODERS[self.encoder],
            activation=ACTIVATIONS[self.activation],
            tying=TYINGS[self.tying],
            losses=[loss for loss in LOSSES if loss["name"] in self.losses],
            transcoder={"features": FEATURES, "path": self.path, "dtype": self.dtype, "device": "cpu"},
            kernels={"name": self.kernels},
            train={"batch_tokens": TOKENS, "clip_norm": 0.5, "lr": 1e-3, "steps": 50},
        )


CASES = [
    *(Case(activation, "untied") for activation in ACTIVATIONS),
    *(Case("topk", tying) for tying in TYINGS if tying != "untied"),
    *(Case(activation, "per_source-affine") for activation in ("jumprelu", "batchtopk-norm")),
    *(Case(activation, "per_target-affine", dtype="float32") for activation in ("jumprelu", "batchtopk", "topk")),
    *(Case(activation, "untied-skip", path="dense") for activation in ("relu", "jumprelu", "batchtopk")),
    Case("batchtopk", "untied-skip", kernels="numba"),
    Case("batchtopk", "untied-skip", losses=("mse", "auxk", "preactivation")),
    Case("topk", "untied-skip", losses=("auxk", "matryoshka", "depth")),
    *(Case("batchtopk", "untied", encoder=encoder) for encoder in ENCODERS if encoder != "plain"),
]


def idle_tokens(layers: int = 3) -> torch.Tensor:
    """Some features are dead, so that AuxK has something to do."""
    idle = torch.zeros(layers, FEATURES, dtype=torch.int64)
    idle[:, ::3] = 1000
    return idle


def whole(case: Case) -> Parts:
    """The case in one process, with every parameter stirred."""
    built = assemble(case.recipe(), parallel=make_parallel("single", plugins()))
    stir(built.transcoder)
    return built


def part(case: Case, grid: Grid) -> Parts:
    """This rank's part of `whole`."""
    built = assemble(case.recipe(), parallel=grid)
    first = assemble(case.recipe(), parallel=make_parallel("single", plugins())).transcoder
    for name, value in cut(first, grid).items():
        assert torch.equal(cut(built.transcoder)[name], value), f"{name} does not start as in one process"
    with torch.no_grad():
        for name, value in cut(whole(case).transcoder, grid).items():
            cut(built.transcoder)[name].copy_(value)
    return built


def cut(transcoder: Any, grid: Grid | None = None, of: str = "data") -> dict[str, torch.Tensor]:
    """Parameters (or their gradients, or their momentum) by file name, cut to a rank's features if a grid is given."""
    out = {}
    for name, (owner, view, axis) in transcoder.views().items():
        value = view(getattr(transcoder.get_parameter(owner), of).detach())
        if grid is not None and axis is not None:
            shard = grid.shard(value.shape[axis])
            value = value.narrow(axis, shard.start, len(shard))
        out[name] = value
    return out


class Whole:
    """A loss that reads the whole reconstruction, as those of other people may."""

    needs_pre = False

    def selection(self, tokens: int, idle_tokens: torch.Tensor) -> None:
        return None

    def __call__(self, forward: Forward) -> dict[str, torch.Tensor]:
        return {"whole": (forward.reconstruction - forward.targets).pow(4).mean()}


def one_pass(case: Case, built: Parts) -> dict[str, torch.Tensor]:
    """A forward and a backward pass: all that is compared with one process."""
    parallel, transcoder = built.context.parallel, built.transcoder
    share = TOKENS // parallel.data_ranks
    rows = slice(parallel.data_rank * share, (parallel.data_rank + 1) * share)
    batch = random_batch(TOKENS, 3, 6, TYPES[case.dtype]).rows(rows)
    shard = parallel.shard(FEATURES)
    idle = idle_tokens()[:, shard.start : shard.stop]
    outcome = objective(transcoder, [*built.losses, Whole()], batch, idle, 0.5)
    outcome.total.backward()
    parameters = list(transcoder.parameters())
    parallel.reduce_gradients(parameters)
    out = {f"term.{name}": value for name, value in outcome.terms.items()}
    out["norm"] = gradient_norm(parameters, parallel)
    out["reconstruction"] = outcome.reconstruction
    out["features"] = outcome.features.dense().detach()
    if outcome.features.pairs is not None:
        chosen = torch.zeros(outcome.features.shape, dtype=torch.bool)
        chosen.view(share, -1)[outcome.features.pairs.token, outcome.features.pairs.feature] = True
        out["chosen"] = chosen
    out.update({f"grad.{name}": value.clone() for name, value in cut(transcoder, of="grad").items()})
    return out


def steps(case: Case, built: Parts, count: int = 50) -> dict[str, torch.Tensor]:
    """Weights after some steps of training with clipped gradients."""
    parallel, transcoder = built.context.parallel, built.transcoder
    parameters = list(transcoder.parameters())
    optimizer = make_optimizer(transcoder, case.recipe())
    share = TOKENS // parallel.data_ranks
    rows = slice(parallel.data_rank * share, (parallel.data_rank + 1) * share)
    shard = parallel.shard(FEATURES)
    idle = idle_tokens()[:, shard.start : shard.stop]
    for step in range(count):
        batch = random_batch(TOKENS, 3, 6, TYPES[case.dtype], seed=step).rows(rows)
        optimizer.zero_grad(set_to_none=True)
        objective(transcoder, built.losses, batch, idle, step / count).total.backward()
        parallel.reduce_gradients(parameters)
        clip_gradients(parameters, gradient_norm(parameters, parallel), 0.5, optimizer)
        optimizer.step()
    return {name: value.clone() for name, value in cut(transcoder).items()}
