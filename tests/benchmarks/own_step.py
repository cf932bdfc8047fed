"""This project's training step on random activations: as a whole, and the seconds of each of its parts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from clt_plugins.model.products.matrix import affine
from tests.benchmarks.timing import median_seconds

STEPS = 5
"""Steps whose parts are timed."""


class Own:
    """This project's training step on random activations."""

    def __init__(self, options: argparse.Namespace):
        from clt_plugins.data.batch import Batch
        from clt_plugins.model.assemble import assemble
        from clt_plugins.model.sparse import reuse_gradients
        from clt_plugins.recipe.read import read_recipe
        from clt_plugins.registry.plugins import load_plugins
        from clt_plugins.training.host.threads import Threads
        from clt_plugins.training.optimizers.make import is_matrix, make_optimizer

        torch.set_num_threads(options.threads)
        plugins = load_plugins()
        activation: dict[str, Any] = {"name": options.activation}
        if "topk" in options.activation:
            activation |= {"k": options.k} if options.whole else {"k": options.k, "anneal_from": 1}
        losses = [{"name": "mse"}, {"name": "auxk"}] if options.whole else [{"name": "mse"}]
        normalisation = "mean_std" if options.whole else "none"
        tables = {
            "name": "benchmark",
            "source": {"name": "synthetic", "layers": options.layers, "d_model": options.d_model, "features": 64},
            "transcoder": {"features": options.features, "path": options.path},
            "normalisation": normalisation,
            "activation": activation,
            "losses": losses,
            "tying": {"name": options.tying},
            "kernels": {"name": options.kernels},
            "train": {"steps": 1000, "batch_tokens": options.batch, "precision": options.dtype, "lr": 1e-4},
        }
        recipe = read_recipe(tables, plugins=plugins)
        self.parts = assemble(recipe)
        self.transcoder = self.parts.transcoder
        self.optimizer = make_optimizer(self.transcoder, recipe)
        if options.path == "sparse":
            reuse_gradients(p for p in self.transcoder.parameters() if is_matrix(p, self.transcoder.d_model))
        generator = torch.Generator().manual_seed(0)
        shape = options.batch, options.layers, options.d_model
        self.batch = Batch(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        self.idle = torch.zeros(options.layers, options.features, dtype=torch.int64)
        self.whole = options.whole
        self.threads = Threads()
        if self.whole:
            # Rows of a block in random order, as sources give them; a share of the features stays dead.
            self.block = [torch.cat([x] * 4) for x in (self.batch.inputs, self.batch.targets)]
            self.order = torch.randperm(4 * options.batch, generator=generator)[: options.batch]
            self.dead = torch.rand(self.idle.shape, generator=generator) < options.dead
            self.limit = recipe.train.dead_after_tokens
            self.transcoder.activation.schedule(options.progress)

    def step(self) -> Any:
        from clt_plugins.data.batch import Batch
        from clt_plugins.training.objective import objective

        if self.whole:
            self.threads.begin()
            self.batch = Batch(*(rows.index_select(0, self.order) for rows in self.block))
            self.idle = torch.where(self.dead, self.limit, self.idle)
        self.optimizer.zero_grad(set_to_none=True)
        outcome = objective(self.transcoder, self.parts.losses, self.batch, self.idle, 0.5)
        outcome.total.backward()
        self.optimizer.step()
        if self.whole:
            active = outcome.features.counts() > 0
            self.idle = torch.where(active, 0, self.idle + self.batch.tokens)
            self.threads.end()
        return outcome

    def pieces(self) -> tuple[dict[str, float], Any]:
        """The seconds of each part of a step (means of a few), by timers around them; and the last step's outcome.

        `gradients` are those of values and rows together, where the kernels compute both at once.
        """
        kernels = self.parts.context.kernels
        spent: dict[str, list[float]] = {}
        inside: list[str] = []

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                inside.append(name)
                result = function(*args, **kwargs)
                inside.pop()
                if inside in ([], ["step"]):  # what a part calls is counted with it
                    spent.setdefault(name, []).append(time.perf_counter() - start)
                return result

            return call

        # Methods of the instance come before those of its class; deleting them brings those back.
        products = [name for name in ("decode", "grad_values", "grad_rows", "gradients") if hasattr(kernels, name)]
        select, step = kernels.select, self.optimizer.step

        def timed_select(*args: Any, **kwargs: Any) -> Any:
            one = timed("selection", select)(*args, **kwargs)
            one.see, one.finish = timed("selection", one.see), timed("selection", one.finish)
            return one

        try:
            for name in products:
                setattr(kernels, name, timed(name, getattr(kernels, name)))
            kernels.select = timed_select
            self.optimizer.step = timed("optimizer", step)  # type: ignore[method-assign]
            for _ in range(STEPS):
                outcome = timed("step", self.step)()
        finally:
            for name in (*products, "select"):
                delattr(kernels, name)
            self.optimizer.step = step  # type: ignore[method-assign]
        out = {name: sum(seconds) / STEPS for name, seconds in spent.items()}
        out["encoder_product"] = self.product()
        out["rest"] = out["step"] - sum(value for name, value in out.items() if name != "step")
        return out, outcome

    def product(self) -> float:
        """The encoder's matrix product alone, without selection."""
        model = self.transcoder
        x, weight, bias = self.batch.inputs, model.W_enc.detach(), model.b_enc.detach()

        def run() -> None:
            for layer in range(weight.shape[0]):
                affine(x[:, layer], weight[layer], bias[layer], model.product)

        return median_seconds(run)
