"""What the checks work with: a small run around the choice under test, built by the same road as a user's.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.interfaces import Forward
from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.spec import Spec
from clt_plugins.data.batch import Batch
from clt_plugins.model.assemble import Parts, assemble
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.plugins import Plugins
from clt_plugins.training.objective import Outcome, objective

LAYERS, D_MODEL, FEATURES, TOKENS = 3, 6, 41, 16
"""41 features are divided evenly by no number of ranks."""

TABLES: dict[str, Any] = {
    "name": "conformance",
    "source": {"name": "synthetic", "layers": LAYERS, "d_model": D_MODEL, "features": 24, "active": 2.0},
    "transcoder": {"features": FEATURES, "normalisation": "none", "device": "cpu"},
    "activation": {"name": "topk", "k": 8},
    "tying": {"name": "untied"},
    "losses": [],
    "loggers": [],
    "kernels": {"name": "torch"},
    "train": {"steps": 100, "batch_tokens": TOKENS, "dead_after_tokens": 64},
}


@attrs.frozen(eq=False)
class Bench:
    """The choice under test, and how to build a small run around it."""

    plugins: Plugins
    slot: str
    choice: str
    settings: Mapping[str, Any]
    tables: Mapping[str, Any]
    """What the plugin's recipe has besides."""
    module: str | None
    folder: Path
    """Empty, and gone afterwards."""

    @property
    def spec(self) -> Spec:
        return self.plugins.pick(self.slot, self.choice).spec

    def recipe_data(self, **changes: Any) -> dict[str, Any]:
        """The recipe's tables, with the choice in its place."""
        data = copy.deepcopy(TABLES) | copy.deepcopy(dict(self.tables))
        own = {"name": self.choice, **copy.deepcopy(dict(self.settings))}
        data[self.slot] = [own] if self.slot in ("losses", "loggers", "exports") else own
        for name, value in changes.items():
            # A choice under another name has other settings: it replaces the table.
            merge = isinstance(value, dict) and "name" not in value
            data[name] = {**data.get(name, {}), **value} if merge else value
        return data

    def recipe(self, **changes: Any) -> Recipe:
        return read_recipe(self.recipe_data(**changes), plugins=self.plugins)

    def parts(self, *, device: str = "cpu", folder: Path | None = None, stirred: bool = True, **changes: Any) -> Parts:
        """Everything built; `stirred` gives every parameter some noise, so that none is at a special value."""
        made = assemble(self.recipe(**changes), folder or self.folder, torch.device(device))
        if stirred and device != "meta":
            stir(made.transcoder)
        return made

    def batch(self, dtype: torch.dtype = torch.float32, seed: int = 1, device: str = "cpu") -> Batch:
        """Random activations [16, 3, 6]."""
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(TOKENS, LAYERS, D_MODEL, generator=generator, dtype=torch.float64) for _ in range(2)]
        return Batch(*(x.to(device, dtype) for x in draw))


def stir(module: torch.nn.Module, seed: int = 3, scale: float = 0.2) -> None:
    """Add noise to every parameter, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * scale)


def idle_tokens(device: str = "cpu", features: range = range(FEATURES)) -> Tensor:
    """A counter that says a third of all features are dead, [L, F]."""
    idle = torch.zeros(LAYERS, FEATURES, dtype=torch.int64)
    idle[:, ::3] = 1000
    return idle[:, features.start : features.stop].to(device)


class Probe:
    """A loss whose gradient reaches reconstruction and features; the checks' own, so that they need no other plugin."""

    needs_pre = False

    def selection(self, tokens: int, idle: Tensor) -> None:
        return None

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        error = (forward.reconstruction - forward.targets).square().mean()
        return {"probe": error + 0.1 * forward.sum_features(forward.features.values.tanh().sum()) / TOKENS}


def losses_of(parts: Parts) -> list[Any]:
    """The recipe's losses, or the probe where it has none."""
    return parts.losses or [Probe()]


def step(parts: Parts, batch: Batch, *, dead: bool = True) -> Outcome:
    """Forward and backward of one batch; gradients are in `.grad`."""
    own = parts.context.parallel.shard(FEATURES)
    idle = idle_tokens(str(parts.context.device), own)
    outcome = objective(parts.transcoder, losses_of(parts), batch, idle if dead else idle * 0, 0.5)
    if outcome.total.requires_grad:  # a loss that stops every gradient is found by its own check
        outcome.total.backward()
    return outcome


def gradients(parts: Parts) -> dict[str, Tensor]:
    """Every parameter's gradient, by name; those that have none are left out."""
    return {name: p.grad for name, p in parts.transcoder.named_parameters() if p.grad is not None}
