"""What a failed request means: which errors are final, and how long and how often the others are tried again."""

from __future__ import annotations

import json
import logging
import random
import re
import ssl
import time
from typing import Any

from clt_plugins import DamagedError, Refused, printable

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
"""Pauses between attempts: doubled each time; up to half of each is left out at random."""
STALLED_S, CONNECT_S = 60.0, 10.0
"""An attempt is given up after so long without a byte, or without a connection; sooner where the patience is less."""
ASKED_S = 60.0
"""A server that says when to come back is obeyed up to here."""
STEP = 2**16
"""Bytes that count as something new; a server that sends one now and then is not waited for."""
AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Answers after which another attempt may succeed."""


class Again(Exception):
    """Another attempt may succeed.

    Args:
        pause_s: when the server says that it may.
    """

    def __init__(self, text: str, pause_s: float = 0.0):
        super().__init__(text)
        self.pause_s = pause_s


class Full(OSError):
    """The server has no room: waiting does not change this."""


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
        self.furthest = self.counted = 0
        self.pause_s, self.since = FIRST_PAUSE_S, time.monotonic()

    def progress(self, position: int, *, end: bool = False) -> bool:
        """The first `position` bytes came through. Bytes that an earlier attempt also had are no progress.

        Args:
            end: nothing is missing.

        Returns:
            Whether this counts.
        """
        if position > self.furthest:
            # A connection that breaks off after a little is tried again soon; patience needs more than that.
            self.furthest, self.pause_s = position, FIRST_PAUSE_S
        counts = position >= self.counted + (1 if end else STEP)
        if counts:
            self.counted, self.since = position, time.monotonic()
        return counts

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
        text = _line(str(error)) or type(error).__name__
        left = self.limit_s - (time.monotonic() - self.since)
        if left < 0:
            raise OSError(f"{self.base}: no success in {self.limit_s:g} s: {text}") from error
        if self.pause_s < 1 <= 2 * self.pause_s:
            log.warning("%s: %s; tried again for %g s", self.base, text, self.limit_s)
        pause = self.pause_s * (1 - random.random() / 2)
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        if isinstance(error, Again):
            pause = max(pause, min(error.pause_s, ASKED_S))
        # So that the last attempt comes when the patience ends, and not after it.
        return min(pause, left + 0.01)


def failure(base: str, status: int, reason: str, body: bytes, retry_after: str | None = None) -> Exception:
    """The exception for an answer other than success.

    Args:
        body: the beginning of the answer's body: `{"error": text}`, with `"again": true` where the server expects that
            a later attempt succeeds.
        retry_after: the header, if there is one.
    """
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        answer = {}
    text = _line(str(answer.get("error", reason)))
    if 300 <= status < 400:
        return Refused(base, f"{status} {text}: the server sends to another address; that is not followed, name it")
    if status == 507:
        return Full(f"{base}: 507 {text}: make room on the server, then run the same command again")
    if status in AGAIN or answer.get("again") is True:
        seconds = retry_after if retry_after and re.fullmatch(r"[0-9]{1,6}", retry_after) else "0"
        return Again(f"{status} {text}", float(seconds))
    if status in (401, 403):
        return Refused(base, f"{text}: give the server's token in CLT_TOKEN")
    if status == 422:
        return DamagedError(f"{base}: {text}")
    return Refused(base, f"{status} {text}")


def _line(text: str) -> str:
    """The beginning of a server's text, in one line of a terminal."""
    return printable(" ".join(text[:1000].split()))[:300]
