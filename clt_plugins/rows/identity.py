"""Whether a saved position is one in the present data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clt_plugins.errors import Refused


def check_data(state: Mapping[str, Any], identity: Mapping[str, str]) -> None:
    """Refuse a state that was saved in other data.

    Args:
        state: its `data` is the identity at that time, by setting; see `Identified`.
        identity: that of the present data.

    Raises:
        Refused: it differs; names the first setting that does.
    """
    before = state["data"]
    for setting in sorted({*before, *identity}):
        if before.get(setting) != identity.get(setting):
            raise Refused(
                setting,
                f"not the data that the state was saved with: they were {before.get(setting, 'absent')}, now they are "
                f"{identity.get(setting, 'absent')}",
            )
