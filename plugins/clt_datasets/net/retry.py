"""What a failed request means: which errors are final, and how long and how often the others are tried again."""

from __future__ import annotations

import json
import logging
import random
import ssl
import time
from typing import Any

from clt_plugins import DamagedError, Refused

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
"""Pauses between attempts: doubled each time; up to half of each is left out at random."""
STALLED_S, CONNECT_S = 60.0, 10.0
"""An attempt is given up after so long without a byte, or without a connection; sooner where the patience is less."""
AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Answers after which another attempt may succeed."""


class Again(Exception):
    """Another attempt may succeed."""


class Patience:
    """How long one request has failed.

    Args:
        base: the address, for messages.
        limit_s: the request fails when nothing new has come for so long, over all attempts.
    """

    def __init__(self, base: str, limit_s: float):
        self.base, self.limit_s = base, limit_s
        self.stalled_s = min(STALLED_S, limit_s)
        """How long an attempt may wait for its next byte."""
        self.furthest = -1
        self.progress(0)

    def progress(self, position: int) -> None:
        """The first `position` bytes came through. Bytes that an earlier attempt also had are no progress."""
        if position > self.furthest:
            self.furthest, self.pause_s, self.since = position, FIRST_PAUSE_S, time.monotonic()

    def after(self, error: Exception) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            OSError: nothing new has come for too long.
            Refused: the server's certificate is not trusted; waiting does not change this.
        """
        if isinstance(error, ssl.SSLCertVerificationError):
            raise Refused(
                self.base,
                f"the server's certificate is not trusted: {error.verify_message or error}: if you made it yourself, "
                "name it in source.ca_file, or for uploads in the environment variable SSL_CERT_FILE",
            ) from error
        text = " ".join(str(error).split()) or type(error).__name__
        if time.monotonic() - self.since > self.limit_s:
            raise OSError(f"{self.base}: no success in {self.limit_s:g} s: {text}") from error
        if self.pause_s < 1 <= 2 * self.pause_s:
            log.warning("%s: %s; tried again for %g s", self.base, text, self.limit_s)
        pause = self.pause_s * (1 - random.random() / 2)
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        return pause


def failure(base: str, status: int, reason: str, body: bytes) -> Exception:
    """The exception for an answer other than success.

    Args:
        body: the beginning of the answer's body: `{"error": text}`, with `"again": true` where the server expects that
            a later attempt succeeds.
    """
    try:
        answer: Any = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        answer = {}
    text = answer.get("error", reason)
    if status in AGAIN or answer.get("again"):
        return Again(f"{status} {text}")
    if status in (401, 403):
        return Refused(base, f"{text}: give the server's token in CLT_TOKEN")
    if status == 422:
        return DamagedError(f"{base}: {text}")
    return Refused(base, f"{status} {text}")
