"""Waiting for a page in a browser."""

from __future__ import annotations

import time
from typing import Any


def until(page: Any, question: str, arg: Any = None, seconds: float = 10.0) -> None:
    """Wait until `question`, an expression or a function of `arg` in JavaScript, is true on the page.

    Playwright's `wait_for_function` does not do: it evaluates text in the page, which the page's security policy
    forbids, unless the answer is yes at the first time.
    """
    last = time.monotonic() + seconds
    while not page.evaluate(question, arg):
        assert time.monotonic() < last, f"still not true after {seconds:g} s: {question}"
        page.wait_for_timeout(50)
