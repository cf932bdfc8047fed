"""From a typed recipe to built objects, in the order in which they need each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins.interfaces import Kernels, Loss, Parallel, Source
from clt_plugins.spec import Context
from clt_plugins.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from pathlib import Path

    from clt_plugins.loading import Plugins
    from clt_plugins.recipe import Recipe


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
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
    return spec.build(spec.config(), None)


def build(recipe: Recipe, plugins: Plugins, folder: Path | None = None, device: torch.device | None = None) -> Parts:
    """Build everything a recipe names.

    Args:
        device: instead of the recipe's; "meta" builds a transcoder without memory.
    """
    context, source = build_source(recipe, plugins, folder, device)
    transcoder = build_transcoder(context)
    return Parts(context, source, transcoder, [loss.build(context) for loss in recipe.losses])


def build_source(
    recipe: Recipe, plugins: Plugins, folder: Path | None = None, device: torch.device | None = None
) -> tuple[Context, Source]:
    """Build the source of a recipe, and the context that everything else is built in."""
    settings = recipe.transcoder
    device = device or make_device(settings.device)
    compute_device = torch.device("cpu") if device.type == "meta" else device
    kernels = make_kernels(recipe.kernels.name, compute_device, plugins, getattr(recipe.kernels, "config", None))
    context = Context(
        recipe=recipe,
        seed=recipe.seed,
        device=device,
        dtype=getattr(torch, settings.dtype),
        batch_tokens=recipe.train.batch_tokens,
        steps=recipe.train.steps,
        dead_after_tokens=recipe.train.dead_after_tokens,
        kernels=kernels,
        parallel=recipe.parallel.build(None),  # type: ignore[arg-type]
        folder=folder,
        features=settings.features,
    )
    source = recipe.source.build(context)
    return attrs.evolve(context, layers=source.layers, d_model=source.d_model), source


def build_transcoder(context: Context) -> CrossLayerTranscoder:
    """The transcoder of the context's recipe."""
    recipe = context.recipe
    assert recipe is not None
    settings = recipe.transcoder
    transcoder = CrossLayerTranscoder(
        context, recipe.activation, recipe.tying, normalisation=settings.normalisation, path=settings.path
    )
    if recipe.train.precision == "bf16":
        transcoder.product = torch.bfloat16
    return transcoder


def close(parts: Parts) -> None:
    """Let go of what a run held: the source's threads and files, the process group."""
    if hasattr(parts.source, "close"):
        parts.source.close()
    parts.context.parallel.close()
