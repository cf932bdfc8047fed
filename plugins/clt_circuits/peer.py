"""circuit-tracer in another environment: whether it is there, and running `tracer.py` in it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from attrs import frozen

from clt_plugins import Refused

logger = logging.getLogger(__name__)

TRACER = Path(__file__).with_name("tracer.py")
INSTALL = (
    "install it from its git repository into an environment of its own, and name that one's Python here; "
    "examples/circuit_tracing.md has the commands"
)
KEPT_LINES = 40
"""Lines of the process's messages that an error can quote from."""


@frozen
class Peer:
    """A Python interpreter that has circuit-tracer."""

    python: str
    """Its path."""

    @classmethod
    def find(cls, setting: str | None) -> Peer:
        """The interpreter that a setting names.

        Raises:
            Refused: there is none.
        """
        # Not resolved: the interpreter of a virtual environment is a link, and finds its packages by its own path.
        path = sys.executable if setting is None else shutil.which(Path(setting).expanduser())
        if path is None:
            raise Refused("stages.circuits.python", f"{setting!r} is no program: {INSTALL}")
        return cls(str(Path(path).absolute()))

    def check(self, **question: Any) -> None:
        """Ask circuit-tracer whether it can do the work.

        Args:
            question: see `tracer.answer`.

        Raises:
            Refused: it is not there, is the fork, or cannot.
        """
        done = subprocess.run(
            [self.python, str(TRACER)],
            input=json.dumps(question),
            env=_without_our_packages(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise Refused("stages.circuits.python", f"{self.python} fails: {_last(done.stderr.splitlines())}")
        answer = json.loads(done.stdout.splitlines()[-1])
        if answer["fault"] is not None:
            raise Refused("stages.circuits.python", f"{self.python}: {answer['fault']}: {INSTALL}")
        for setting in ("backend", "device"):
            if answer[setting] is not None:
                raise Refused(f"stages.circuits.{setting}", answer[setting])

    def trace(self, request: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Do what a request says; returns the result.

        Args:
            request: see `tracer.main`, without `result`.
            folder: a folder for the files of the request and the result, which are removed.

        Raises:
            Refused: circuit-tracer fails; with its last line.
        """
        asked, result = folder / "request.json", folder / "result.json"
        asked.write_text(json.dumps({**request, "result": str(result)}), encoding="utf-8")
        process = subprocess.Popen(
            [self.python, str(TRACER), str(asked)],
            env=_without_our_packages(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        lines: list[str] = []
        try:
            assert process.stderr is not None
            for line in process.stderr:
                logger.info("circuit-tracer: %s", line.rstrip())
                lines = [*lines[-KEPT_LINES:], line]
            if process.wait():
                raise Refused("stages.circuits", f"circuit-tracer failed: {_last(lines)} (-v shows all of it)")
            return json.loads(result.read_text(encoding="utf-8"))
        finally:
            process.kill()
            process.wait()
            for path in (asked, result):
                path.unlink(missing_ok=True)


def _without_our_packages() -> dict[str, str]:
    """The environment of a process that must not import what stands in ours."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def _last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")
