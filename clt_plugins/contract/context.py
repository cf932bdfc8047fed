"""What a plugin's `build` is told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from clt_plugins.errors import Refused

if TYPE_CHECKING:
    import torch

    from clt_plugins.contract.model.kernels import Kernels
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.recipe import Recipe


@attrs.frozen(kw_only=True)
class Context:
    """What is known of the run when a choice is built. New fields may come; none goes without a new API_VERSION."""

    recipe: Recipe | None
    """The whole recipe, typed; None where a saved transcoder is loaded."""
    seed: int
    """The run's seed; derive your own generators from it. For sources and transforms, the recipe's `data_seed`."""
    device: torch.device
    """Where the transcoder lives."""
    dtype: torch.dtype
    """The type of its parameters."""
    batch_tokens: int
    """B: tokens in a training batch, of all ranks together."""
    steps: int
    """How many training steps the run has."""
    dead_after_tokens: int = 0
    """A feature that was not active for this many tokens is dead."""
    kernels: Kernels = None  # type: ignore[assignment]
    """Selection and sparse products for this device; None while kernels are built."""
    parallel: Parallel = None  # type: ignore[assignment]
    """How features and tokens are split over ranks; None while it is built."""
    folder: Path | None = None
    """The run's folder; None where nothing is written (`--dry-run`, tests)."""
    label: str = ""
    """What this run is called among those of its process, where there are several: a sweep's `k=32,seed=0`."""
    n_layers: int = 0
    """L: 0 while the source, which knows it, is not built."""
    d_model: int = 0
    """D: 0 while the source, which knows it, is not built."""
    n_features: int = 0
    """F: features per layer, of all ranks together."""

    @property
    def schedule_steps(self) -> int:
        """The steps that schedules go over: `train.schedule_steps`, else all of the run."""
        return (self.recipe.train.schedule_steps if self.recipe is not None else None) or self.steps

    def batch_share(self) -> int:
        """Tokens in a training batch of this data rank.

        Raises:
            Refused: the batch cannot be divided among the data ranks.
        """
        ranks = self.parallel.data_ranks
        if self.batch_tokens % ranks:
            raise Refused("train.batch_tokens", f"{self.batch_tokens} cannot be divided among {ranks} data ranks")
        return self.batch_tokens // ranks
