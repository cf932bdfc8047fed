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

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from nnsight import NNsight
from torch import Tensor, nn

from clt_plugins import Refused
from clt_stream.library_errors import one_line
from clt_stream.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    Args:
        taps: in the order in which a forward pass reaches them, see `find_order`.
    """

    def __init__(self, model: PreTrainedModel, taps: Sequence[Tap]):
        self.model = model
        self.traced = NNsight(_skeleton(model, {tap.site.path for tap in taps}))
        self.modules = [(self.traced.get(tap.site.path), tap) for tap in taps]

    def run(self, see: Callable[[Tap, Tensor], None], ids: Tensor, **kwargs: Any) -> None:
        """One forward pass on `ids` [C, T]; `see` gets the activations at each tap, [C, T, D], while the model runs."""
        with self.traced.trace(ids, fn=self.model, **kwargs) as tracer:
            for module, tap in self.modules:
                see(tap, _first(module.input if tap.site.side == "input" else module.output))
            tracer.stop()


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
    """Run two tokens through the model, to find in which order it reaches the sites.

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
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)

    def watch(tap: Tap) -> Act:
        def seen(value: Tensor) -> None:
            if not _is_activations(value, ids.numel()):
                raise Refused(tap.setting, f"there are no activations at {str(tap.site)!r}: name another module")
            widths[tap] = value.shape[-1]
            order.append(tap)

        return seen

    with hooked(model, [(tap.site, watch(tap)) for tap in taps]), torch.inference_mode():
        try:
            model(ids, use_cache=False)
        except (Refused, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # it needs more than text, or a kernel that this device or dtype does not have
            name = type(model).__name__
            raise Refused("model.path", f"{name} cannot read text on {model.device}: {one_line(error)}") from error
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


def _is_activations(value: Any, tokens: int) -> bool:
    """Whether a value is a vector of floats for each token."""
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return floats and value.dim() >= 2 and value.shape[:-1].numel() == tokens


def _first(value: Any) -> Any:
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
        new = act(_first(output))
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    return hook


def _skeleton(model: PreTrainedModel, paths: Collection[str]) -> nn.Module:
    """The modules at some paths, at the same paths, and nothing else of the model.

    nnsight stops at every module that it wraps, before and after it, whether its value is needed or not. A model has
    many small modules, and most of those stops would be for nothing.
    """
    root = nn.Module()
    for path in sorted(paths):  # a module comes before the modules inside it, which are then there already
        *parents, name = path.split(".")
        parent = root
        for step in parents:
            if step not in dict(parent.named_children()):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        if name not in dict(parent.named_children()):
            parent.add_module(name, model.get_submodule(path))
    return root
