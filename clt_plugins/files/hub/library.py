"""`huggingface_hub`, imported at first use; and its errors as lines for the user.

It is a dependency of `transformers`. Versions 1 and 2 use different HTTP libraries, so errors of the network are told
by their module's name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any, TypeVar

from clt_plugins.contract.spec import __version__
from clt_plugins.errors import Refused
from clt_plugins.files.hub.names import HubPlace
from clt_plugins.files.untrusted import printable

ATTEMPTS = 5
"""Times that a call is made before an error of the network or the hub is the user's."""
PAUSE_S = 1.0
"""Before the second attempt; twice as long before each further one."""
OVERLOADED = (408, 425, 429)
"""Answers below 500 after which the same call may succeed."""
PASSING = (ConnectionError, TimeoutError, JSONDecodeError)
"""Errors after which the same call may succeed."""

Result = TypeVar("Result")


def api() -> Any:
    """A client of the hub, with the user's token where there is one."""
    from huggingface_hub import HfApi

    return HfApi(library_name="clt-plugins", library_version=__version__)


def offline() -> bool:
    """Whether the user has forbidden the network: HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def token() -> str | None:
    """The user's token, from HF_TOKEN or `hf auth login`."""
    from huggingface_hub import get_token

    return get_token()


@contextmanager
def asking(place: HubPlace) -> Iterator[None]:
    """In the block, errors of the hub become lines that name the folder and what to do.

    Raises:
        Refused: there is no such repository, revision or file, or the user may not read or write it.
        OSError: the hub does not answer, or a file of this disk cannot be read or written.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if (text := _refusal(error, place)) is not None:
            raise Refused(str(place), text) from error
        if is_passing(error):
            raise OSError(f"{place}: the hub does not answer: {_line(error)}: try again later") from error
        if _status(error) is not None:
            raise OSError(f"{place}: the hub answered {_status(error)}: {_line(error)}") from error
        if isinstance(error, OSError) and error.filename is None:
            raise OSError(f"{place}: a file of this disk could not be read or written: {_line(error)}") from error
        raise


def _refusal(error: BaseException, place: HubPlace) -> str | None:
    """What the user can do about an error; None where it is nothing of the user's."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{place.repository}"
    # In this order: a gated repository is a kind of one that was not found.
    for part in _chain(error):
        if isinstance(part, errors.GatedRepoError):
            return f"gated: ask for access on {page}, then log in with `hf auth login`"
        if isinstance(part, errors.RevisionNotFoundError):
            return f"the repository has no revision {place.revision or 'main'!r}"
        if isinstance(part, errors.RepositoryNotFoundError):
            remedy = "log in with `hf auth login`, or set HF_TOKEN" if token() is None else "may your token read it?"
            return f"no folder here, and no such repository on the hub, or a private one: {remedy}"
        if isinstance(part, errors.OfflineModeIsEnabled):
            return "the network is off (HF_HUB_OFFLINE): unset it"
        if _status(part) in (401, 403):
            return (
                f"your token may not do this ({_line(part)}): make one with write access to {place.repository} on "
                "https://huggingface.co/settings/tokens, and log in with `hf auth login`"
            )
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: no connection, a broken one, an overloaded hub, or an answer that is no
    JSON, as servers between here and the hub give."""
    for part in _chain(error):
        status = _status(part)
        if status is not None:
            return status >= 500 or status in OVERLOADED
        if type(part).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            return True
        if isinstance(part, PASSING) or "Consistency check failed" in str(part):
            return True
    return False


def persistently(call: Callable[[], Result], attempts: int | None = None) -> Result:
    """Make a call; again, after a pause, where an error may pass: `ATTEMPTS` times, or as often as is said."""
    attempts, pause = attempts or ATTEMPTS, PAUSE_S
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            if attempt == attempts - 1 or not is_passing(error):
                raise
        time.sleep(pause)
        pause *= 2
    raise AssertionError("the last attempt returns or raises")


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _line(error: BaseException) -> str:
    """The error's own message, in one line of the terminal."""
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return printable(" ".join(text.split()))[:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
