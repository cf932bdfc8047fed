"""Virtual environments with the tools that our exports are for, one for each tool.

Their pins contradict each other and ours (circuit-tracer needs transformers 4, this project 5), so none of them is in
the environment of the tests. An environment is made once from the package index that pip is set up for, and kept in a
cache: the folder that `CLT_INTEROP_CACHE` names, or `clt-plugins/interop` in the user's cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from attrs import frozen

ROOT = Path(__file__).resolve().parents[2]
PIP = (sys.executable, "-m", "pip")
DONE = "complete.json"
"""Written last into an environment: without it, the environment is made anew."""


class NotInstalled(Exception):
    """Why a tool cannot be tested, in words."""


@frozen(kw_only=True)
class Peer:
    """A tool that our files are for."""

    name: str
    """As its users call it."""
    module: str
    """What is imported to see whether it is there."""
    requirements: tuple[str, ...]
    """What pip installs: versions that were tried together. One without a version gets ours, of constraints.txt."""
    source: str | None = None
    """The variable that names a checkout of it, if it is not on the package index. No test downloads one."""
    file: str = "pyproject.toml"
    """A file of the checkout. One without this is only read, and not installed."""

    @property
    def variable(self) -> str:
        """The variable that names the Python interpreter of its environment: `CLT_CIRCUIT_TRACER_PYTHON`."""
        return f"CLT_{self.name.upper().replace('-', '_')}_PYTHON"

    def checkout(self) -> Path | None:
        """The checkout that the variable `source` names; None for a tool from the package index.

        Raises:
            NotInstalled: the variable is not set, or names another folder.
        """
        if self.source is None:
            return None
        named = os.environ.get(self.source)
        if not named:
            raise NotInstalled(f"{self.source} is not set: give it the path of a checkout of {self.name}")
        path = Path(named).expanduser().resolve()
        if not (path / self.file).is_file():
            raise NotInstalled(f"{self.source}={named} has no {self.file}: check the repository out there")
        return path

    def installed(self) -> list[str]:
        """What pip is given.

        Raises:
            NotInstalled: see `checkout`.
        """
        checkout = self.checkout()
        named = [one if re.search(r"[<>=]", one) else _pinned(one) for one in self.requirements]
        return [*named, str(checkout)] if checkout is not None and self.file == "pyproject.toml" else named


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="circuit-tracer",
            module="circuit_tracer",
            # The package of this name on the package index is an old fork.
            source="CLT_CIRCUIT_TRACER",
            requirements=(
                "torch",
                "transformers==4.57.3",
                "transformer-lens<4",
                "nnsight==0.6.1",
                "huggingface_hub<1",
                "numpy<2",
                "pyarrow<21",
            ),
        ),
        Peer(
            name="neuronpedia",
            module="jsonschema",
            source="CLT_NEURONPEDIA",
            file="apps/webapp/app/api/graph/graph-schema.json",
            requirements=("jsonschema==4.25.1",),
        ),
        Peer(name="sae-lens", module="sae_lens", requirements=("torch", "sae-lens==6.54.12")),
        Peer(name="crosslayer-coding", module="clt", requirements=("torch", "decode-clt==0.0.1")),
        Peer(
            name="sae-dashboard",
            module="sae_dashboard",
            # Its own pins choose a version of torch.
            requirements=("sae-dashboard==0.8.0", "sae-lens==6.54.12", "decode-clt==0.0.1", "pyarrow<21"),
        ),
        Peer(
            name="sae-bench",
            module="transformer_lens",  # all that its custom SAEs import; its other needs are for the evaluations
            source="CLT_SAE_BENCH",
            file="sae_bench/custom_saes/base_sae.py",
            requirements=("torch", "sae-lens==6.54.12"),
        ),
        # It imports what TransformerLens 4 has removed, and does not say so.
        Peer(
            name="llamascopium",
            module="llamascopium",
            requirements=("torch", "llamascopium==2.0.0b34", "transformer-lens<4"),
        ),
        Peer(
            name="clt-forge",
            module="jaxtyping",
            source="CLT_CLT_FORGE",
            file="src/clt_forge/clt.py",
            requirements=("torch", "numpy", "safetensors", "jaxtyping>=0.2.28", "pydantic>=2"),
        ),
        Peer(
            name="clt-training",
            module="natsort",
            source="CLT_CLT_TRAINING",
            file="sparsify/sparse_coder.py",
            requirements=(
                "torch",
                "numpy",
                "safetensors",
                "triton>=3.6",
                "natsort>=8",
                "einops>=0.8",
                "simple-parsing>=0.1.7",
                "transformers",
                "huggingface_hub>=0.34",
            ),
        ),
    )
}


def cache() -> Path:
    """The folder of all environments."""
    named = os.environ.get("CLT_INTEROP_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clt-plugins" / "interop"


def environment(peer: Peer) -> Path:
    """The Python interpreter of a tool's environment, which is made if it is not there.

    Raises:
        NotInstalled: pip fails, the tool cannot be imported afterwards, or its checkout is missing.
    """
    wanted = peer.installed()
    checkouts = {one: _digest(Path(one)) for one in wanted if Path(one).is_absolute()}
    contents = {"python": sys.version, "requirements": wanted, "checkouts": checkouts}
    key = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache() / f"{peer.name}-{key}"
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / DONE).is_file():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=False)
        _run(
            [*PIP, "--python", str(python), "install", "--quiet", "--no-input", *wanted],
            folder.with_suffix(".log"),
        )
        _run([str(python), "-c", f"import {peer.module}"], folder.with_suffix(".log"))
        (folder / DONE).write_text(json.dumps(contents, indent=2), encoding="utf-8")
    return python


def _run(command: list[str], log: Path) -> None:
    """Run a command without our packages.

    Raises:
        NotInstalled: it fails; with its last line, and where the rest is.
    """
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        log.write_text(f"{' '.join(command)}\n{done.stdout}", encoding="utf-8")
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
        raise NotInstalled(f"{last.strip()} (all of it: {log})")


def _pinned(name: str) -> str:
    """The line of constraints.txt: a difference between our torch and a tool's would be neither ours nor the tool's."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def _digest(checkout: Path) -> str:
    """Of all Python files and the project's description: another commit needs another environment."""
    digest = hashlib.sha256()
    for path in sorted([checkout / "pyproject.toml", *checkout.rglob("*.py")]):
        digest.update(f"{path.relative_to(checkout)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
