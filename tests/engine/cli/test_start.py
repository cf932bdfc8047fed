"""`--help` imports little, however many plugins are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from clt_plugins.cli.new import KINDS, new

PLUGINS = 60
SHOWN = """
import json, sys
from click.testing import CliRunner
from clt_plugins.cli.main import main_group
done = CliRunner().invoke(main_group, ["--help"])
assert done.exit_code == 0, done.output
print(json.dumps([sorted(sys.modules), done.output]))
"""


def imported(*paths: Path) -> tuple[set[str], str]:
    """The modules that `--help` imports, and what it shows."""
    path = os.pathsep.join([*map(str, paths), os.environ["PYTHONPATH"]])
    # A fresh interpreter: the tests' other commands are children of a process that has imported everything.
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", SHOWN], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    modules, shown = json.loads(done.stdout)
    return set(modules), shown


def test_sixty_plugins_add_their_own_modules_and_nothing_else(tmp_path: Path) -> None:
    """As `new` writes them, of every kind. What would take long to import (torch, numpy) is not imported."""
    site, folders = tmp_path / "site", []
    for number in range(PLUGINS):
        kind = KINDS[number % len(KINDS)]
        folders.append(new(f"clt-p{number}", kind, tmp_path / f"p{number}"))
        info = site / f"clt_p{number}-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: clt-p{number}\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text(f"[clt_plugins]\np{number} = clt_p{number}\n")
    before, _ = imported()
    after, shown = imported(site, *folders)
    own = {f"clt_p{number}" for number in range(PLUGINS)}
    assert own <= after
    assert {name for name in after - before if name.split(".")[0] not in own} == set()
    assert not {"torch", "numpy", "transformers", "matplotlib"} & after
    assert f"p{KINDS.index('command')} " in shown, "commands of plugins are listed"
