"""Runs commands in children of a zygote: a process that has imported everything (`zygote.py`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}


@attrs.frozen
class Ended:
    """How a command ended."""

    code: int
    """The exit code; -N if signal N killed it."""
    seconds: float
    timeout: bool
    """It was killed because it took too long."""
    bomb: bool
    """It was killed because it took too much memory."""
    grown: int
    """Bytes of memory at its peak, beyond what it had when it was forked."""
    samples: list[tuple[int, int]] = attrs.field(factory=list)
    """Bytes of memory and open files, several times a second, if asked for."""
    said: str = ""
    """stderr."""
    out: str = ""
    """stdout."""


class Zygote:
    """The process, seen from the campaign.

    Args:
        preload: the library of `inject.py`, or None.
        outside: a folder for what commands say; outside of the folders that faults are injected into.
    """

    def __init__(self, preload: Path | None, outside: Path):
        self.outside = outside
        environment = {**os.environ, **ENVIRONMENT, "HF_HOME": str(outside / "hf")}
        environment |= {"LD_PRELOAD": str(preload)} if preload else {}
        root = Path(__file__).resolve().parents[2]
        environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "plugins")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=outside,
        )
        self._files: dict[int, Path] = {}
        self._number = 0

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote died: {self.process.wait()}")
        return json.loads(line)

    def warm(self, arguments: list[str], folder: Path) -> Ended:
        """Run a command, and import into the zygote what it imported."""
        modules = self.outside / "modules.json"
        modules.unlink(missing_ok=True)
        ended = self.run(arguments, folder, modules=str(modules), timeout=120)
        self._ask({"do": "import", "names": json.loads(modules.read_text()) if modules.exists() else []})
        return ended

    def start(self, arguments: list[str], folder: Path, **options: Any) -> int:
        """Start a command in a folder; returns its process id. See `zygote._begin` for the options."""
        self._number += 1
        said = self.outside / f"said-{self._number}"
        request = {"do": "start", "arguments": arguments, "folder": str(folder), "said": str(said), **options}
        child = self._ask(request)["child"]
        self._files[child] = said
        return child

    def wait(self, child: int, timeout: float = 60.0, **options: Any) -> Ended:
        """Wait for a command. See `zygote._watch` for the options."""
        answer = self._ask({"do": "wait", "child": child, "timeout": timeout, **options})
        said = self._files.pop(child)
        texts = []
        for path in (said, said.with_suffix(".out")):
            texts.append(path.read_text(errors="replace") if path.exists() else "")
            path.unlink(missing_ok=True)
        return Ended(**answer, said=texts[0], out=texts[1])

    def run(self, arguments: list[str], folder: Path, *, timeout: float = 60.0, **options: Any) -> Ended:
        """Run a command to its end."""
        watched = {name: options.pop(name) for name in ("signals", "memory", "samples") if name in options}
        return self.wait(self.start(arguments, folder, **options), timeout, **watched)

    def learn(self, names: list[str]) -> None:
        """Import modules into the zygote."""
        self._ask({"do": "import", "names": names})

    def signal(self, child: int, number: int) -> None:
        """Send a signal to a command that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    def alive(self, child: int) -> bool:
        """Whether a command that was started still runs."""
        return self._ask({"do": "poll", "child": child})["alive"]

    def said(self, child: int) -> str:
        """What a command that runs has said on stderr."""
        path = self._files[child]
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """End it, and what still runs."""
        for child in self._files:
            self.signal(child, signal.SIGKILL)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
