"""The public API is frozen: a change shows here, and belongs into CHANGELOG.md under "Plugin API".

`python -m tests.kit.api` writes `api.txt` anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
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


def test_type_checkers_see_every_public_name(tmp_path: Path) -> None:
    """`mypy --strict` knows exports by the text of `clt_plugins`. What that imports is left out: it would take long."""
    package = Path(clt_plugins.__file__).parent
    inner = [f"clt_plugins.{path.name}.*" for path in package.iterdir() if (path / "__init__.py").is_file()]
    inner += [f"clt_plugins.{path.stem}" for path in package.glob("*.py") if path.stem != "__init__"]
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nstrict = true\nfiles = mine.py\n[mypy-{','.join(inner)}]\nfollow_imports = skip\n"
    )
    names = ", ".join(clt_plugins.__all__)
    (tmp_path / "mine.py").write_text(f"from clt_plugins import ({names}, not_there)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache")],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        'mine.py:1: error: Module "clt_plugins" has no attribute "not_there"  [attr-defined]',
        "Found 1 error in 1 file (checked 1 source file)",
    ], done.stdout + done.stderr
