"""What `generate` writes, and which process writes what of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_datasets.format.chunk import compression_library
from clt_plugins import Refused, Single, recipe_data

if TYPE_CHECKING:
    from clt_plugins import Recipe


def this_process() -> Single:
    """Which of several processes this one is; `torchrun` sets RANK and WORLD_SIZE."""
    return Single(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@attrs.frozen(kw_only=True)
class Plan:
    """What is written. A resumed generation must have the same plan."""

    tokens: int
    """Rows to train on, of all ranks together."""
    held_out: int
    """Held-out rows, or fewer where the source has no more."""
    dtype: str
    """"source": the type of the source's activations."""
    compression: Any
    chunk_bytes: int
    block_rows: int
    """0: by size."""
    batch_tokens: int
    ranks: int
    seed: int
    model: Any
    source: Any

    def rows(self, rank: int) -> int:
        """Rows to train on that a rank writes: whole batches, except for the last."""
        batch = self.batch_tokens // self.ranks
        batches, rest = divmod(self.tokens, self.batch_tokens)
        return batches * batch + min(batch, max(0, rest - rank * batch))

    def chunk_rows(self, row_bytes: int) -> int:
        """Rows of a chunk: whole batches, so that the source has a state at its end."""
        batch = self.batch_tokens // self.ranks
        return max(1, self.chunk_bytes // row_bytes // batch) * batch

    def path(self, out: Path, part: str, number: int, rank: int) -> Path:
        """The chunk that a rank writes as its `number`-th. Ranks take turns; rank 0 alone writes held-out rows."""
        if part == "train":
            number = number * self.ranks + rank
        return out / f"{part}_{number:05}.h5"


def make_plan(
    recipe: Recipe, ranks: int, tokens: int | None, held_out: int | None, compression: str, **settings: Any
) -> Plan:
    """The plan for a recipe; see `generate`.

    Raises:
        Refused: it cannot be carried out.
    """
    data = recipe_data(recipe)
    plan = Plan(
        tokens=recipe.train.steps * recipe.train.batch_tokens if tokens is None else tokens,
        held_out=recipe.train.eval_tokens if held_out is None else held_out,
        compression=compression,
        batch_tokens=recipe.train.batch_tokens,
        ranks=ranks,
        seed=recipe.seed_of_data,
        model=data.get("model"),
        source=data["source"],
        **settings,
    )
    if compression != "none":
        compression_library()
    if plan.batch_tokens % ranks:
        raise Refused("train.batch_tokens", f"{plan.batch_tokens} cannot be divided among {ranks} processes")
    if plan.tokens < ranks or plan.held_out < 0:
        raise Refused("--tokens", f"at least one for each of {ranks} processes, got {plan.tokens}")
    return plan
