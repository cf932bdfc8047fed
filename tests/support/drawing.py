"""Plugins for tests: a loss, a callback and a logger that draw from torch's own generator, and a source with an
identity."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen

from clt_plugins import FREE_ON_RESUME, Batch, Context, Refused, Spec, hookimpl


@frozen(kw_only=True)
class DrawingConfig:
    """No settings."""


class Drawing:
    needs_pre = False

    def selection(self, tokens: int, idle_tokens: Any) -> None:
        return None

    def __call__(self, forward: Any) -> dict[str, Any]:
        return {"drawing": torch.rand(()) * forward.reconstruction.square().mean()}


class Begins:
    """Draws before the first step of a process."""

    every = 0

    def start(self, *arguments: Any) -> None:
        torch.rand(3)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        pass

    def close(self, status: str) -> None:
        pass


@frozen(kw_only=True)
class FileConfig:
    """Rows that follow from the bytes of a file."""

    file: Path
    """The file."""
    threads: int = field(default=1, metadata=FREE_ON_RESUME)
    """How fast it is read."""


class FromFile:
    """A source whose rows follow from a file's content and their number."""

    n_layers, d_model = 3, 6

    def __init__(self, config: FileConfig, context: Context):
        if not config.file.is_file():
            raise Refused("source.file", f"{config.file}: no such file")
        self.key = sum(config.file.read_bytes())
        self.tokens, self.count = context.batch_share(), 0

    def _batch(self, number: int, tokens: int) -> Batch:
        generator = torch.Generator().manual_seed(self.key * 10_000 + number)
        return Batch(*torch.randn(2, tokens, 3, 6, generator=generator))

    def next(self) -> Batch:
        self.count += 1
        return self._batch(self.count, self.tokens)

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "key": self.key}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["key"] != self.key:
            raise Refused("source.file", "a position in another file")
        self.count = state["count"]

    def held_out(self, tokens: int) -> list[Batch]:
        return [self._batch(0, tokens)]

    def statistics(self) -> None:
        return None

    def identity(self) -> Mapping[str, str]:
        return {"source.file": f"sum {self.key}"}


@hookimpl
def clt_losses() -> list[Spec]:
    return [Spec("drawing", DrawingConfig, lambda config, context: Drawing())]


@hookimpl
def clt_callbacks() -> list[Spec]:
    return [Spec("drawing", DrawingConfig, lambda config, context: Begins())]


@hookimpl
def clt_loggers() -> list[Spec]:
    return [Spec("drawing", DrawingConfig, lambda config, context: Begins())]


@hookimpl
def clt_sources() -> list[Spec]:
    return [Spec("file", FileConfig, FromFile)]
