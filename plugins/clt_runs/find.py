"""Runs below a folder, and what their files say.

Nothing is loaded but small text files, and the ends of long ones. A file that is missing, damaged or of another version
makes its columns empty, and is named in the run's faults.
"""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from clt_plugins import Lock, Refused, load_json, parse_json, read_small

OF_A_RUN = ("recipe.toml", "history.jsonl", "run.lock")
"""A folder with one of these files is a run."""
WITHIN = ("checkpoints", "tensorboard", "evaluations", "stages")
"""Folders of a run that hold no others."""
MANIFEST = "manifest.json"
"""In every folder of a result, which holds no runs."""
TAIL = 2**20
"""Bytes at the end of `metrics.jsonl` that are read."""
STATUS = {"finished": "ended", "interrupted": "interrupted", "failed": "failed"}
"""How this command calls what `history.jsonl` says of an end."""


@attrs.frozen(kw_only=True)
class RunState:
    """What is known of a run; None is not known."""

    name: str
    """Its path below the folder that was searched."""
    folder: Path
    status: str
    """ "running", "ended", "interrupted", "failed", or "broken off"."""
    detail: str
    """Which process runs it, or what it failed with."""
    step: int | None
    steps: int | None
    """How many the recipe asks for."""
    tokens: int | None
    """Tokens trained on."""
    nmse: float | None
    """On held-out tokens, mean over layers."""
    l0: float | None
    """Active features per token, sum over layers."""
    ce_recovered: float | None
    """Share of the cross-entropy that zero-ablation of the MLPs loses."""
    tokens_per_s: float | None
    """Of training, when it was logged last."""
    age: float | None
    """Seconds since its first start."""
    size: int
    """Bytes of all its files."""
    recipe: dict[str, Any]
    """Its tables; empty where they cannot be read."""
    results: dict[str, float]
    """The numbers of its evaluation, else of the last held-out tokens in training, by name."""
    faults: list[str]
    """Files that could not be read, and why."""


def find_runs(folder: Path) -> list[RunState]:
    """The runs below a folder, and the folder itself if it is one.

    Raises:
        Refused: there is no such folder.
    """
    if not folder.is_dir():
        raise Refused(folder, "no such folder")
    return [look(path, folder) for path in _folders(folder)]


def one_run(folder: Path, name: str) -> RunState:
    """The run of that name below a folder, or in the folder of that name.

    Raises:
        Refused: there is none.
    """
    for path in (folder / name, Path(name)):
        if path.is_dir() and _is_run(path):
            return look(path, path.parent)
    raise Refused("--compare", f"no run {name!r}: see `runs {folder}`")


def _folders(folder: Path) -> Iterator[Path]:
    for here, names, _ in os.walk(folder):
        path = Path(here)
        if _is_run(path):
            yield path
            names[:] = [name for name in names if name not in WITHIN]
        names[:] = sorted(name for name in names if not name.startswith(".") and not (path / name / MANIFEST).is_file())


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in OF_A_RUN)


