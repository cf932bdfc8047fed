"""The token of a server: where it is read from, and what it can consist of."""

from __future__ import annotations

import re
from pathlib import Path

from clt_plugins import Refused

LONGEST = 1024


def check_token(token: str, where: str) -> str:
    """The token, if a header can carry it.

    Args:
        where: the file or variable that it comes from.

    Raises:
        Refused: it cannot.
    """
    if not re.fullmatch(r"[!-~]+", token) or len(token) > LONGEST:
        text = f"not a token: use 1 to {LONGEST} ASCII letters, digits and punctuation marks, without spaces"
        raise Refused(where, text)
    return token


def read_token(path: Path) -> str:
    """The first line of a file.

    Raises:
        Refused: it cannot be read, or holds no token.
    """
    try:
        with path.open("rb") as file:
            # Not more of a file that was named by mistake.
            line = file.readline(LONGEST + 100)
        token = line.decode("utf-8-sig").strip()
    except OSError as error:
        raise Refused("--token-file", f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused("--token-file", f"{path}: its first line is not text in UTF-8") from error
    if not token:
        raise Refused("--token-file", f"{path}: its first line is empty")
    return check_token(token, f"--token-file {path}")
