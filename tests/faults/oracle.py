"""What must hold after a fault: nothing that was acknowledged is lost, one clear line, the right exit code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from clt_datasets.make.inspect import inspect
from clt_plugins.errors import ExitCode, Faults
from clt_plugins.files.folders import check_folder
from tests.faults.forking import Ended

COMPARED = (".safetensors", ".h5", ".js", ".css", "cfg.json", "collected.json", "README.md", "index.html")
"""Ends of the names of files that must be byte for byte those of an unbroken command."""
LAST_STEP = "step_000012"
"""The last checkpoint of all runs that are tried."""
STACK = re.compile(r"Traceback \(most recent|Exception ignored|HDF5-DIAG|^ +File \"|Segmentation|core dumped", re.M)
RESULTS = ("resumed from", "member ", "k=")
"""Where a run goes on; rows of a sweep's table."""
BAR = re.compile(r"(step|it|tok|[kM]?B)/s[\],]")
"""In a bar of progress."""
LEVELS = ("warning: ", "error: ")


def content(folder: Path, made: Iterable[str]) -> dict[str, str]:
    """A digest of every file that counts in some folders; of metrics, what does not depend on time."""
    out: dict[str, str] = {}
    for part in made:
        for path in sorted((folder / part).rglob("*")):
            inside = path.relative_to(folder)
            if any(name.startswith(".") for name in inside.parts) or not path.is_file():
                continue
            if any(name == "set_aside" or (name.startswith("step_") and name != LAST_STEP) for name in inside.parts):
                continue  # which of the others are kept depends on where the run was broken
            if path.name == "metrics.jsonl" and "evaluation" not in inside.parts:
                out[str(inside)] = _metrics(path)
            elif path.name == "training.json":
                out[str(inside)] = _progress(path)
            elif path.name in ("evaluation.json", "convert.json"):
                out[str(inside)] = _report(path)
            elif path.name.endswith(COMPARED) or (path.name == "manifest.json" and _is_data_set(path)):
                out[str(inside)] = _digest(path)
    return out


def _digest(path: Path) -> str:
    """Of a file's bytes; of tensors, with the header sorted: its metadata are written in any order."""
    data = path.read_bytes()
    if path.suffix == ".safetensors" and len(data) > 8:
        size = int.from_bytes(data[:8], "little")
        try:
            read = json.loads(data[8 : 8 + size])
            slices = read.get("__metadata__", {}).get("slices")
            if slices is not None:
                read["__metadata__"]["slices"] = json.loads(slices)
            header = json.dumps(read, sort_keys=True)
        except (ValueError, RecursionError, AttributeError, TypeError):
            header = ""
        data = header.encode() + data[8 + size :] if header else data
    return hashlib.sha256(data).hexdigest()


def differences(now: dict[str, str], unbroken: dict[str, str]) -> list[str]:
    """A line for each file that is missing, or not what it is after an unbroken command."""
    missing = [f"{name} is missing" for name in unbroken.keys() - now.keys()]
    more = [f"{name} should not be there" for name in now.keys() - unbroken.keys()]
    changed = [f"{name} differs" for name in now.keys() & unbroken.keys() if now[name] != unbroken[name]]
    return sorted(missing + more + changed)


def damaged(folder: Path, names: Iterable[str]) -> list[str]:
    """A line for each of these folders, or of those below them that a command shows as finished, that is not whole."""
    faults = []
    for name in names:
        path = folder / name
        shown = [path] if (path / "manifest.json").exists() else []
        for inner in sorted(path.rglob("*")):
            if inner.is_dir() and not any(part.startswith(".") for part in inner.relative_to(folder).parts):
                known = inner.name.startswith("step_") or inner.name in ("transcoder", "converted", "evaluation")
                shown += [inner] if known or inner.parent.name == "exports" else []
        for one in shown:
            faults += _not_whole(one, one.relative_to(folder))
    return faults


def kept(folder: Path, names: Iterable[str], *, killed: bool = False) -> list[str]:
    """A line for each of these folders that is not there, or not whole.

    Args:
        killed: it may be set aside under a hidden name, from which the next command takes it back.
    """
    faults = []
    for name in names:
        path = folder / name
        if killed and not path.exists():
            aside = [other for other in path.parent.glob(f".{path.name}.*") if not _not_whole(other, Path(name))]
            faults += [] if aside else [f"{name} is gone"]
        else:
            faults += _not_whole(path, Path(name))
    return faults


