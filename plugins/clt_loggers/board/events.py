"""Event files of TensorBoard.

TensorBoard and PyTorch make the events; only the file is written here. PyTorch's `SummaryWriter` writes in a thread:
when the disk is full, the error comes some steps later, with a stack trace, and does not name the file.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

from clt_loggers.growing import Growing


class EventFile:
    """A new event file; records are kept in memory until `flush`.

    Args:
        folder: of the file; its parent must exist.
        step: > 0 for a run that goes on: readers then hide what was logged after it before.

    Raises:
        OSError: the file cannot be written, or the parent is missing.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        # Readers read the files in the order of their names.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        self._file = Growing(folder / f"events.out.tfevents.{seconds:010}.{nanoseconds:09}", "xb")
        self._records = io.BytesIO()
        self.add(step, file_version="brain.Event:2")
        if step > 0:
            self.add(step + 1, session_log=SessionLog(status=SessionLog.START))

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._file.closed

    def add(self, step: int, **content: Any) -> None:
        """Add a record, such as `summary=`."""
        event = Event(wall_time=time.time(), step=step, **content)
        RecordWriter(self._records).write(event.SerializeToString())

    def flush(self) -> None:
        """Write what is in memory.

        Raises:
            OSError: the disk is full; names the file.
        """
        records, self._records = self._records.getvalue(), io.BytesIO()
        if records:
            self._file.write(records)

    def close(self) -> None:
        """Write the rest, and close the file."""
        self.flush()
        self._file.close()
