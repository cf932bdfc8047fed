"""What the checks work with: a small run around the choice under test, built exactly like a user's.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.context import Context
from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.contract.spec import Selected, Spec
from clt_plugins.contract.training.loss import Forward, Loss, ModelPass, RunsModel
from clt_plugins.data.batch import Batch
from clt_plugins.model.assemble import Parts, assemble, assemble_around, make_context, of_data
from clt_plugins.model.in_model.passes import InModel
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.build import build
from clt_plugins.registry.plugins import Plugins
from clt_plugins.testing.fixed_sizes import FixedKernels
from clt_plugins.training.objective import Outcome, objective

LAYERS, D_MODEL, FEATURES, TOKENS = 3, 6, 41, 16
"""41 features are divided evenly by no number of ranks."""

TABLES: dict[str, Any] = {
    "name": "conformance",
    "source": {"name": "synthetic", "layers": LAYERS, "d_model": D_MODEL, "features": 24, "active": 2.0},
    "transcoder": {"features": FEATURES, "device": "cpu"},
    "normalisation": {"name": "none"},
    "encoder": {"name": "plain"},
    "activation": {"name": "topk", "k": 8},
    "tying": {"name": "untied"},
    "losses": [{"name": "mse"}],
    "loggers": [],
    "parallel": {"name": "single"},
    "kernels": {"name": "torch"},
    "train": {"steps": 100, "batch_tokens": TOKENS, "dead_after_tokens": 64},
}
"""The recipe around the choice under test."""


INSIDE = {"exports": ("stages", "export", "format"), "reports": ("stages", "report", "format")}
"""For a kind that stands only in other choices: the list, the choice, and its setting that holds it."""


class Probe:
    """The loss of a step where no loss is under test: its gradient reaches reconstruction and features."""

    needs_pre = False

    def selection(self, tokens: int, idle_tokens: Tensor) -> None:
        return None

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        error = (forward.reconstruction - forward.targets).square().mean()
        values = forward.features.values.tanh()
        return {"probe": error + 0.1 * forward.sum_features(values.sum()) / len(forward.targets)}


@attrs.frozen(eq=False)
class Bench:
    """The choice under test, and how to build a small run around it."""

    plugins: Plugins
    slot: str
    """The recipe's table."""
    choice: str
    settings: Mapping[str, Any]
    tables: Mapping[str, Any]
    """What the recipe has besides."""
    module: str | None
    """What other processes import the plugin by, where it is not installed."""
    folder: Path
    """Empty, and deleted after the check."""
    trial: bool = False
    """Whether there are no settings because nobody could give them: `plugins --check`."""

    @property
    def spec(self) -> Spec:
        return self.plugins.pick(self.slot, self.choice).spec

    def settable(self) -> set[str]:
        """The names of the choice's settings."""
        return {a.name for a in attrs.fields(self.spec.config)}

    @property
    def file(self) -> str:
        """The plugin's module."""
        return self.plugins.pick(self.slot, self.choice).file

    def recipe_data(self, **changes: Any) -> dict[str, Any]:
        """The recipe's tables, the choice among them.

        Args:
            changes: by table; merged into the table, unless they name another choice: that has other settings.
        """
        data = copy.deepcopy(TABLES) | copy.deepcopy(dict(self.tables))
        chosen = {"name": self.choice, **copy.deepcopy(dict(self.settings))}
        if self.slot in INSIDE:
            table, holder, key = INSIDE[self.slot]
            data[table] = [{"name": holder, key: chosen}]
        else:
            data[self.slot] = [chosen] if BY_TABLE[self.slot].many else chosen
        for name, value in changes.items():
            merge = isinstance(value, dict) and "name" not in value
            data[name] = {**data.get(name, {}), **value} if merge else value
        return data

    def recipe(self, **changes: Any) -> Recipe:
        return read_recipe(self.recipe_data(**changes), plugins=self.plugins)

    def parts(
        self,
        *,
        device: str = "cpu",
        folder: Path | None = None,
        stirred: bool = True,
        fixed: bool = False,
        **changes: Any,
    ) -> Parts:
        """Everything that a run builds before training.

        Args:
            stirred: give every parameter some noise, so that none is at a special value.
            fixed: with kernels whose selections have fixed sizes, as on a GPU; the source's batches as they are.
        """
        recipe = self.recipe(**changes)
        where = recipe, folder or self.folder, torch.device(device)
        if fixed:
            context = make_context(*where)
            context = attrs.evolve(context, kernels=FixedKernels(context.kernels))
            parts = assemble_around(build(recipe.source, of_data(context)), context)
        else:
            parts = assemble(*where)
        if stirred and device != "meta":
            stir(parts.transcoder)
        return parts

    def build(self, context: Context) -> Any:
        """The choice, built from the context's recipe."""
        return build(self.selected(context.recipe), context)

    def selected(self, recipe: Recipe | None = None) -> Selected:
        """The choice with its settings, as a recipe has it."""
        recipe = recipe or self.recipe()
        if self.slot in INSIDE:
            table, _, key = INSIDE[self.slot]
            return getattr(getattr(recipe, table)[0].config, key)
        value = getattr(recipe, self.slot)
        return value[0] if BY_TABLE[self.slot].many else value

    def batch(self, dtype: torch.dtype = torch.float32, seed: int = 1, device: str = "cpu") -> Batch:
        """Random activations [16, 3, 6]."""
        numbers = torch.Generator().manual_seed(seed)
        draws = [torch.randn(TOKENS, LAYERS, D_MODEL, generator=numbers, dtype=torch.float64) for _ in range(2)]
        return Batch(*(x.to(device, dtype) for x in draws))

    def step(self, parts: Parts, batch: Batch, *, idle: Tensor | None = None) -> Outcome:
        """Forward and backward of one batch; gradients are in `.grad`.

        Args:
            idle: tokens since each feature was last active; a third of all features are dead if not given.
        """
        losses: Sequence[Loss] = parts.losses if self.slot == "losses" else [Probe()]
        if idle is None:
            idle = idle_tokens(str(parts.context.device), parts.context.parallel.shard(FEATURES))
        outcome = objective(parts.transcoder, losses, batch, idle, 0.5, passes(parts, losses))
        if outcome.total.requires_grad:  # a loss that stops every gradient is found by its own check
            outcome.total.backward()
        return outcome


