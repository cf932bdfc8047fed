"""What all tests share. No test needs the network, a GPU, or more than two threads."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import settings

from clt_plugins.registry.plugins import Plugins, load_plugins
from tests.support.commands import python

ROOT = Path(__file__).resolve().parent.parent

# Set before any test imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that tests start find this checkout, installed or not.
_paths = [str(ROOT), str(ROOT / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(_paths)

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


LONG = (
    # What Numba compiles is compiled by the first; those after it do without, so that no process waits for the other.
    "kit/test_built_in_kernels.py",
    "gpu/test_steps.py",
    "gpu/test_compiled.py",
    "plugins/kernels/test_kernels.py",
    "kit/test_built_in_plugins.py",
    "faults/test_short.py",
    "plugins/parallel/test_parallel.py",
    "kit/test_built_in_results.py",
    "kit/test_built_in_data.py",
    "kit/test_new.py",
    "engine/training/test_sweep.py",
    "kit/test_activation_mutations.py",
    "kit/test_loss_mutations.py",
    "kit/test_faults.py",
    "kit/test_guide.py",
    "plugins/parallel/test_parallel_runs.py",
    "kit/test_source_faults.py",
    "kit/test_callback_faults.py",
    "plugins/stages/test_convert.py",
    "plugins/datasets/test_epochs.py",
    "kit/test_ranks.py",
    "plugins/stages/test_evaluate_training.py",
    "engine/finished/test_stages.py",
    "plugins/datasets/test_failures.py",
    "plugins/kernels/test_compiled.py",
    "engine/training/test_folder.py",
    "engine/test_losses_that_learn.py",
    "kit/test_mutations.py",
    "plugins/datasets/test_remote.py",
    "kit/test_activation_faults.py",
    "kit/test_messages.py",
    "gpu/test_budgets.py",
)
"""Files that take long come first, the longest before others: else one process would wait at the end for another."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {str(ROOT / "tests" / name): place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(str(item.path), len(LONG)))


@pytest.fixture
def plugins() -> Plugins:
    """All installed plugins, freshly loaded."""
    return load_plugins()


@pytest.fixture
def clt(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m clt_plugins` in `tmp_path`, from which modules can be imported too."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])
        env = {**os.environ, "PYTHONPATH": path, **environment}
        return python("-m", "clt_plugins", *arguments, cwd=tmp_path, env=env)

    return run


class Distributions:
    """Writes distributions into a folder as an installer would: a `.dist-info` and modules."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.modules: list[str] = []

    def module(self, name: str, source: str) -> None:
        self.modules.append(name)
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source))
        importlib.invalidate_caches()

    def package(self, files: Mapping[str, str]) -> None:
        """Write the files of a package, given by `PACKAGE/FILE.py`."""
        for name, source in files.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text(source)
            self.modules.append(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        importlib.invalidate_caches()

    def forget(self, name: str) -> None:
        """Let a module be imported anew."""
        sys.modules.pop(name, None)
        shutil.rmtree(self.folder / "__pycache__", ignore_errors=True)
        importlib.invalidate_caches()

    def install(self, name: str, version: str, plugins: Mapping[str, str]) -> None:
        """Install a distribution whose entry points are `plugins`: name -> source of a module of its own."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = ["[clt_plugins]"]
        for plugin, source in plugins.items():
            module = f"{name}_{plugin}".replace("-", "_")
            self.module(module, source)
            lines.append(f"{plugin} = {module}")
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distributions]:
    """Fake third-party distributions in `tmp_path`, visible to this process (and to those that `clt` starts)."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Distributions(tmp_path)
    yield made
    for name in made.modules:
        made.forget(name)
