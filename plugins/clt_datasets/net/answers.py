"""Answers of the server other than success."""

from __future__ import annotations

from aiohttp import web


class BadRequest(Exception):
    """A request that is answered with an error.

    Args:
        again: whether the same request may succeed later; clients then repeat it.
    """

    def __init__(self, status: int, text: str, *, again: bool = False):
        super().__init__(text)
        self.status, self.again = status, again


def answer(status: int, error: str, *, again: bool = False) -> web.Response:
    """An error as JSON; see `server`."""
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if again and status in (429, 503):
        headers["Retry-After"] = "1"
    return web.json_response({"error": error} | ({"again": True} if again else {}), status=status, headers=headers)
