"""Messages of many runs on one console: each begins with the label of the run that has its turn."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """A block in which what is logged begins with a label."""
    before = logging.getLogRecordFactory()

    def make(*args: Any, **named: Any) -> logging.LogRecord:
        record = before(*args, **named)
        if record.levelno >= logging.INFO:
            # The text is put together here: a label may hold a `%`.
            record.msg, record.args = f"{label}: {record.getMessage()}", ()
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)
