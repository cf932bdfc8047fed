"""Reading activations: the model runs inside an nnsight trace and stops after the last site, before the LM head.

The traced block runs between the model's modules and copies what it needs straight into the block of rows; nothing else
of the forward pass is kept.

Shapes: C contexts, T tokens in the longest, L layers, D d_model, R rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnsight import NNsight
from torch import Tensor, nn

from clt_plugins import Batch, Refused
from clt_stream.contexts import Contexts
from clt_stream.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rows:
    """Room for R tokens' activations, ids and places."""

    def __init__(self, count: int, layers: int, d_model: int, dtype: torch.dtype, device: torch.device):
        self.inputs, self.targets = (_room((count, layers, d_model), dtype, device) for _ in range(2))
        self.token_ids = torch.empty(count, dtype=torch.int64, device=device)
        self.positions = torch.empty(count, 2, dtype=torch.int64, device=device)

    def stretch(self, rows: slice) -> Batch:
        """Neighbouring rows, not copied."""
        return Batch(self.inputs[rows], self.targets[rows], self.token_ids[rows], self.positions[rows])

    def pick(self, index: Tensor) -> Batch:
        """Copies of some rows, [B]."""
        # Three times as fast as `x[index]`, since it copies whole rows.
        return Batch(*(x.index_select(0, index) for x in (self.inputs, self.targets, self.token_ids, self.positions)))

    def move(self, rows: slice, to: int) -> None:
        """Copy rows to another place; the two may overlap."""
        for x in (self.inputs, self.targets, self.token_ids, self.positions):
            x[to : to + rows.stop - rows.start] = x[rows].clone()


class Reader:
    """Runs a model on contexts and picks up the activations at its sites.

    Raises:
        ValueError: the sites are not activations of one width, or are not reached by a forward pass.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[tuple[Site, Site]]):
        self.model = model
        self.n_layers = len(sites)
        self.dtype, self.device = model.dtype, model.device
        order, self.d_model = _probe(model, sites)
        self.traced = NNsight(_skeleton(model, {path for path, *_ in order}))
        self.order = [(self.traced.get(path), *rest) for path, *rest in order]

    @torch.inference_mode()
    def read(self, contexts: Contexts, rows: Tensor, into: Rows, at: int) -> None:
        """Run the model on contexts and put some of their rows, [R], into rows `at` to `at + R`."""
        place = slice(at, at + len(rows))
        into.token_ids[place] = contexts.ids.flatten()[rows].to(into.token_ids.device)
        into.positions[place] = contexts.places(rows).to(into.positions.device)
        rows = rows.to(self.device)
        kwargs: dict[str, Any] = {"position_ids": contexts.position_ids, "use_cache": False}
        if contexts.attention_mask is not None:
            kwargs["attention_mask"] = contexts.attention_mask
        with self.traced.trace(contexts.ids, fn=self.model, **kwargs) as tracer:
            for module, side, layer, is_input in self.order:
                value = module.input if side == "input" else module.output
                _copy(value, rows, (into.inputs if is_input else into.targets)[place, layer])
            tracer.stop()


def _skeleton(model: PreTrainedModel, paths: Collection[str]) -> nn.Module:
    """The modules at some paths, at the same paths, and nothing else of the model.

    Every module that nnsight wraps stops at it on its way in and out, whether it is asked for or not; of a model of
    many small modules these are most of the stops.
    """
    root = nn.Module()
    for path in sorted(paths):  # so that a module comes before those inside it, which it brings along
        *parents, name = path.split(".")
        at = root
        for parent in parents:
            if parent not in dict(at.named_children()):
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        if name not in dict(at.named_children()):
            at.add_module(name, model.get_submodule(path))
    return root


def _room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor; on a CPU in NumPy's memory, which asks for huge pages.

    A block is written in strides and read in random order, one row from here and one from there: with small pages,
    looking up where each of them lies takes as long as the copying.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    raw = np.empty(torch.Size(shape).numel() * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def _copy(value: Any, rows: Tensor, out: Tensor) -> None:
    """Rows of a module's input or output [C, T, D] to `out` [R, D], in one pass."""
    flat = _tensor(value).flatten(0, -2)
    if flat.device == out.device and flat.dtype == out.dtype:
        torch.index_select(flat, 0, rows, out=out)
    else:
        out.copy_(flat.index_select(0, rows))


def _tensor(value: Any) -> Tensor:
    """The activations, where a module gives them first of several things (experts give their router's scores too)."""
    return value[0] if isinstance(value, tuple) else value


def _probe(model: PreTrainedModel, sites: Sequence[tuple[Site, Site]]) -> tuple[list[tuple[str, str, int, bool]], int]:
    """In which order a forward pass reaches the sites (a trace must ask for them in that order), and their width.

    Returns:
        (path, side, index of the layer, whether it is one of the inputs) of each site; and D.
    """
    wanted = [(site, layer, site is pair[0]) for layer, pair in enumerate(sites) for site in pair]
    order: list[tuple[str, str, int, bool]] = []
    widths: dict[str, int] = {}
    hooks = []

    def watch(site: Site, layer: int, is_input: bool) -> None:
        def seen(value: Any) -> None:
            widths[str(site)] = _tensor(value).shape[-1]
            order.append((site.path, site.side, layer, is_input))

        def before(_: Any, args: Any, kwargs: Any) -> None:
            seen(args[0] if args else next(iter(kwargs.values())))

        def after(_: Any, args: Any, output: Any) -> None:
            seen(output)

        module = model.get_submodule(site.path)
        if site.side == "input":
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(after))

    for site, layer, is_input in wanted:
        watch(site, layer, is_input)
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    missed = [str(site) for site, _, _ in wanted if str(site) not in widths]
    if missed:
        raise Refused("model.inputs", f"a forward pass never reaches {missed[0]!r}")
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in list(widths.items())[:2])
        raise Refused("model.inputs", f"the sites are of different widths ({listed}): a transcoder needs one d_model")
    return order, next(iter(widths.values()))


def packs(reader: Reader) -> bool:
    """Whether the model keeps packed pieces apart: a piece reads the same whatever stands before it, as if alone."""
    vocabulary = reader.model.config.get_text_config().vocab_size
    piece, before, other = (
        torch.tensor([[3, 1, 2, 5], [2, 7, 3, 1]]),
        torch.tensor([[1, 2, 3]]),
        torch.tensor([[6, 5, 9]]),
    )
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3])

    def run(ids: Tensor, places: Tensor) -> Tensor:
        rows = torch.arange(ids.numel())
        into = Rows(len(rows), reader.n_layers, reader.d_model, reader.dtype, reader.device)
        contexts = Contexts(ids.remainder(vocabulary), places.expand_as(ids), None, rows, 0)
        reader.read(contexts, rows, into, 0)
        return into.targets.view(*ids.shape, -1)[:, -4:].float()

    def near(one: Tensor, two: Tensor, tolerance: float) -> bool:
        return bool((one - two).norm() <= tolerance * two.norm())

    first, second = (run(torch.cat([start.expand(2, -1), piece], 1), places) for start in (before, other))
    # The same shapes round alike; other shapes may differ by the rounding of a 16-bit type.
    return near(first, second, 1e-6) and near(first, run(piece, places[3:]), 0.02)
