"""The Weights & Biases logger. Shapes: L layers, F features per layer."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_wandb import WandbConfig

STEP = "step"


class Wandb:
    """Gives metrics to wandb's own process, which sends them; a step does not wait for the network."""

    def __init__(self, config: WandbConfig, folder: Path):
        self.config, self.folder = config, folder
        self.run: Any = None

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Begin a run, or continue the one whose id is in the folder.

        Raises:
            Refused: wandb cannot start (not logged in), with its reason.
        """
        import wandb

        id_file = self.folder / "wandb.id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        try:
            self.run = wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                mode=self.config.mode,
                name=recipe["name"],
                id=id_file.read_text().strip(),
                resume="allow",
                config=dict(recipe),
                dir=self.folder,
                settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
            )
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            raise Refused("loggers", f'wandb: {error}: run `wandb login`, or set mode = "offline"') from error
        # A resumed run logs some steps again. wandb's own counter cannot go back, so steps are a metric.
        self.run.define_metric("*", step_metric=STEP)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers as curves; tensors [L] as one per layer; tensors [L, F] as a histogram per layer."""
        values: dict[str, Any] = {STEP: step}
        for name, value in metrics.items():
            if not hasattr(value, "tolist"):
                values[name] = value
            elif value.ndim == 0:
                values[name] = value.item()
            else:
                values |= {f"{name}/{layer:02}": _plain(part) for layer, part in enumerate(value)}
        self.run.log(values)

    def close(self, status: str) -> None:
        """Waits until everything is written (and sent, online). A crash shows as such."""
        if self.run is not None:
            self.run.finish(exit_code=1 if status == "failed" else 0)


def _plain(part: Any) -> Any:
    """One layer of a tensor: its number, or the histogram of its finite numbers."""
    import wandb

    if part.ndim == 0:
        return part.item()
    numbers = [x for x in part.flatten().tolist() if math.isfinite(x)]
    return wandb.Histogram(np_histogram=np.histogram(numbers, bins=32)) if numbers else None
