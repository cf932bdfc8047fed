"""The logger `example`: a line `step,name,value` for every number, in a file of the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from io import TextIOWrapper

    from clt_plugins import Context


@frozen(kw_only=True)
class ExampleConfig:
    """Numbers as lines of comma-separated values."""

    file: str = "example.csv"
    """The file's name in the run's folder."""


class Example:
    """A `Logger`. Only rank 0 has one."""

    def __init__(self, config: ExampleConfig, context: Context):
        if context.folder is None:
            raise Refused("loggers", "example writes into the run's folder, and this run has none; use another logger")
        self.path = context.folder / config.file
        self.out: TextIOWrapper | None = None

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Before the first step. A resumed run logs again what came after `step`: those lines are dropped here."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) <= step]
            self.path.write_text("".join(kept))
        self.out = self.path.open("a", buffering=1)  # a line is written at once: a crash loses nothing

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers get a line, tensors [L] a line per layer; tensors [L, F] (histograms) are left out."""
        assert self.out is not None
        for name, value in metrics.items():
            values = value.tolist() if hasattr(value, "tolist") else value
            if isinstance(values, int | float):
                self.out.write(f"{step},{name},{values}\n")
            elif isinstance(values, list) and not isinstance(values[0], list):
                self.out.writelines(f"{step},{name}.{layer},{x}\n" for layer, x in enumerate(values))

    def close(self, status: str) -> None:
        """At the end, also after a crash, and also where `start` failed."""
        if self.out is not None:
            self.out.close()


@hookimpl
def clt_loggers() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