def passes(parts: Parts, losses: Sequence[Loss]) -> list[ModelPass | None]:
    """What losses get that run the language model, in a step in which they all do: of the source's model, with its
    next texts. On the device "meta", which has no numbers, shapes only."""
    wanted = [isinstance(loss, RunsModel) for loss in losses]
    if parts.context.device.type == "meta":
        logits, tokens = torch.zeros(2, 12, 11, device="meta"), torch.zeros(12, dtype=torch.int64, device="meta")
        one = ModelPass(
            logits=logits[0].clone().requires_grad_(), unchanged=logits[1], next_tokens=tokens, mean=torch.mean
        )
        return [one if runs else None for runs in wanted]
    run = InModel(parts.transcoder, losses, parts.source)
    run.read(wanted, None)
    return run.passes(wanted)


def stir(module: torch.nn.Module, seed: int = 3, scale: float = 0.2) -> None:
    """Add noise to every parameter, the same for a seed."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * scale)


def idle_tokens(device: str = "cpu", features: range = range(FEATURES)) -> Tensor:
    """A counter that says a third of all features are dead, [L, F]."""
    idle = torch.zeros(LAYERS, FEATURES, dtype=torch.int64)
    idle[:, ::3] = 1000
    return idle[:, features.start : features.stop].to(device)


def as_now(module: Any) -> Callable[[], None]:
    """Returns what takes a module back to its state of now, which a forward pass may change: parameters, buffers, and
    attributes that are numbers, tensors or plain collections of them."""
    modules = list(module.modules()) if isinstance(module, torch.nn.Module) else [module]
    plain = [{k: copy.deepcopy(x) for k, x in _attributes(each).items()} for each in modules]
    tensors: list[tuple[Tensor, Tensor]] = []
    buffers: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for each in modules:
        if isinstance(each, torch.nn.Module):
            buffers.append((each._buffers, dict(each._buffers)))  # a step may put another tensor in the place of one
            own = [*each.parameters(recurse=False), *each.buffers(recurse=False)]
            tensors += [(x, x.detach().clone()) for x in own]

    def restore() -> None:
        for each, values in zip(modules, plain, strict=True):
            for name in _attributes(each).keys() - values.keys():
                delattr(each, name)
            vars(each).update(copy.deepcopy(values))
        for now, then in buffers:
            now.update(then)
        with torch.no_grad():
            for x, value in tensors:
                if not torch.equal(x, value):  # a backward pass may need it as it is
                    x.copy_(value)

    return restore


def _attributes(module: Any) -> dict[str, Any]:
    """The plain attributes that the author gave it; those of torch's own are kept in others."""
    return {k: x for k, x in vars(module).items() if _is_plain(x) and k not in ("_parameters", "_buffers", "_modules")}


def _is_plain(x: Any) -> bool:
    if isinstance(x, list | tuple | dict | set):
        return all(map(_is_plain, x.values() if isinstance(x, dict) else x))
    return x is None or isinstance(x, bool | int | float | str) or (isinstance(x, Tensor) and x.grad_fn is None)


def gradients(parts: Parts) -> dict[str, Tensor]:
    """Every parameter's gradient, by name; those that have none are left out."""
    return {name: p.grad for name, p in parts.transcoder.named_parameters() if p.grad is not None}
