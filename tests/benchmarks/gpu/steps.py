"""Training steps on a device: the whole step that users run, over random activations that lie on the device.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from clt_plugins.data.batch import Batch
from clt_plugins.model.assemble import Parts, build_transcoder, make_context
from clt_plugins.model.sparse import reuse_gradients
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.build import build
from clt_plugins.registry.plugins import Plugins
from clt_plugins.training.loop import train
from clt_plugins.training.objective import objective
from clt_plugins.training.optimizers.make import is_matrix, make_optimizer
from clt_plugins.training.optimizers.rate import with_rate
from clt_plugins.training.saved.checkpoint import Progress

NEVER = 10**9


class Rows:
    """A source of random activations on the device; a batch is an `index_select`, as a stream's is."""

    def __init__(self, n_layers: int, d_model: int, tokens: int, dtype: torch.dtype, device: torch.device):
        self.n_layers, self.d_model = n_layers, d_model
        numbers = torch.Generator().manual_seed(0)
        block = torch.randn(2 * min(tokens, 256), n_layers, d_model, generator=numbers)
        repeats = -(-tokens // len(block))
        self.rows = [
            (block.roll(shift, 0) * (1 + 0.1 * shift)).to(device, dtype).repeat(repeats, 1, 1) for shift in (0, 1)
        ]
        self.order = torch.arange(tokens, device=device)

    def next(self) -> Batch:
        return Batch(*(rows.index_select(0, self.order) for rows in self.rows))

    def held_out(self, tokens: int) -> Iterator[Batch]:
        raise AssertionError("no step here evaluates")

    def statistics(self) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


def small_tables(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a small recipe."""
    tables: dict[str, Any] = {
        "name": "benchmark",
        "source": {"name": "synthetic", "layers": 4, "d_model": 64, "features": 8},
        "transcoder": {"features": 256},
        "normalisation": {"name": "none"},
        "activation": {"name": "batchtopk", "k": 24},
        "losses": [{"name": "mse"}],
        "loggers": [],
        "train": {"steps": 1000, "batch_tokens": 128, "lr": 1e-3, "dead_after_tokens": 256},
    }
    for name, value in copy.deepcopy(dict(changes)).items():
        tables[name] = {**tables.get(name, {}), **value} if isinstance(value, dict) and "name" not in value else value
    return tables


class _Enough(Exception):
    """The steps asked for are done."""


class Step:
    """What a run of a recipe builds on a device, and its steps.

    Args:
        done: the share of the steps that went before; k and the learning rate depend on it.
    """

    def __init__(
        self,
        tables: Mapping[str, Any],
        plugins: Plugins,
        device: torch.device,
        *,
        sizes: tuple[int, int] | None = None,
        rows_dtype: torch.dtype = torch.float32,
        done: float = 0.1,
    ):
        data = copy.deepcopy(dict(tables))
        data["transcoder"] = {**data["transcoder"], "device": str(device)}
        self.recipe = read_recipe(data, plugins=plugins)
        context = make_context(self.recipe, None, device)
        if sizes is None:
            sizes = data["source"]["layers"], data["source"]["d_model"]
        context = attrs.evolve(context, n_layers=sizes[0], d_model=sizes[1])
        transcoder = build_transcoder(context)
        losses = [build(loss, context) for loss in self.recipe.losses]
        rows = Rows(*sizes, context.batch_share(), rows_dtype, device)
        self.parts = Parts(context, rows, transcoder, losses)
        config = with_rate(self.recipe.train, transcoder.n_layers * transcoder.n_features)
        self.config = attrs.evolve(config, log_every=NEVER, eval_every=NEVER, checkpoint_every=NEVER)
        self.optimizer = make_optimizer(transcoder, self.recipe)
        self.schedule = build(self.recipe.schedule, context)
        transcoder.train()
        idle = torch.zeros(transcoder.shape, dtype=torch.int64, device=device)
        self.progress = Progress(step=int(done * self.config.steps), tokens=0, idle_tokens=idle)

    def gradients(self) -> list[Tensor]:
        """The loss of one batch and the gradients of all parameters that have one."""
        transcoder = self.parts.transcoder
        outcome = objective(transcoder, self.parts.losses, self.parts.source.next(), self.progress.idle_tokens, 0.1)
        outcome.total.backward()
        found = [outcome.total.detach(), *(p.grad.clone() for p in transcoder.parameters() if p.grad is not None)]
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def take(self, steps: int, after: Callable[[], None] | None = None) -> None:
        """Take steps of the real training loop, none of which logs.

        Args:
            after: called after each step.
        """
        transcoder, number = self.parts.transcoder, 0
        reuse_gradients(p for p in transcoder.parameters() if is_matrix(p, transcoder.d_model))

        def wants_stop() -> bool:
            nonlocal number
            number += 1
            if after is not None:
                after()
            if number == steps:
                raise _Enough
            return False

        with tempfile.TemporaryDirectory() as folder:
            try:
                taken = train(
                    self.parts,
                    self.config,
                    self.optimizer,
                    self.schedule,
                    self.progress,
                    [],
                    Path(folder),
                    wants_stop,
                    lambda step, log: None,
                )
                for _ in taken:
                    pass
            except _Enough:
                return
        raise AssertionError("the loop ended before the steps asked for")
