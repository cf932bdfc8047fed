"""What becomes of a request that failed: which answers are final, and for how long the others are tried again."""

from __future__ import annotations

import json
import logging
import random
import ssl
import time

from clt_plugins import DamagedError, Refused

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
"""Between attempts; doubled each time, and up to half of it left off at random."""
STALLED_S, CONNECT_S = 60.0, 10.0
"""After so long without a byte, or a connection, an attempt is given up; sooner where the patience is less."""
AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Answers after which it is worth trying again."""


class Again(Exception):
    """Worth another attempt."""


class Patience:
    """How long one request has been in vain.

    Args:
        base: the address, for messages.
        limit_s: it fails when nothing at all has come for so long, whatever was tried.
    """

    def __init__(self, base: str, limit_s: float):
        self.base, self.limit_s = base, limit_s
        self.stalled_s = min(STALLED_S, limit_s)
        """How long an attempt may wait for its next byte."""
        self.furthest = -1
        self.progress(0)

    def progress(self, at: int) -> None:
        """The first `at` bytes came through; what an earlier attempt had done already is no progress."""
        if at > self.furthest:
            self.furthest, self.pause_s, self.since = at, FIRST_PAUSE_S, time.monotonic()

    def after(self, error: Exception) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            OSError: nothing has come for too long.
            ValueError: the server's certificate is not trusted, which waiting does not change.
        """
        why = getattr(error, "certificate_error", error)
        if isinstance(why, ssl.SSLCertVerificationError):
            raise Refused(
                self.base,
                f"the server's certificate is not trusted: {why.verify_message or why}: if it is of your "
                "own making, name it in source.ca_file, or for uploads in the environment variable SSL_CERT_FILE",
            ) from error
        text = " ".join(str(error).split()) or type(error).__name__
        if time.monotonic() - self.since > self.limit_s:
            raise OSError(f"{self.base}: no success in {self.limit_s:g} s: {text}") from error
        if self.pause_s < 1 <= 2 * self.pause_s:
            log.warning("%s: %s; tried again for %g s", self.base, text, self.limit_s)
        pause = self.pause_s * (1 - random.random() / 2)
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        return pause


def refused(base: str, status: int, reason: str | None, body: bytes) -> Exception:
    """What an answer other than success means.

    Args:
        body: its beginning.
    """
    try:
        text = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        text = reason or ""
    if status in AGAIN:
        return Again(f"{status} {text}")
    if status in (401, 403):
        return ValueError(f"{base}: {text}: give the server's token in CLT_TOKEN")
    if status == 422:
        return DamagedError(f"{base}: {text}")
    return ValueError(f"{base}: {status} {text}")
