"""A plugin for tests: a logger that interrupts or kills its own process at a step, and a loss that kills one rank."""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

from attrs import frozen

from clt_plugins import Spec, hookimpl


@frozen(kw_only=True)
class InterruptConfig:
    """Send this process a signal when a step is logged."""

    at: int
    """The step."""
    kind: Literal["SIGINT", "SIGTERM", "SIGKILL"] = "SIGINT"
    """The signal."""


class Interrupt:
    def __init__(self, config: InterruptConfig):
        self.config = config

    def start(self, recipe: Any, step: int) -> None:
        pass

    def log(self, step: int, metrics: Any) -> None:
        if step == self.config.at and "loss/total" in metrics:
            os.kill(os.getpid(), getattr(signal, self.config.kind))

    def close(self, status: str) -> None:
        pass


@frozen(kw_only=True)
class DyingConfig:
    """No loss; kills the process of rank DIE_RANK before the step DIE_AT, both from the environment."""


class Dying:
    needs_pre = False

    def selection(self, tokens: int, idle_tokens: Any) -> None:
        return None

    def __call__(self, forward: Any) -> dict[str, Any]:
        step = round(forward.progress * 12)
        if os.environ.get("DIE_RANK") == os.environ.get("RANK") and step == int(os.environ.get("DIE_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


@hookimpl
def clt_losses() -> list[Spec]:
    return [Spec("dying", DyingConfig, lambda config, context: Dying())]


@hookimpl
def clt_loggers() -> list[Spec]:
    return [Spec("interrupt", InterruptConfig, lambda config, context: Interrupt(config))]
