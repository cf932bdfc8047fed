"""`clt_plugins new`: what it writes is a plugin that passes its own tests as written."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import clt_plugins
from clt_plugins.cli.main import main_group
from clt_plugins.cli.new import COMMAND, new
from clt_plugins.contract.slots import SLOTS
from clt_plugins.errors import ExitCode
from clt_plugins.testing import CHECKS
from clt_plugins.testing.registry import SHARED
from tests.support.commands import python

KINDS = [*(slot.kind for slot in SLOTS), COMMAND]


def test_every_kind_has_a_template_and_checks() -> None:
    root = Path(clt_plugins.__file__).parent
    templates = {path.parent.name for path in (root / "templates").glob("*/__init__.py")}
    checks = {path.stem for path in (root / "testing" / "checks").glob("*.py")} - {"__init__", "plugin", *SHARED}
    # Commands are checked with the plugin as a whole, by `plugin`.
    assert templates == checks | {COMMAND} == set(KINDS)
    assert all(CHECKS[slot.table] for slot in SLOTS)


def installed(folder: Path, site: Path) -> None:
    """What an installer would make of a package's pyproject.toml; the module itself stays where it is."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["clt_plugins"]
    (info / "entry_points.txt").write_text("[clt_plugins]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))


def test_every_kind_passes_its_own_tests_as_written(tmp_path: Path) -> None:
    """All kinds in one environment: they must not disturb each other either."""
    paths = [str(tmp_path / "site")]
    for kind in KINDS:
        folder = new(f"clt-my-{kind}", kind, tmp_path / kind)
        installed(folder, tmp_path / "site")
        paths.append(str(folder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ["PYTHONPATH"]])}
    flags = ["-q", "-rs", "--import-mode=importlib", "-p", "no:cacheprovider"]
    tests = [f"{kind}/tests" for kind in KINDS]
    done = python("-m", "pytest", *flags, *tests, cwd=tmp_path, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    # Every check ran but those that need something else: [parallel] tensor, a default that is enough.
    assert "FAILED" not in done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 57, done.stdout[-3000:]
    listed = python("-m", "clt_plugins", "plugins", "--strict", env=environment)
    assert listed.returncode == 0, listed.stdout[-2000:] + listed.stderr[-2000:]
    assert all(f"my_{slot.kind} - " in listed.stdout for slot in SLOTS)
    assert "my_command" in python("-m", "clt_plugins", "--help", env=environment).stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_installs_by_pip_and_passes(kind: str, tmp_path: Path) -> None:
    new("clt-mine", kind, tmp_path / "clt-mine")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(tmp_path / "clt-mine")], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ["PYTHONPATH"]])}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", str(tmp_path / "clt-mine" / "tests")],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=600,
    )


def test_it_prints_the_folder_and_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main_group, ["new", "clt-mine", "--kind", "loss"])
    assert (done.exit_code, done.stdout) == (ExitCode.OK, "clt-mine\n")
    assert "pip install -e '.[dev]' && pytest" in done.stderr
    code = (tmp_path / "clt-mine" / "clt_mine" / "__init__.py").read_text()
    assert 'Spec("mine", MineConfig, Mine)' in code
    assert "xample" not in code
    project = tomllib.loads((tmp_path / "clt-mine" / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["clt-plugins>=0.1,<0.2"]
    tests = {path.name: path.read_text() for path in (tmp_path / "clt-mine" / "tests").iterdir()}
    assert "not what the loss `mine` should compute" in tests["test_conformance.py"]
    assert "from clt_mine import Mine, MineConfig" in tests["test_formula.py"]
    assert 'losses = ["mse", "mine"]' in (tmp_path / "clt-mine" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Clt Mine", "lower-case words"),
        ("../x", "lower-case words"),
        ("json", "there is a module 'json' already"),
        ("torch", "there is a module 'torch' already"),
        ("clt-lambda", "another meaning in Python"),
        ("clt-used", "already there: give another folder with --out"),
    ],
)
def test_names_that_cannot_be_are_refused(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clt-used").mkdir()
    (tmp_path / "clt-used" / "file").touch()
    done = CliRunner().invoke(main_group, ["new", name, "--kind", "loss"])
    assert done.exit_code == ExitCode.USAGE
    assert text in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["clt-used"]
