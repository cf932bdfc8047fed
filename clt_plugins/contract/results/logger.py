"""What `[[loggers]]` builds: a sink of metrics.

Shapes: L layers, F features per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Logger(Protocol):
    """A sink of metrics. Only rank 0 has one. Must not block the training step for long."""

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Called before the first step.

        Args:
            recipe: resolved, as plain TOML data.
            step: > 0 for a resumed run; what the interrupted run logged after this step will be logged again.
        """

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics by `group/name`: numbers; or CPU tensors [L] (one value per layer) and [L, F] (a histogram)."""

    def close(self, status: str) -> None:
        """Called at the end and after an error, with "finished", "interrupted" or "failed"; write what is buffered."""
