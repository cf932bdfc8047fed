"""From a typed recipe to built objects, in the order in which they need each other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins.contract.interfaces import Kernels, Loss, Parallel, Source
from clt_plugins.contract.spec import Context
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.registry.build import check_built

if TYPE_CHECKING:
    from pathlib import Path

    from clt_plugins.recipe.read import Recipe
    from clt_plugins.registry.plugins import Plugins


@attrs.frozen(eq=False)
class Parts:
    """What a run works with."""

    context: Context
    source: Source
    transcoder: CrossLayerTranscoder
    losses: list[Loss]


def make_device(name: str) -> torch.device:
    """ "auto" is the GPU of this process's local rank where there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        # Each process that torchrun starts on a machine has a GPU of its own.
        number = int(os.environ.get("LOCAL_RANK", "0"))
        name = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"transcoder.device: {name!r} cannot be used here: {error}".splitlines()[0]) from error
    return device


def make_kernels(name: str, device: torch.device, plugins: Plugins, config: Any = None) -> Kernels:
    """The kernels of that name for a device; "auto" takes those whose `preference(device)` is highest.

    Raises:
        ValueError: none of them, or not the one named, can serve the device.
    """
    if name != "auto":
        spec = plugins.pick("kernels", name).spec
        return spec.build(spec.config() if config is None else config, device)
    built, reasons = [], []
    for choice in plugins.choices("kernels").values():
        try:
            built.append(choice.spec.build(choice.spec.config(), device))
        except (ValueError, ImportError) as error:
            reasons.append(f"{choice.spec.name}: {error}")
    if not built:
        raise ValueError(f"kernels: none serves {device} ({'; '.join(reasons) or 'no kernels plugin is loaded'})")
    return max(built, key=lambda kernels: kernels.preference(device))


def make_parallel(name: str, plugins: Plugins) -> Parallel:
    """The parallel choice of that name with its default settings."""
    spec = plugins.pick("parallel", name).spec
    return spec.build(spec.config(), torch.device("cpu"))


def connect(recipe: Recipe, device: torch.device) -> Parallel:
    """Join the recipe's other ranks.

    Raises:
        ValueError: as many processes were started as it has no use for.
    """
    parallel: Parallel = recipe.parallel.build(device)  # type: ignore[arg-type]
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type != "meta" and parallel.world != started:
        parallel.close()
        raise ValueError(
            f'parallel: "{recipe.parallel.name}" is {parallel.world} process, but {started} were started: '
            'choose parallel = "tensor", or start one'
        )
    return parallel


def build(
    recipe: Recipe,
    plugins: Plugins,
    folder: Path | None = None,
    device: torch.device | None = None,
    parallel: Parallel | None = None,
) -> Parts:
    """Build everything a recipe names.

    Args:
        parallel: the ranks, where they are connected already.
        device: instead of the recipe's; "meta" builds a transcoder without memory.
    """
    context = make_context(recipe, plugins, folder, device, parallel)
    check_built(context.parallel, "parallel", recipe.parallel.spec)
    source = check_built(recipe.source.build(context), "source", recipe.source.spec)
    context = attrs.evolve(context, layers=source.layers, d_model=source.d_model)
    transcoder = build_transcoder(context)
    losses = [check_built(loss.build(context), "losses", loss.spec) for loss in recipe.losses]
    return Parts(context, source, transcoder, losses)


def build_source(recipe: Recipe, plugins: Plugins, parallel: Parallel | None = None) -> Source:
    """Only a recipe's source, as a run would build it.

    Args:
        parallel: says which share of the tokens is wanted, instead of the recipe's.
    """
    return recipe.source.build(make_context(recipe, plugins, parallel=parallel))


def make_context(
    recipe: Recipe,
    plugins: Plugins,
    folder: Path | None = None,
    device: torch.device | None = None,
    parallel: Parallel | None = None,
) -> Context:
    """What a recipe's source is told. `layers` and `d_model` are 0 until it is built."""
    settings = recipe.transcoder
    device = device or make_device(settings.device)
    compute_device = torch.device("cpu") if device.type == "meta" else device
    kernels = make_kernels(recipe.kernels.name, compute_device, plugins, getattr(recipe.kernels, "config", None))
    return Context(
        recipe=recipe,
        seed=recipe.seed,
        device=device,
        dtype=getattr(torch, settings.dtype),
        batch_tokens=recipe.train.batch_tokens,
        steps=recipe.train.steps,
        dead_after_tokens=recipe.train.dead_after_tokens,
        kernels=kernels,
        parallel=parallel or connect(recipe, device),
        folder=folder,
        features=settings.features,
    )


def build_transcoder(context: Context) -> CrossLayerTranscoder:
    """The transcoder of the context's recipe."""
    recipe = context.recipe
    assert recipe is not None
    settings = recipe.transcoder
    transcoder = CrossLayerTranscoder(
        context, recipe.activation, recipe.tying, normalisation=settings.normalisation, path=settings.path
    )
    check_built(transcoder.activation, "activation", recipe.activation.spec)
    check_built(transcoder.tying, "tying", recipe.tying.spec)
    if recipe.train.precision == "bf16":
        transcoder.product = torch.bfloat16
    return transcoder


def close(parts: Parts) -> None:
    """Let go of what a run held: the source's threads and files, the process group."""
    if hasattr(parts.source, "close"):
        parts.source.close()
    parts.context.parallel.close()
