"""The environments of other tools: made once, made again after a failure, and what is missing is said."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest

from tests.interop.environments import DONE, PEERS, ROOT, NotInstalled, Peer, environment


@pytest.fixture(autouse=True)
def no_index(tmp_path, monkeypatch):
    """A cache of its own, and an index of packages that is a folder."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("CLT_INTEROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return index


def wheel(index):
    """A wheel of `example-tool` 1.0 with the module `example_module`."""
    info = "example_tool-1.0.dist-info"
    files = {
        "example_module.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: example-tool\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(index / "example_tool-1.0-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def tool(module="example_module"):
    return Peer(name="example", module=module, requirements=("example-tool==1.0",))


def test_an_environment_is_made_once(no_index):
    wheel(no_index)
    python = environment(tool())
    assert subprocess.run([python, "-c", "import example_module"]).returncode == 0
    seen = subprocess.run([python, "-c", "import torch"], capture_output=True).returncode
    assert seen, "it must not see the packages of the tests"
    before = python.parents[1].stat().st_mtime_ns
    assert environment(tool()) == python and python.parents[1].stat().st_mtime_ns == before
    (python.parents[1] / DONE).unlink()
    environment(tool())
    assert python.parents[1].stat().st_mtime_ns != before, "one that was not completed is made anew"


def test_what_cannot_be_installed_is_said(no_index):
    with pytest.raises(NotInstalled, match=r"No matching distribution found for example-tool==1\.0"):
        environment(tool())
    wheel(no_index)
    with pytest.raises(NotInstalled, match="No module named 'other_module'"):
        environment(tool("other_module"))


def test_a_checkout_is_never_downloaded(monkeypatch, tmp_path):
    peer = PEERS["circuit-tracer"]
    monkeypatch.delenv("CLT_CIRCUIT_TRACER", raising=False)
    with pytest.raises(NotInstalled, match="CLT_CIRCUIT_TRACER is not set"):
        peer.checkout()
    monkeypatch.setenv("CLT_CIRCUIT_TRACER", str(tmp_path))
    with pytest.raises(NotInstalled, match=r"no pyproject\.toml"):
        peer.checkout()


def test_the_command_says_loudly_what_is_missing(monkeypatch):
    monkeypatch.delenv("CLT_CIRCUIT_TRACER", raising=False)
    monkeypatch.delenv(PEERS["circuit-tracer"].variable, raising=False)
    command = [sys.executable, "-m", "tests.interop", "--only", "circuit-tracer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "!!! NOT TESTED: circuit-tracer" in done.stdout and "1 of 1 tools could not be installed" in done.stdout
