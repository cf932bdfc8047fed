"""Whether a site is what the MLP adds to the residual: tried on each layer, with a few tokens, before anything is read.

A layer is run again and again on what it gets in one forward pass, with values at a site replaced. x is what the layer
reads, h(v) its output with v in the place of the site's value, and *silent* means that its token mixing (attention,
recurrence, convolution) adds nothing. A site is what the MLP adds if

1. it has one row per token: [B, T, D] or [B * T, D];
2. h(v) - h(0) = s v for random v, with one number s: nothing between the site and the residual changes what it adds
   (s is 1, but `residual_multiplier` in Granite);
3. in the silent layer h(0) = x: no other feed-forward branch is left, and the residual does not run through the site.
   (A factor, and a bias that is the same for all tokens, are allowed.)

What the transcoder reads is the MLP's input if its rows alone determine the rows of the site: in another order, they
give the same rows in that order.

Names of modules play no part: mixing modules are those whose output at one token depends on another token.

Shapes: B sequences, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import attrs
import torch
from torch import Tensor

from clt_stream.compare import centred, multiple, near, rounding
from clt_stream.replay import Call, Replay, zeros
from clt_stream.taps import Site

SMALL = 1 / 64
"""The layer's input is made this small for test 3 (exactly, as a power of two). Branches that normalise their input add
as much as before, so they stand out of the rounding of a 16-bit residual."""


@attrs.frozen
class Result:
    """What a layer has."""

    layer: int
    inputs: Site | None = None
    outputs: Site | None = None
    complaint: str = ""
    """Why nothing was found, or why the named sites are something else."""
    fault: str = "outputs"
    """The setting that the complaint is about: "inputs" or "outputs"."""


class Layer(Replay):
    """The tests above, on one layer."""

    def adds(self, site: Site) -> tuple[float, str]:
        """The factor s, and why a site is not what the MLP adds ("" if it is)."""
        assert self.x is not None
        value = self.value(site)
        rows = self.rows(value)
        if rows is None or rows.shape != self.x.shape:
            return 1.0, "it has not one row of d_model numbers per token"
        x = self.x * SMALL
        left = self.run([(site, zeros)], x=x, silent=True)
        kept, remainder = multiple(centred(left), centred(x))
        if abs(kept) < 0.1:
            return 1.0, "the residual stream runs through it"
        if not rounding(remainder, left, x):
            others = ", ".join(repr(call.path) for call in self._beside(site, rows))
            why = f"{others} adds to it too" if others else "it is changed after the sum, or something else adds to it"
            return 1.0, f"with it at zero the layer does not pass the residual stream on: {why}"
        probe = self._probe()
        acts = [(site, zeros)], [(site, lambda value: probe.reshape(value.shape).clone())]
        zero, moved = (self.run(act, x=x, silent=True) for act in acts)
        scale, remainder = multiple(moved.double() - zero.double(), probe)
        scale = float(f"{scale:.{7 if x.dtype in (torch.float32, torch.float64) else 3}g}")
        fits = abs(scale) > 1e-4 and rounding(remainder, x, zero, moved, probe)
        if fits:  # and the same in the layer as it is, where mixing may come after the site
            zero, moved = map(self.run, acts)
            fits = rounding(moved.double() - zero.double() - scale * probe.double(), self.x, zero, moved, probe)
        if not fits:
            return 1.0, "the layer changes its values before it adds them to the residual, or does not add them"
        return scale, ""

    def _probe(self) -> Tensor:
        """Random rows of the size of the layer's output [B, T, D], but of very different norms: a norm between the site
        and the residual would make them alike."""
        assert self.x is not None
        draw = torch.Generator().manual_seed(0)
        norms = 2.0 ** (torch.arange(self.shape.numel()) % 5 - 2).reshape(*self.shape, 1)
        rows = torch.randn(self.x.shape, generator=draw) * norms
        return (rows.to(self.x.device) * self.h.float().square().mean().sqrt()).to(self.x.dtype)

    def _beside(self, site: Site, rows: Tensor) -> Iterator[Call]:
        """Feed-forward modules that the rows at a site do not depend on."""
        for call in self.branches:
            other = self._site(call.path, "output")
            if not _within(site.path, other.path):
                without = self.rows(self.value(site, [(other, zeros)]))
                if without is not None and near(without, rows):
                    yield call

    def determines(self, read: Site, written: Site) -> str:
        """Why the rows at one site do not determine those at another ("" if they do)."""
        before, rows = self.rows(self.value(written)), self.rows(self.value(read))
        if rows is None:
            return "it has not one row per token"
        turned = rows.flip(1)
        after = self.rows(self.value(written, [(read, lambda value: turned.reshape(value.shape).clone())]))
        assert before is not None
        if after is None or not near(after.flip(1), before):
            return f"what {written.path!r} adds depends on more than that"
        return ""

    def result(self, number: int, named: Mapping[str, Site]) -> Result:
        """The layer's sites: found, unless they are named; and what is wrong with the named ones.

        Args:
            number: of the layer.
            named: by "inputs" and "outputs".
        """
        if self.complaint or any(not site.path.startswith(f"{self.path}.") for site in named.values()):
            complaint = self.complaint or "it is not a part of the layer"
            whole = len(named) == 2
            return Result(number, named["inputs"] if whole else None, named["outputs"] if whole else None, complaint)
        found = Result(number) if len(named) == 2 else self._find(number)
        if found.outputs is None and len(named) < 2:
            return found
        read, written = named.get("inputs", found.inputs), named.get("outputs", found.outputs)
        assert read is not None and written is not None
        complaint, fault = "", "outputs"
        if "outputs" in named:
            scale, complaint = self.adds(written)
            if not complaint and scale != 1:
                complaint = f"the layer adds {scale:g} times that"
        if "inputs" in named and not complaint:
            complaint, fault = self.determines(read, written), "inputs"
        return Result(number, read, written, complaint, fault)

    def _find(self, number: int) -> Result:
        candidates = [
            call
            for path, call in self.calls.items()
            if self.counts[path] == 1 and not any(_within(path, mixing.path) for mixing in self.mixing)
        ]
        candidates.sort(key=lambda call: (call.path.count("."), not call.has_matrix))  # outermost first
        complaints: dict[str, str] = {}
        for call in candidates:
            rows = self.rows(call.output)
            if rows is None or self.x is None or rows.shape != self.x.shape:
                continue
            site = self._site(call.path, "output")
            scale, complaint = self.adds(site)
            if complaint:
                complaints[call.path] = complaint
                continue
            read = next((read for read in self._readable(call) if not self.determines(read, site)), None)
            if read is None:
                return Result(number, complaint=f"no module reads all that {call.path!r} depends on", fault="inputs")
            return Result(number, read, attrs.evolve(site, scale=scale))
        if not self.branches:
            return Result(number, complaint="it has no feed-forward module")
        reasons = [f"{call.path!r}: {complaints[call.path]}" for call in self.branches if call.path in complaints]
        names = ", ".join(repr(call.path) for call in self.branches)
        return Result(number, complaint="; ".join(reasons) or f"the output of none of {names} is added to the residual")

    def _readable(self, written: Call) -> Iterator[Site]:
        """Where the MLP may read: the inputs of its modules, then the outputs of what is called before it."""
        order = list(self.calls)
        before = order[: order.index(written.path)]
        for call in self.branches:
            if _within(written.path, call.path) or call.path in before:
                yield self._site(call.path, "input")
        for path in before:
            if "." not in path and not any(_within(path, call.path) for call in self.mixing):
                yield self._site(path, "output")

    def _site(self, path: str, side: Literal["input", "output"]) -> Site:
        return Site(f"{self.path}.{path}", side)


def _within(path: str, other: str) -> bool:
    """Whether a module is another one, or inside it."""
    return path == other or path.startswith(f"{other}.")
