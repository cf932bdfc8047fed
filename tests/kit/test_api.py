"""The public API is frozen: a change shows here, and belongs into CHANGELOG.md under "Plugin API".

`python -m tests.kit.api` writes `api.txt` anew.
"""

from __future__ import annotations

from pathlib import Path

import clt_plugins
from tests.kit.api import FILE, described, untyped


def test_public_signatures_are_those_on_record() -> None:
    recorded = FILE.read_text().splitlines()
    now = described()
    gone, come = [x for x in recorded if x not in now], [x for x in now if x not in recorded]
    assert now == recorded, (
        f"the public API changed: gone {gone}, new {come}. Tell it in CHANGELOG.md under 'Plugin API' (and raise "
        "API_VERSION where something is gone or means something else), then: python -m tests.kit.api"
    )


def test_everything_public_is_typed() -> None:
    assert (Path(clt_plugins.__file__).parent / "py.typed").is_file()
    assert untyped() == []


def test_the_changelog_tells_the_api_version() -> None:
    text = (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text()
    api = text[text.index("### Plugin API") :]
    assert f"Version {clt_plugins.API_VERSION}:" in api
