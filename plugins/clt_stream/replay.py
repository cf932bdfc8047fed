"""A layer of a language model that can be run again on what it got in one forward pass, with values at sites replaced.

Shapes: B sequences, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from clt_stream.compare import near
from clt_stream.taps import Act, Site, first, hooked


@attrs.frozen(eq=False)
class Call:
    """One module of the layer in a forward pass."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def has_matrix(self) -> bool:
        return any(weight.dim() >= 2 for weight in self.module.parameters())


class Replay:
    """A layer with what it gets in a forward pass; it can be run again.

    Args:
        path: of the layer in the model.
        shape: (B, T).
    """

    def __init__(self, path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size):
        self.path, self.layer, self.shape = path, layer, shape
        self.args, self.kwargs = args, kwargs
        at = next((n for n, value in enumerate(args) if self._is_residual(value)), None)
        name = next((key for key, value in kwargs.items() if self._is_residual(value)), None)
        self.key: Any = name if at is None else at
        self.x: Tensor | None = None
        self.mixing: list[Call] = []
        self.calls: dict[str, Call] = {}
        self.counts: dict[str, int] = {}
        self.branches: list[Call] = []
        """Feed-forward modules: with weights, each token on its own; in the order in which they are called."""
        self.h: Any = None
        if self.key is None:
            return
        self.x = (kwargs[self.key] if isinstance(self.key, str) else args[self.key]).clone()
        self._record()

    def _is_residual(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dim() == 3
            and value.shape[:2] == self.shape
        )

    @property
    def complaint(self) -> str:
        """Why the layer cannot be tried at all."""
        if self.x is None:
            return "the layer reads no residual stream of one vector per token"
        if not self._is_residual(self.h) or self.h.shape != self.x.shape:
            return "the layer's output is not a residual stream of one vector per token"
        return ""

    def run(self, acts: Sequence[tuple[Site, Act]] = (), *, x: Tensor | None = None, silent: bool = False) -> Any:
        """The layer's output [B, T, D] with acts at sites."""
        x = self.x if x is None else x
        assert x is not None
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.key, int):
            args[self.key] = x.clone()  # some layers add to it in place
        else:
            kwargs[self.key] = x.clone()
        silence = self._silence() if silent else ()
        inner = [(attrs.evolve(site, path=site.path.removeprefix(f"{self.path}.")), act) for site, act in acts]
        with hooked(self.layer, [*silence, *inner]):
            return first(self.layer.forward(*args, **kwargs))

    def _record(self) -> None:
        """Run the layer once and note what each of its modules gets and gives."""

        def keep(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                self.counts[path] = self.counts.get(path, 0) + 1
                if path not in self.calls:  # copies: some layers go on to add to a tensor in place
                    values = tuple(map(_copy, args)), {key: _copy(value) for key, value in kwargs.items()}
                    self.calls[path] = Call(path, module, *values, _copy(first(output)))

            return hook

        handles = [
            module.register_forward_hook(keep(path), with_kwargs=True)
            for path, module in self.layer.named_modules()
            if path
        ]
        try:
            self.h = self.run()
        finally:
            for handle in handles:
                handle.remove()
        outermost = [call for path, call in self.calls.items() if not any(up in self.calls for up in _ancestors(path))]
        self.mixing = [call for call in outermost if call.has_matrix and self._mixes(call)]
        mixing = {call.path for call in self.mixing}
        self.branches = [call for call in outermost if call.has_matrix and call.path not in mixing]

    def _mixes(self, call: Call) -> bool:
        """Whether the output of a module at one token depends on another token."""
        before = self.rows(call.output)
        if before is None:
            return True
        args, kwargs = list(call.args), dict(call.kwargs)
        for keys, values in ((range(len(args)), args), (list(kwargs), kwargs)):
            for key in keys:
                rows = self.rows(values[key])  # type: ignore[index]
                if rows is not None:
                    changed = rows.clone()
                    changed[:, 0] = changed[:, 1] - 2 * changed[:, 0]
                    values[key] = changed.view_as(values[key])  # type: ignore[index, call-overload]
        try:
            after = self.rows(first(call.module.forward(*args, **kwargs)))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return True  # it needs more than it got: no module that treats each token on its own does
        return after is None or not near(after[:, 1:], before[:, 1:])

    def _silence(self) -> Iterator[tuple[Site, Act]]:
        """Zeros at every module inside the mixing ones that has no modules inside: so they add nothing, but pass on a
        residual that runs through them."""
        for call in self.mixing:
            for name, module in call.module.named_modules():
                if next(module.children(), None) is None and next(module.parameters(), None) is not None:
                    yield Site(f"{call.path}.{name}" if name else call.path, "output"), zeros

    def rows(self, value: Any) -> Tensor | None:
        """[B, T, D] of a value with one row per token; None if it has not."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (2, 3):
            return None
        if value.shape[:-1] not in (self.shape, torch.Size([self.shape.numel()])):
            return None
        return value.reshape(*self.shape, -1)

    def value(self, site: Site, acts: Sequence[tuple[Site, Act]] = ()) -> Any:
        """What is at a site, with acts at others."""
        seen: list[Any] = []
        self.run([*acts, (site, lambda value: seen.append(_copy(value)))])
        return seen[0] if len(seen) == 1 else None


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def zeros(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, Tensor) else None


def _ancestors(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
