"""Metrics as JSON lines: `{"step": 10, "tokens": 40960, "loss/total": 0.53, "train/nmse_by_layer": [0.4, 0.6]}`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clt_loggers.growing import Growing
from clt_loggers.values import dimensions, plain
from clt_plugins import Refused, has_file, parse_json


class JSONLines:
    """A `Logger`: one JSON object per call, in the file before the call returns.

    Tensors [L] become lists; tensors [L, F] are left out. JSON has no NaN and no infinity: they become `null`, so that
    every reader can read the column as numbers.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: Growing | None = None

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Open the file. Remove the lines that an interrupted run logged after `step`, and a line it did not finish.

        Raises:
            OSError: the file cannot be written.
            Refused: the file has lines that this logger did not write.
        """
        if has_file(self.path):
            self._drop_after(step)
        self._file = Growing(self.path, "ab")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        assert self._file is not None, "log before start"
        kept = {name: _finite(plain(value)) for name, value in metrics.items() if dimensions(value) < 2}
        self._file.write(json.dumps({"step": step, **kept}, allow_nan=False).encode() + b"\n")

    def close(self, status: str) -> None:
        if self._file is not None:
            self._file.close()

    def _drop_after(self, step: int) -> None:
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except OSError as error:  # of a read, which does not name the file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        kept = []
        for number, line in enumerate(lines, start=1):
            logged_at = _step(line)
            if logged_at is None and number < len(lines):
                raise Refused(
                    self.path, f"line {number} is not one of this log: correct the line, or move the file away"
                )
            if logged_at is not None and logged_at <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
        if kept == lines:
            return
        # Written beside it and renamed: a crash leaves the old file unchanged.
        partial = self.path.with_name(f".{self.path.name}.partial")
        file = Growing(partial, "wb")
        file.write(b"".join(kept))
        file.close(sync=True)
        partial.replace(self.path)


def _step(line: bytes) -> int | None:
    """The step of a line; None if the line is incomplete, or another program wrote it."""
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) else None


def _finite(value: Any) -> Any:
    """A number or list of numbers, with None for numbers that are not finite."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