def look(folder: Path, top: Path) -> RunState:
    """What the files of a run say.

    Args:
        top: names are paths below it.
    """
    faults: list[str] = []

    def read(name: str, how: Callable[[Path], Any], otherwise: Any) -> Any:
        """What a file holds; if that cannot be told, a fault says why."""
        path = folder / name
        if not os.path.lexists(path):
            return otherwise
        try:
            if not path.is_file():  # a FIFO would be waited for
                raise ValueError("not a regular file")
            return how(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            text = " ".join(str(error).split()).removeprefix(f"{path}: ")
            faults.append(f"{name}: {text or type(error).__name__}")
            return otherwise

    recipe = read("recipe.toml", _recipe, {})
    starts = read("history.jsonl", _lines, [])
    logged = read("metrics.jsonl", _last_metrics, {})
    report = read("evaluation/evaluation.json", _report, {})
    saved = read("transcoder/transcoder.json", _table, {})
    held_out = {key: value for key, value in logged.items() if key.startswith("eval/")}
    results = _numbers(report) or {key.removeprefix("eval/"): value for key, value in held_out.items()}
    train = recipe.get("train")
    status, detail = _status(folder, starts, bool(saved), faults)
    return RunState(
        name=folder.relative_to(top).as_posix() if folder != top else folder.resolve().name,
        folder=folder,
        status=status,
        detail=detail,
        step=_whole(logged.get("step")) or _whole(saved.get("step")) or _last_checkpoint(folder),
        steps=_whole(train.get("steps")) if isinstance(train, dict) else None,
        tokens=_whole(logged.get("tokens")) or _whole(saved.get("tokens")),
        nmse=results.get("nmse"),
        l0=results.get("l0"),
        ce_recovered=results.get("model.ce_recovered"),
        tokens_per_s=_number(logged.get("time/tokens_per_s")),
        age=_age(folder, starts),
        size=_size(folder),
        recipe=recipe,
        results=results,
        faults=faults,
    )


def _status(folder: Path, starts: list[Any], saved: bool, faults: list[str]) -> tuple[str, str]:
    """Whether it runs, or how it ended; and details."""
    try:
        holder = Lock(folder / "run.lock").holder()
    except OSError as error:
        faults.append(f"run.lock: {error.strerror or error}")
        holder = None
    if holder is not None:
        return "running", str(holder)
    end = starts[-1].get("end") if starts and isinstance(starts[-1], dict) else None
    if isinstance(end, dict) and end.get("status") in STATUS:
        return STATUS[end["status"]], str(end.get("error") or "")
    # Without a record of its end: its process was killed, or was of a version that wrote none. Such a one removed its
    # lock when it ended by itself.
    if (folder / "run.lock").exists() or not saved:
        return "broken off", ""
    return "ended", ""


def _recipe(path: Path) -> dict[str, Any]:
    return tomllib.loads(read_small(path).decode())


def _table(path: Path) -> dict[str, Any]:
    table = load_json(path)
    if not isinstance(table, dict):
        raise ValueError("not a table")
    return table


def _lines(path: Path) -> list[Any]:
    return [parse_json(line) for line in read_small(path).splitlines() if line.strip()]


def _report(path: Path) -> dict[str, Any]:
    report = _table(path)
    if _number(report.get("l0")) is None:
        raise ValueError("no report of this version")
    return report


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last value of each metric, from the end of the file; a line that is being written is left out."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        lines = file.read(TAIL).splitlines(keepends=True)
    if size > TAIL:
        lines = lines[1:]
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    last: dict[str, Any] = {}
    for line in reversed(lines):
        for key, value in parse_json(line).items():
            last.setdefault(key, value)
        if {"time/tokens_per_s", "eval/nmse", "eval/l0"} <= last.keys():
            break
    return {key: value for key, value in last.items() if key in ("step", "tokens") or _number(value) is not None}


def _numbers(report: dict[str, Any]) -> dict[str, float]:
    """The numbers of a report by path; those by layer and of histograms are left out."""
    out: dict[str, Any] = {}
    for key, value in report.items():
        if key == "model" and isinstance(value, dict):
            out |= {f"model.{name}": one for name, one in value.items()}
            for name, variants in value.items():
                if isinstance(variants, dict):
                    out |= {f"model.{name}.{variant}": one for variant, one in variants.items()}
        elif key not in ("tokens", "dense_above", "format"):  # not scores
            out[key] = value
    return {key: value for key, value in out.items() if _number(value) is not None}


def _last_checkpoint(folder: Path) -> int | None:
    steps = [path.name.removeprefix("step_") for path in (folder / "checkpoints").glob("step_*")]
    return max((int(step) for step in steps if step.isdecimal()), default=None)


def _age(folder: Path, starts: list[Any]) -> float | None:
    try:
        began = datetime.strptime(starts[0]["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (IndexError, KeyError, TypeError, ValueError):
        present = [folder / name for name in OF_A_RUN if (folder / name).is_file()]
        began = min((path.stat().st_mtime for path in present), default=time.time())
    return max(0.0, time.time() - began)


def _size(folder: Path) -> int:
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile: it has no size any more
                total += (Path(here) / name).lstat().st_size
    return total


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and _number(value) is not None else None


def _number(value: Any) -> float | None:
    """A finite number of at most a hundred digits; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e100 else None
