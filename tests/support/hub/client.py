"""`huggingface_hub` in this process, turned to the stand-in: another address, cache and token, and no xet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from clt_plugins.files.hub import library
from tests.support.hub.guard import guarded
from tests.support.hub.lookups import TOKEN


def environment(url: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The same for a process of its own."""
    variables = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**variables, "HF_TOKEN": token or ""}


@contextmanager
def turned_to(url: str, home: Path, token: str | None = TOKEN) -> Iterator[pytest.MonkeyPatch]:
    """In the block, this process sees the stand-in as the hub; nothing leaves the machine."""
    with pytest.MonkeyPatch.context() as patch, guarded():
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(library, "PAUSE_S", 0.01)
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
            patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)
        # A client of the test before it may still hold a connection to its server.
        huggingface_hub.close_session()
        try:
            yield patch
        finally:
            huggingface_hub.close_session()
