"""What `generate` is to write, and which of several processes writes what of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import attrs

from clt_datasets.format.manifest import replace
from clt_plugins import Refused, Single

SETTINGS = ".generate.json"


def share() -> Single:
    """Which of several processes this one is; `torchrun` sets RANK and WORLD_SIZE."""
    return Single(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@attrs.frozen(kw_only=True)
class Plan:
    """What is to be written: settings that a resumed generation must share."""

    tokens: int
    """Rows to train on, of all ranks together."""
    held_out: int
    """Held-out rows, or fewer where the source has no more."""
    dtype: str
    """"source" is what the source gives."""
    compression: Any
    chunk_bytes: int
    block_rows: int
    """0: by size."""
    batch_tokens: int
    ranks: int
    seed: int
    model: Any
    source: Any

    def share(self, rank: int) -> int:
        """Rows to train on that a rank writes: whole batches, but for the last."""
        batch = self.batch_tokens // self.ranks
        batches, rest = divmod(self.tokens, self.batch_tokens)
        return batches * batch + min(batch, max(0, rest - rank * batch))

    def chunk_rows(self, row_bytes: int) -> int:
        """Rows of a chunk: whole batches, so that a source's state stands at its end."""
        batch = self.batch_tokens // self.ranks
        return max(1, self.chunk_bytes // row_bytes // batch) * batch


def prepare(out: Path, plan: Plan) -> None:
    """Take a folder: an empty one, or one in which the same generation was begun."""
    settings = json.loads(json.dumps(attrs.asdict(plan)))
    path = out / SETTINGS
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(p for p in out.iterdir() if not p.name.startswith("."))):
            raise Refused(out, "already there, and no data set in the making: give another folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        # Each rank writes the same.
        replace(path, json.dumps(settings).encode())
        return
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise Refused(
                out,
                f"begun with other settings: {name} was {before.get(name)}, now it is {value}; "
                f"give another folder with --out",
            )
