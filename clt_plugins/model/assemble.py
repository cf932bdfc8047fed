"""From a typed recipe to built objects, in the order in which they need each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from clt_plugins.contract.context import Context
from clt_plugins.contract.model.parallel import Parallel
from clt_plugins.contract.reading.source import Closable, Source
from clt_plugins.contract.reading.transform import Transform
from clt_plugins.contract.training.callback import Callback
from clt_plugins.contract.training.loss import Loss
from clt_plugins.contract.training.metric import Metric
from clt_plugins.distributed.transformed import transformed
from clt_plugins.model.devices import connect, make_device, with_kernels
from clt_plugins.model.parameters import freeze, note_axes
from clt_plugins.model.products.matrix import check_product
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from pathlib import Path

    from clt_plugins.contract.recipe import Recipe

_ATTRIBUTE = {"normalisation": "normaliser"}
"""Where a transcoder has what a table chose, if not under the table's name."""


@attrs.frozen(eq=False)
class Parts:
    """What a run works with."""

    context: Context
    source: Source
    """Of transformed batches, where the recipe has transforms."""
    transcoder: CrossLayerTranscoder
    losses: list[Loss]
    transforms: list[Transform] = attrs.field(factory=list)
    metrics: list[Metric] = attrs.field(factory=list)
    callbacks: list[Callback] = attrs.field(factory=list)

    def chosen(self) -> dict[str, Any]:
        """What a recipe chose and a step uses, by path: `activation`, `losses[1]`."""
        inside = {table: getattr(self.transcoder, _ATTRIBUTE.get(table, table)) for table in self.transcoder.choices}
        lists: dict[str, list[Any]] = {"losses": self.losses, "metrics": self.metrics, "callbacks": self.callbacks}
        return inside | {f"{table}[{number}]": one for table, many in lists.items() for number, one in enumerate(many)}

    def outside(self) -> dict[str, nn.Module]:
        """Those of them that are modules and no part of the transcoder."""
        known = set(self.transcoder.modules())
        return {path: one for path, one in self.chosen().items() if isinstance(one, nn.Module) and one not in known}


def assemble(
    recipe: Recipe,
    folder: Path | None = None,
    device: torch.device | None = None,
    parallel: Parallel | None = None,
) -> Parts:
    """Build everything a recipe names: ranks, kernels, source, transforms, transcoder, losses, metrics.

    Args:
        device: instead of the recipe's; "meta" builds a transcoder without memory.
        parallel: the ranks, where they are connected already.
    """
    context = make_context(recipe, folder, device, parallel)
    # The source first: only it knows how many layers and dimensions the model has.
    parts = assemble_around(build(recipe.source, of_data(context)), context)
    return attrs.evolve(parts, source=transformed(parts.source, parts.transforms, parts.context))


def assemble_around(source: Source, context: Context) -> Parts:
    """The rest of what the context's recipe names, for a source that is built already; its batches stay as they are."""
    recipe = context.recipe
    assert recipe is not None
    context = attrs.evolve(context, n_layers=source.n_layers, d_model=source.d_model)
    transforms = [build(transform, of_data(context)) for transform in recipe.transforms]
    transcoder = build_transcoder(context)
    losses = [build(loss, context) for loss in recipe.losses]
    metrics = [build(metric, context) for metric in recipe.metrics]
    callbacks = [build(callback, context) for callback in recipe.callbacks]
    parts = Parts(context, source, transcoder, losses, transforms, metrics, callbacks)
    for module in parts.outside().values():
        note_axes(module)
    return parts


def build_source(recipe: Recipe, parallel: Parallel | None = None) -> Source:
    """Only a recipe's source, as a run would build it.

    Args:
        parallel: says which share of the tokens is wanted, instead of the recipe's.
    """
    return build(recipe.source, of_data(make_context(recipe, parallel=parallel)))


def of_data(context: Context) -> Context:
    """What the source and the transforms of the context's recipe are told."""
    assert context.recipe is not None
    return attrs.evolve(context, seed=context.recipe.seed_of_data)


def make_context(
    recipe: Recipe,
    folder: Path | None = None,
    device: torch.device | None = None,
    parallel: Parallel | None = None,
) -> Context:
    """What a recipe's choices are told. `n_layers` and `d_model` are 0 until it is built."""
    settings = recipe.transcoder
    context = Context(
        recipe=recipe,
        seed=recipe.seed,
        device=device or make_device(settings.device),
        dtype=getattr(torch, settings.dtype),
        batch_tokens=recipe.train.batch_tokens,
        steps=recipe.train.steps,
        dead_after_tokens=recipe.train.dead_after_tokens,
        folder=folder,
        n_features=settings.features,
    )
    return with_kernels(attrs.evolve(context, parallel=parallel or connect(context)))


def build_transcoder(context: Context) -> CrossLayerTranscoder:
    """The transcoder of the context's recipe."""
    recipe = context.recipe
    assert recipe is not None
    settings = recipe.transcoder
    transcoder = CrossLayerTranscoder(
        context,
        recipe.encoder,
        recipe.activation,
        recipe.tying,
        normalisation=recipe.normalisation,
        path=settings.path,
    )
    # Only the encoder's product: values of selected features are computed again in float32.
    if recipe.train.precision != "fp32":
        check_product(
            recipe.train.precision, context.device, row_size=transcoder.row_size, n_features=transcoder.shape[1]
        )
        transcoder.product = recipe.train.precision
    freeze(transcoder, settings.freeze)
    return transcoder


def close(parts: Parts) -> None:
    """Release what a run held: the source's threads and files, the process group."""
    if isinstance(parts.source, Closable):
        parts.source.close()
    parts.context.parallel.close()
