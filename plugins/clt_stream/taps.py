"""How the modules of a model are watched, and how their outputs are replaced; no other file does either.

| task | function | mechanism |
| --- | --- | --- |
| find the order of the sites, once | `find_order` | hooks |
| read activations, in every pass | `Trace` | nnsight |
| replace outputs, in an evaluation | `hooked` | hooks |

An nnsight trace must ask for values in the order in which the model computes them, so that order is found first, by
hooks. nnsight also stops the model after the last site, so the LM head is not run. Replacement needs the logits, and
its callback is the engine's code: in a hook it runs in the caller's thread, and its errors keep their traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from nnsight import NNsight
from torch import Tensor, nn

from clt_plugins import Refused
from clt_stream.library_errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@attrs.frozen
class Site:
    """A module's input or output."""

    path: str
    side: Literal["input", "output"]
    scale: float = 1.0
    """What is read is the module's value times this, as the model multiplies it before it adds it to the residual."""

    def scaled(self, value: Tensor) -> Tensor:
        """What is read where the module has a value."""
        return value if self.scale == 1 else value * self.scale

    def __str__(self) -> str:
        return f"{self.path}.{self.side}" + (f" * {self.scale:g}" if self.scale != 1 else "")


Act = Callable[[Tensor], Tensor | None]
"""Gets the activations at a site. A tensor that it returns replaces them; None leaves them as they are."""


@attrs.frozen
class Tap:
    """A site, and which part of the rows is read there."""

    site: Site
    layer: int
    """The index of the layer among those that are read."""
    is_input: bool
    """Whether the transcoder reads here, or predicts what is here."""

    @property
    def setting(self) -> str:
        """The recipe's setting that names the site."""
        return "model.inputs" if self.is_input else "model.outputs"


class Trace:
    """Runs a model up to the last of its taps, inside an nnsight trace.

    nnsight wraps modules that do nothing, one for each tap, and hooks at the sites call them. So no module of the model
    is wrapped: nnsight does not stop at the many small ones, and a module may be called `output` or `input`, which are
    nnsight's own names.

    Args:
        taps: in the order in which a forward pass reaches them, see `find_order`.
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[Tap]):
        self.model, self.taps = model, taps
        self.probes = nn.Module()
        for number in range(len(taps)):
            self.probes.add_module(f"tap_{number}", nn.Identity())
        self.traced = NNsight(self.probes)

    def run(self, see: Callable[[Tap, Tensor], None], ids: Tensor, **kwargs: Any) -> None:
        """One forward pass on `ids` [C, T]; `see` gets the activations at each tap, while the model runs."""
        device = self.model.device
        ids, kwargs = ids.to(device), {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        acts = [(tap.site, _call(probe)) for tap, probe in zip(self.taps, self.probes.children(), strict=True)]
        with hooked(self.model, acts), self.traced.trace(ids, fn=self.model, **kwargs) as tracer:
            for number, tap in enumerate(self.taps):
                see(tap, self.traced.get(f"tap_{number}").output)
            tracer.stop()


def _call(probe: nn.Module) -> Act:
    def act(value: Tensor) -> None:
        probe(value)

    return act


@contextmanager
def hooked(model: nn.Module, acts: Iterable[tuple[Site, Act]]) -> Iterator[None]:
    """Within it, each forward pass of the model calls each act with the activations at its site."""
    with ExitStack() as hooks:
        for site, act in acts:
            module = model.get_submodule(site.path)
            if site.side == "input":
                handle = module.register_forward_pre_hook(_before(act), with_kwargs=True)
            else:
                handle = module.register_forward_hook(_after(act))
            hooks.callback(handle.remove)
        yield


def find_order(model: PreTrainedModel, sites: Sequence[tuple[Site, Site]]) -> tuple[list[Tap], int]:
    """Run a few tokens through the model, to find in which order it reaches the sites.

    Args:
        sites: what the transcoder reads and what it predicts, layer by layer.

    Returns:
        The taps in that order, and D.

    Raises:
        Refused: the model cannot read text; a site is not reached, or reached twice, or has no vector for each token;
            widths differ.
    """
    taps = [Tap(site, layer, site is pair[0]) for layer, pair in enumerate(sites) for site in pair]
    order: list[Tap] = []
    widths: dict[Tap, int] = {}
    ids = few_tokens(model)

    def watch(tap: Tap) -> Act:
        def seen(value: Tensor) -> None:
            if not _is_activations(value, ids.shape):
                raise Refused(tap.setting, f"there are no activations at {str(tap.site)!r}: name another module")
            widths[tap] = value.shape[-1]
            order.append(tap)

        return seen

    with hooked(model, [(tap.site, watch(tap)) for tap in taps]):
        run_few(model)
    missed = next((tap for tap in taps if tap not in widths), None)
    if missed is not None:
        raise Refused(missed.setting, f"a forward pass never reaches {str(missed.site)!r}")
    if len(order) > len(taps):
        repeated = next(tap for tap in taps if order.count(tap) > 1)
        raise Refused(repeated.setting, f"a forward pass reaches {str(repeated.site)!r} more than once")
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{tap.site} {width}" for tap, width in list(widths.items())[:2])
        raise Refused("model.inputs", f"the sites have different widths ({listed}): a transcoder needs one d_model")
    return order, widths[order[0]]


def few_tokens(model: PreTrainedModel) -> Tensor:
    """Ids to try a model on, [2, 5]: B and T differ, so that no module that turns them round passes unnoticed."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 8]], device=model.device).remainder(vocabulary)


@torch.inference_mode()
def run_few(model: PreTrainedModel) -> Any:
    """Run the model on a few tokens, for those who watch it; returns its output.

    Raises:
        Refused: the model cannot read text.
    """
    try:
        return model(few_tokens(model), use_cache=False)
    except (Refused, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # it needs more than text, or a kernel that this device or dtype does not have
        name = type(model).__name__
        raise Refused("model.path", f"{name} cannot read text on {model.device}: {one_line(error)}") from error


def _is_activations(value: Any, shape: torch.Size) -> bool:
    """Whether a value is a vector of floats for each token: [B, T, D] or [B * T, D]."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return floats and value.dim() in (2, 3) and value.shape[:-1] in (shape, torch.Size([shape.numel()]))


def first(value: Any) -> Any:
    """The activations, where a module returns a tuple. (A layer of experts also returns its router's scores.)"""
    return value[0] if isinstance(value, tuple) else value


def _before(act: Act) -> Callable[..., Any]:
    """A hook on a module's input, which is its first argument."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = act(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name, value = next(iter(kwargs.items()))
        new = act(value)
        return None if new is None else (args, {**kwargs, name: new})

    return hook


def _after(act: Act) -> Callable[..., Any]:
    """A hook on a module's output."""

    def hook(_: Any, args: Any, output: Any) -> Any:
        new = act(first(output))
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    return hook
