"""Where a run computes: the device, its kernels, and the ranks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins.contract.context import Context
from clt_plugins.contract.spec import Selected
from clt_plugins.errors import Refused
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.model.kernels import Kernels
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.registry.plugins import Plugins


def make_device(name: str) -> torch.device:
    """ "auto" is the GPU of this process's local rank where there is one, else the CPU; "cuda" is that GPU.

    A GPU becomes the current one of the process.

    Raises:
        Refused: there is no such device.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        # Each process that torchrun starts on a machine has a GPU of its own.
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            # Triton launches on the current device, whichever device its arguments are on.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        text = f"{name!r} cannot be used here: {error}".splitlines()[0]
        raise Refused("transcoder.device", text) from error
    return device


def bare_context(device: torch.device, **known: Any) -> Context:
    """A context without recipe, kernels or ranks, such as kernels and ranks are built with."""
    return Context(
        **{"recipe": None, "seed": 0, "dtype": torch.float32, "batch_tokens": 0, "steps": 0, **known}, device=device
    )


def make_kernels(name: str, device: torch.device, plugins: Plugins) -> Kernels:
    """The kernels of that name, with their default settings.

    Raises:
        Refused: they do not serve the device.
    """
    return build(_default(name, "kernels", plugins), bare_context(device))


def make_parallel(name: str, plugins: Plugins) -> Parallel:
    """The parallel choice of that name, with its default settings."""
    return build(_default(name, "parallel", plugins), bare_context(torch.device("cpu")))


def _default(name: str, slot: str, plugins: Plugins) -> Selected:
    choice = plugins.pick(slot, name)
    return Selected(choice, choice.spec.config())


def connect(context: Context) -> Parallel:
    """Join the other ranks of the context's recipe.

    Raises:
        Refused: more processes were started than it uses.
    """
    recipe = context.recipe
    assert recipe is not None
    parallel: Parallel = build(recipe.parallel, context)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if context.device.type != "meta" and parallel.world != started:
        parallel.close()
        raise Refused(
            "parallel",
            f'"{recipe.parallel.name}" is {parallel.world} process, but {started} were started: '
            'choose parallel = "tensor", or start one',
        )
    return parallel


def with_kernels(context: Context) -> Context:
    """The context with the kernels of its recipe."""
    assert context.recipe is not None
    # A transcoder on "meta" is built to be measured; kernels are then those of the CPU.
    device = torch.device("cpu") if context.device.type == "meta" else context.device
    return attrs.evolve(context, kernels=build(context.recipe.kernels, attrs.evolve(context, device=device)))
