"""From a recipe to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from clt_plugins.contract.reading.source import Buffered, Outline
from clt_plugins.errors import Refused
from clt_plugins.files.records import as_data
from clt_plugins.finished.stages import check_stages
from clt_plugins.model.assemble import Parts, assemble_around, close, make_context, of_data
from clt_plugins.model.in_model.passes import check_losses
from clt_plugins.recipe.read import read_recipe, recipe_data
from clt_plugins.registry.build import build
from clt_plugins.training.between.steering import check_steering
from clt_plugins.training.plan.advice import faster, named_ranks, smallest_gpus, take, to_fit
from clt_plugins.training.plan.machines import Rates, gpu_rates
from clt_plugins.training.plan.measure import measure
from clt_plugins.training.plan.memory import disk, memory, peak
from clt_plugins.training.plan.records import Flops, Plan
from clt_plugins.training.plan.times import SHARES, speed
from clt_plugins.training.plan.work import Sizes, SizesInModel, work

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.registry.plugins import Plugins

META = torch.device("meta")


def plan(
    recipe: Recipe,
    plugins: Plugins,
    *,
    n_layers: int | None = None,
    d_model: int | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    measured: bool = False,
    built: bool = False,
) -> Plan:
    """What a recipe needs: sizes from the source's outline, the transcoder without memory, nothing trained or loaded.

    Args:
        n_layers, d_model: L and D, instead of the source's.
        gpu: a name in `machines.GPUS`: times on it.
        gpus: how many of them split the features, if the recipe does not say.
        measured: times on this machine, by a measurement of some seconds.
        built: build the source too, as a run does.

    Raises:
        Faults: training, or the stages after it, would fail; or what is asked for cannot be told: says what to give.
    """
    _check_options(n_layers, d_model, gpu, gpus, measured)
    recipe = split(recipe, gpus, plugins)
    parts, outline = _parts(recipe, n_layers or 0, d_model or 0, built=built)
    try:
        # What a run asks before its first step.
        check_losses(recipe, parts.losses, parts.source, parts.context.parallel.data_ranks)
        check_steering(parts)
        check_stages(parts, recipe, plugins, data=not isinstance(parts.source, Sizes))
    finally:
        close(parts)
    rates = gpu_rates(gpu) if gpu else measure(recipe, outline.n_layers, outline.d_model) if measured else None
    needs = estimate(parts, recipe, outline, rates)
    if needs.speed is None or rates is None:
        return needs

    def changed(*settings: str) -> Plan:
        return of_sizes(read_recipe(recipe_data(recipe), settings, plugins), outline, rates)

    smallest = smallest_gpus(needs, changed)
    advised = attrs.evolve(
        needs.speed,
        smallest_gpus=smallest,
        take=take(smallest, recipe),
        to_fit=to_fit(needs, recipe, changed),
        advice=faster(needs, recipe, changed),
    )
    return attrs.evolve(needs, speed=advised)


def _check_options(
    n_layers: int | None, d_model: int | None, gpu: str | None, gpus: int | None, measured: bool
) -> None:
    for one, other, name in ((n_layers, d_model, "--d-model"), (d_model, n_layers, "--n-layers")):
        if one is not None and other is None:
            raise Refused(name, "missing: --n-layers and --d-model go together")
        if one is not None and one < 1:
            raise Refused("--n-layers, --d-model", f"must be at least 1: {n_layers}, {d_model}")
    if gpu and measured:
        raise Refused("--measure", "is for this machine, --gpu for another one: give one of them")
    if gpus is not None and not gpu:
        raise Refused("--gpus", "says how many there are; of which kind says --gpu")
    if gpus is not None and gpus < 1:
        raise Refused("--gpus", f"must be at least 1: {gpus}")


def split(recipe: Recipe, gpus: int | None, plugins: Plugins) -> Recipe:
    """The recipe with its features split over so many GPUs; over as many as it says itself, and batches over the rest.

    Raises:
        Refused: they are no multiple of the ranks that the recipe names.
    """
    table = recipe_data(recipe)
    tensor, data = named_ranks(recipe)
    if gpus is None or (gpus == 1 and tensor is None and data == 1):
        return recipe
    if tensor is None:
        if gpus % data:
            raise Refused("--gpus", f"{gpus} is no multiple of parallel.data, which is {data}")
        tensor = gpus // data
    elif gpus != tensor * data:
        if gpus % tensor:
            raise Refused("--gpus", f"{gpus} is no multiple of parallel.tensor, which is {tensor}")
        data = gpus // tensor
    settings = ["parallel.name=tensor", f"parallel.tensor={tensor}", f"parallel.data={data}"]
    return read_recipe(table, settings, plugins)


def _parts(recipe: Recipe, n_layers: int, d_model: int, *, built: bool) -> tuple[Parts, Outline]:
    """The transcoder without memory, and what is known of the source, which is built only if it has no outline."""
    context = attrs.evolve(make_context(recipe, device=META), n_layers=n_layers, d_model=d_model)
    outline = _outline(recipe, context)
    if built or outline is None:
        source = build(recipe.source, attrs.evolve(of_data(context), n_layers=0, d_model=0))
        parts = assemble_around(source, context)
        if outline is None or (outline.n_layers, outline.d_model) != (source.n_layers, source.d_model):
            kept = source.buffer_bytes() if isinstance(source, Buffered) else {}
            outline = Outline(n_layers=source.n_layers, d_model=source.d_model, buffer_bytes=kept)
        return parts, outline
    # Of sizes that were given, nothing says what the source can do.
    kind = SizesInModel if outline.text_tokens or recipe.source.spec.outline is None else Sizes
    return assemble_around(kind(outline.n_layers, outline.d_model), context), outline


def _outline(recipe: Recipe, context: Context) -> Outline | None:
    if recipe.source.spec.outline is not None:
        return recipe.source.spec.outline(recipe.source.config, context)
    return Outline(n_layers=context.n_layers, d_model=context.d_model) if context.n_layers else None


def of_sizes(recipe: Recipe, outline: Outline, rates: Rates | None = None) -> Plan:
    """A plan by an outline alone, without advice."""
    context = make_context(recipe, device=META)
    changed = recipe.source.spec.outline
    if changed is not None:
        # The block depends on the batch; sizes do not.
        sized = attrs.evolve(context, n_layers=outline.n_layers, d_model=outline.d_model)
        outline = attrs.evolve(outline, buffer_bytes=changed(recipe.source.config, sized).buffer_bytes)
    parts = assemble_around(Sizes(outline.n_layers, outline.d_model), context)
    return estimate(parts, recipe, outline, rates)


def estimate(parts: Parts, recipe: Recipe, outline: Outline | None = None, rates: Rates | None = None) -> Plan:
    """What a run of these parts will need.

    Args:
        outline: what is known of the source besides its sizes.
        rates: of the machine that times are for.
    """
    transcoder = parts.transcoder
    outline = outline or Outline(n_layers=transcoder.n_layers, d_model=transcoder.d_model)
    first = work(parts, recipe, row_bytes=outline.row_bytes)
    sizes = {name: p.numel() for name, p in transcoder.named_parameters()}
    here = {"auto", recipe.transcoder.device}
    buffer = sum(size for device, size in outline.buffer_bytes.items() if device in here)
    if any(transform.drops for transform in parts.transforms):
        # Rows that are left for the next batch, and the batch that rows are being put together in.
        buffer += 2 * first.tokens * first.row_bytes
    libraries = rates.context if rates else 0
    held = memory(first, transcoder, outline, buffer=buffer, libraries=libraries, fixed=libraries > 0)
    written = int(first.visits) * first.d_model
    encoded = first.tokens * first.n_layers * first.row_size * first.n_features
    flops = Flops(
        encoder=2 * (3 if first.dense or first.keeps_pre else 1) * encoded + first.encoder_flops,
        # Three products: decode, the gradient of the values, and that of the rows. Then the encoder's rows.
        sparse=3 * 2 * written + (0 if first.dense else 2 * first.pairs * first.row_size),
        optimizer=12 * first.parameters,
    )
    ranks = parts.context.parallel.world
    needs = Plan(
        layers=first.n_layers,
        d_model=first.d_model,
        features=transcoder.n_features,
        parameters=first.parameters,
        parameters_by_name=sizes,
        ranks=ranks,
        bytes=held,
        total_bytes=peak(held),
        host_bytes=sum(size for device, size in outline.buffer_bytes.items() if device == "cpu" not in here),
        flops=flops,
        total_flops=sum(as_data(flops).values()),
        tokens=recipe.train.steps * recipe.train.batch_tokens,
        disk=disk(first, recipe),
    )
    if rates is None:
        return needs
    of_run = [work(parts, recipe, progress=share, row_bytes=outline.row_bytes) for share in SHARES]
    return attrs.evolve(needs, speed=speed(of_run, rates, outline, needs, recipe))
