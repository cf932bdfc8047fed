"""Where metrics are written: the loggers `tensorboard`, `jsonl` and `console`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class TensorBoardConfig:
    """Event files for TensorBoard, in `tensorboard/` in the run's folder: curves, histograms by layer, the recipe."""

    flush_seconds: float = field(default=10.0, validator=validators.ge(0))
    """Metrics are kept in memory up to this long, and are then written with the next ones. 0 writes each at once."""


@frozen(kw_only=True)
class JSONLinesConfig:
    """`metrics.jsonl` in the run's folder: one JSON object per line, each time something is logged. Histograms are left
    out."""


@frozen(kw_only=True)
class ConsoleConfig:
    """One line on stderr, each time something is logged."""

    metrics: list[str] = field(
        factory=lambda: [
            "tokens",
            "loss/total",
            "optim/lr",
            "time/tokens_per_s",
            "eval/nmse",
            "eval/l0",
            "eval/dead_fraction",
        ],
        validator=validators.min_len(1),
    )
    """The columns after the step, in this order. A line shows those that were logged with it; where these are `tokens`
    alone, what a callback or a stage has logged, six numbers at most."""


def build_tensorboard(config: TensorBoardConfig, context: Context) -> Any:
    from clt_loggers.board.logger import TensorBoard

    return TensorBoard(_folder(context, "tensorboard") / "tensorboard", config.flush_seconds)


def build_jsonl(config: JSONLinesConfig, context: Context) -> Any:
    from clt_loggers.jsonl import JSONLines

    return JSONLines(_folder(context, "jsonl") / "metrics.jsonl")


def build_console(config: ConsoleConfig, context: Context) -> Any:
    from clt_loggers.console import Console

    return Console(config.metrics, context.label)


def _folder(context: Context, name: str) -> Path:
    if context.folder is None:
        raise Refused("loggers", f"{name} needs a folder to write in, and this run has none: use another logger")
    return context.folder


@hookimpl
def clt_loggers() -> list[Spec]:
    return [
        Spec("tensorboard", TensorBoardConfig, build_tensorboard),
        Spec("jsonl", JSONLinesConfig, build_jsonl),
        Spec("console", ConsoleConfig, build_console),
    ]