def _not_whole(path: Path, name: Path) -> list[str]:
    if not path.exists():
        return [f"{name} is gone"]
    try:
        if _is_data_set(path / "manifest.json"):
            return [f"{name}: {fault}" for fault in inspect(path, verify=True).faults]
        check_folder(path)
    except (Faults, OSError) as error:
        return [f"{name} is not whole: {str(error).splitlines()[0]}"]
    return []


def _is_data_set(manifest: Path) -> bool:
    return manifest.is_file() and b'"chunks"' in manifest.read_bytes()


def _progress(path: Path) -> str:
    """Where training stands; a checkpoint also records settings, which may change when a run goes on."""
    try:
        read = json.loads(path.read_text())
        return json.dumps([read.get(key) for key in ("step", "tokens", "source")])
    except (OSError, ValueError, AttributeError) as error:
        return str(error)


def _report(path: Path) -> str:
    """Numbers to five digits: a transcoder that was loaded may be summed in another order than one just trained."""
    return re.sub(r"-?\d+\.\d+(e-?\d+)?", lambda found: f"{float(found[0]):.5g}", path.read_text(errors="replace"))


def _metrics(path: Path) -> str:
    """Losses and scores by step; the last line that was written for a step counts."""
    steps: dict[str, float] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue  # torn by a kill; what was logged again stands in a later line
        for key, value in read.items():
            if key.startswith(("loss/", "eval/", "optim/")):
                steps[f"{read.get('step')} {key}"] = value
    return hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()


def ending(ended: Ended, codes: Collection[int]) -> list[str]:
    """Whether it ended in time, within its memory and with the right code."""
    if ended.timeout:
        return [f"hangs: killed after {ended.seconds:.0f} s; {_where(ended.said)}"]
    if ended.bomb:
        return [f"takes memory without bounds: killed at {ended.grown / 2**30:.1f} GiB"]
    if ended.code not in codes:
        return [f"exit {ended.code} instead of {' or '.join(map(str, sorted(codes)))}: {last(ended.said)}"]
    return []


def message(ended: Ended, usual: str, names: Collection[str]) -> list[str]:
    """Whether stderr of a command that failed is one clear line that names a file or setting.

    Args:
        usual: what the command says when nothing fails.
        names: one of these must stand in the line, if there are any.
    """
    faults = []
    if found := STACK.search(ended.said):
        faults.append(f"a stack trace: {found[0].strip()!r}")
    if ended.code in (ExitCode.OK, ExitCode.INTERRUPTED) or ended.code < 0:
        return faults
    said = ended.said or "".join(line for line in ended.out.splitlines(True) if line.startswith("! "))
    known = {_plain(line) for line in usual.splitlines()}
    lines = [line for line in said.splitlines() if line.strip() and _plain(line) not in known]
    # Progress and results go before; the error is what is neither usual nor marked.
    lines = [line for line in lines if not (line.startswith((*LEVELS, *RESULTS)) or BAR.search(line))]
    if (len(lines) != 1 and not faults) and (ended.said or not lines):
        faults.append(f"{len(lines)} lines instead of one: {lines[:4]}")
    if lines and names and not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", lines[-1]) for name in names):
        faults.append(f"names none of {sorted(names)}: {lines[-1][:200]}")
    if lines and re.match(r"\w*(Error|Exception)\b", lines[-1]) and "(-v shows where)" in lines[-1]:
        faults.append(f"an error of the engine: {lines[-1][:200]}")
    return faults


def _where(said: str) -> str:
    """Where each thread of a command that hung stood, the newest calls first; as the zygote had it printed."""
    threads = re.split(r"^(?:Current thread|Thread) 0x\w+.*$", said, flags=re.MULTILINE)[1:]
    calls = (re.findall(r'File "(?:.*/)?([^/"]+)", line (\d+) in (\S+)', thread) for thread in threads)
    return " | ".join(" < ".join(f"{file}:{line} {name}" for file, line, name in found[:6]) for found in calls)


def last(said: str) -> str:
    """The last line, cut."""
    return (said.strip().splitlines() or [""])[-1][-300:]


def _plain(line: str) -> str:
    return re.sub(r"[\d.,%e+-]+", "#", line.strip())
