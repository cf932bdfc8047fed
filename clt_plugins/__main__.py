"""`python -m clt_plugins`, and the console script `clt-plugins`."""

from __future__ import annotations

import io
import logging
import os
import sys

NO_MEMORY = b"out of memory\n"
"""What is said where there is no memory to make a message."""


class Lines(logging.Formatter):
    """`warning: text`; information without a level in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def main() -> None:
    # As stderr has it: a text of a stranger's file that no encoding knows is shown by its numbers, and ends no command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("clt_plugins").setLevel(logging.INFO)

    try:
        from clt_plugins.cli.main import main_group

        main_group()
    except MemoryError:  # also of telling an error: these bytes are there already
        os.write(2, NO_MEMORY)
        sys.exit(1)


if __name__ == "__main__":
    main()
