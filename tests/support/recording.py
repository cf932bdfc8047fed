"""A callback for tests: notes what it is called with, and does what a test asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen

from clt_plugins import Spec, Training, hookimpl

CALLS: list[tuple[Any, ...]] = []
WEIGHTS: dict[int, dict[str, torch.Tensor]] = {}
"""Weights by the steps that were done, at each `after`."""
ACT: dict[str, Callable[[Training], None]] = {}
"""Method -> what is done there."""


@frozen(kw_only=True)
class RecordingConfig:
    """Notes its calls."""

    every: int = 1
    """Steps between calls."""


class Recording:
    def __init__(self, config: RecordingConfig):
        self.every = config.every

    def _note(self, run: Training, what: str, *more: Any) -> None:
        CALLS.append((what, run.step, *more))
        ACT.get(what, lambda run: None)(run)

    def start(self, run: Training) -> None:
        self._note(run, "start")

    def before(self, run: Training) -> None:
        self._note(run, "before")

    def after(self, run: Training, step: Any) -> None:
        WEIGHTS[run.step] = {name: x.clone() for name, x in run.weights().items()}
        self._note(run, "after", step.number)

    def evaluated(self, run: Training, metrics: Any) -> None:
        self._note(run, "evaluated", metrics["eval/nmse"])

    def finish(self, run: Training) -> None:
        self._note(run, "finish")


@hookimpl
def clt_callbacks() -> list[Spec]:
    return [Spec("recording", RecordingConfig, lambda config, context: Recording(config))]
