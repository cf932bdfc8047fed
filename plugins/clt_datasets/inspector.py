"""Data sets for the command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path

from clt_datasets.format.manifest import CHUNK_NAME
from clt_plugins import Inspected, Refused, read_small


class DataSets:
    """Recognises data sets, complete or not, and says what they hold."""

    def recognises(self, place: Path) -> bool:
        """Whether there is a chunk, or a manifest that lists some."""
        if not place.is_dir():
            return False
        if any(CHUNK_NAME.fullmatch(path.name) for path in place.glob("*.h5")):
            return True
        try:
            return b'"chunks"' in read_small(place / "manifest.json")
        except Refused:
            return False

    def inspect(self, place: Path, *, verify: bool) -> Inspected:
        """Counts, statistics, the first rows; see `make.inspect`."""
        from clt_datasets.make.inspect import as_text, inspect

        report = inspect(place, verify=verify)
        return Inspected(text=as_text(report), data=json.loads(report.to_json()), faults=report.faults)
