"""Errors of the libraries that load models and data sets, in one line for the user."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

LONGEST = 400
"""Characters of a library's message that are shown; `-v` shows all of it."""

PLAIN = (OSError, ValueError, ImportError, RuntimeError)
"""Errors whose message says what is wrong without the error's name."""


def one_line(error: BaseException) -> str:
    """An error's message in one line, with the error's name if the message needs it."""
    text = textwrap.shorten(str(error), LONGEST, placeholder=" ...")
    if text and isinstance(error, PLAIN):
        return text
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name}: {text}" if text else name


def reason(error: Exception, name: str, part: str = "") -> str:
    """Why a model or data set could not be loaded, and what to do, in one line.

    Args:
        name: as the user wrote it: a hub id, or a file or folder.
        part: which part of it: "the tokenizer of ".
    """
    from huggingface_hub import errors as hub

    chain = list(_chain(error))
    if any(isinstance(part, hub.GatedRepoError) for part in chain) or "gated dataset" in str(error):
        return f"{name!r} is gated: ask for access on its page of the hub, then log in with `hf auth login`"
    if any(isinstance(part, hub.RevisionNotFoundError) for part in chain):
        return f"the hub has no such revision of {name!r}"
    if any(isinstance(part, hub.RepositoryNotFoundError) for part in chain):
        return f"{name!r} is no local path, and the hub has none of that name (log in with `hf auth login` if private)"
    offline = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError)
    if any(isinstance(part, offline) for part in chain):
        return (
            f"cannot get {name!r}: no local path, not in the hub's cache, and the hub does not answer: is the network "
            f"there, is HF_HUB_OFFLINE set?"
        )
    if "trust_remote_code" in str(error):  # which transformers advises to set
        return f"{part}{name!r} needs code of its own, which is never run: take a model that transformers itself has"
    return f"cannot load {part}{name!r}: {one_line(error)}"


def is_about_revision(error: Exception) -> bool:
    """Whether the hub has the model or data set, but not this revision of it."""
    from huggingface_hub.errors import RevisionNotFoundError

    return any(isinstance(part, RevisionNotFoundError) for part in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
