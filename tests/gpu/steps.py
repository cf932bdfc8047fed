"""Training steps of the real loop on the absent GPU: one rank, or one of several.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from clt_parallel.grid import Grid
from clt_plugins.contract.recipe import Recipe
from clt_plugins.data.batch import Batch
from clt_plugins.distributed.single import Single
from clt_plugins.model.assemble import Parts, build_transcoder, make_context
from clt_plugins.model.sparse import reuse_gradients
from clt_plugins.recipe.read import read_recipe
from clt_plugins.registry.build import build
from clt_plugins.registry.plugins import Plugins
from clt_plugins.training.loop import train
from clt_plugins.training.optimizers.make import is_matrix, make_optimizer
from clt_plugins.training.optimizers.rate import with_rate
from clt_plugins.training.saved.checkpoint import Progress
from tests.gpu.absent import CUDA, Ops

NEVER = 10**9
STEADY = 4
"""The first step that is like those after it: caches are filled, and the host knows numbers of two steps ago."""


@attrs.frozen
class Sizes:
    """What a source knows and the recipe does not."""

    n_layers: int
    d_model: int
    dtype: torch.dtype = torch.float32
    """Of the activations."""
    buffer: int = 0
    """Rows that wait on the GPU; one batch if 0."""


@attrs.frozen
class Ranks:
    """How many ranks share the features, and how many share the tokens."""

    tensor: int = 1
    data: int = 1


class Rows:
    """A source whose rows lie on the GPU already, as those of a stream do: a batch is an `index_select`."""

    def __init__(self, sizes: Sizes, tokens: int):
        self.n_layers, self.d_model = sizes.n_layers, sizes.d_model
        self.index = torch.empty(tokens, dtype=torch.int64, device=CUDA)
        shape = max(sizes.buffer, tokens), sizes.n_layers, sizes.d_model
        self.rows = [torch.empty(shape, dtype=sizes.dtype, device=CUDA) for _ in range(2)]
        self.begins: Callable[[], None] = lambda: None
        """Called when a step begins."""

    def next(self) -> Batch:
        self.begins()
        return Batch(*(rows.index_select(0, self.index) for rows in self.rows))

    def held_out(self, tokens: int) -> Iterator[Batch]:
        raise AssertionError("no step here evaluates")

    def statistics(self) -> None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...


def recipe(plugins: Plugins, tables: Mapping[str, Any]) -> Recipe:
    """A recipe for a GPU; what is not in the tables is as small as can be.

    The source's table is not used.
    """
    data: dict[str, Any] = {
        "name": "absent",
        "source": {"name": "synthetic", "layers": 2, "d_model": 4, "features": 4},
        "transcoder": {"features": 64},
        "activation": {"name": "batchtopk", "k": 6},
        "losses": [{"name": "mse"}],
        "loggers": [],
        "train": {"steps": 1000, "batch_tokens": 16, "lr": 1e-4},
    }
    for name, value in copy.deepcopy(dict(tables)).items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) and "name" not in value else value
    data["transcoder"] = {**data["transcoder"], "device": "cuda"}
    data.pop("model", None)
    return read_recipe(data, plugins=plugins)


@contextmanager
def joined(ranks: Ranks) -> Iterator[Any]:
    """Rank 0 of several ranks whose collectives exchange nothing; a single one where there is only one."""
    if ranks == Ranks():
        yield Single()
        return
    dist.init_process_group("fake", rank=0, world_size=ranks.tensor * ranks.data, store=FakeStore())
    try:
        groups: dict[str, Any] = dict.fromkeys(("features", "tokens", "all"), dist.group.WORLD)
        yield Grid(0, ranks.tensor, ranks.data, groups, splits_tokens=True)
    finally:
        dist.destroy_process_group()


def assembled(chosen: Recipe, sizes: Sizes, parallel: Any) -> Parts:
    """What a run builds, around `Rows`."""
    context = make_context(chosen, None, CUDA, parallel)
    context = attrs.evolve(context, n_layers=sizes.n_layers, d_model=sizes.d_model)
    # First weights are drawn in pieces, to save memory; here nothing is drawn, and one piece is quicker.
    with mock.patch("clt_plugins.model.parameters.CHUNK", NEVER * NEVER):
        transcoder = build_transcoder(context)
    losses = [build(loss, context) for loss in chosen.losses]
    return Parts(context, Rows(sizes, context.batch_share()), transcoder, losses)


class _Enough(BaseException):
    """The steps asked for are done. Not an `Exception`: no failure of the source."""


def run(parts: Parts, chosen: Recipe, ops: Ops, begins: Callable[[], None], *, done: float = 0.1) -> None:
    """Run `STEADY` steps of the real training loop; none of them logs.

    Args:
        ops: is told the number of each step.
        begins: called when a step begins.
        done: the share of all steps that went before: k and the learning rate depend on it.
    """
    transcoder, source = parts.transcoder, parts.source
    assert isinstance(source, Rows)
    config = with_rate(chosen.train, transcoder.n_layers * transcoder.n_features)
    config = attrs.evolve(config, log_every=NEVER, eval_every=NEVER, checkpoint_every=NEVER)
    optimizer = make_optimizer(transcoder, chosen)
    schedule = build(chosen.schedule, parts.context)
    reuse_gradients(p for p in transcoder.parameters() if is_matrix(p, transcoder.d_model))
    transcoder.train()
    idle = torch.zeros(transcoder.shape, dtype=torch.int64, device=CUDA)
    progress = Progress(step=int(done * config.steps), tokens=0, idle_tokens=idle)

    def begin() -> None:
        ops.step += 1
        if ops.step > STEADY:
            raise _Enough
        begins()

    source.begins = begin
    # What ranks tell each other in words before the second step: there are no others to answer.
    parts.context.parallel.gather = lambda text: [text]  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        try:
            steps = train(
                parts, config, optimizer, schedule, progress, [], Path(folder), lambda: False, lambda *_: None
            )
            for _ in steps:
                pass
        except _Enough:
            return
    raise AssertionError("the loop ended before the steps asked for")
