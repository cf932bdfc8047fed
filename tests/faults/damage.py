"""Damaged and hostile files of every format that a command reads."""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import xxhash

from clt_plugins.contract.slots import BY_TABLE
from clt_plugins.errors import ExitCode
from tests.faults import oracle
from tests.faults.bench import Bench
from tests.faults.commands import COMMANDS, DAMAGED, Reads
from tests.faults.mutate import ANY, Mutation, hostile_json, hostile_tensors, hostile_toml, not_finite
from tests.faults.mutate_hdf5 import hostile_hdf5, not_finite_hdf5
from tests.faults.tries import Result, Try

FORMATS: dict[str, dict[str, Mutation]] = {
    "hostile content": {
        ".json": hostile_json,
        ".jsonl": hostile_json,
        ".toml": hostile_toml,
        ".safetensors": hostile_tensors,
        ".h5": hostile_hdf5,
        ".hdf5": hostile_hdf5,
    },
    "NaN or infinity": {".safetensors": not_finite, ".h5": not_finite_hdf5, ".hdf5": not_finite_hdf5},
}
"""Faults that know the format of a file, by the end of its name."""
RESEALED = ", checksums made to fit"
MEMORY = 2**31
"""Bytes beyond those of the zygote that a command on a few kilobytes of input may take."""
LONG_S, STOP_S = 40.0, 12.0
"""A command may take so long; a setting may ask for a long run, which must then stop when it is told to."""
SETTING = re.compile(rf"(?<![\w.])[a-z_]+(\.[a-z_0-9]+|\[\d+\])+|--[a-z-]+|^({'|'.join(['model', *BY_TABLE])}): ")


def pairs() -> list[tuple[str, str]]:
    out = []
    for command, reads in DAMAGED.items():
        out += [(fault, command) for fault in (*ANY, *FORMATS)]
        if any(each.sealed for each in reads):
            out += [(fault + RESEALED, command) for fault in FORMATS]
    return out


def details(bench: Bench, fault: str, command: str, draw: random.Random) -> Iterator[str]:
    """Seeds of mutations, without an end."""
    while True:
        yield str(draw.randrange(10**6))


def attempt(bench: Bench, one: Try) -> Result:
    """Damage a file, run the command that reads it, judge what it says and does."""
    command, draw = COMMANDS[one.command], random.Random(str(one))
    unbroken = bench.unbroken(one.command)
    slot = bench.fresh(command.folder)
    resealed = one.fault.endswith(RESEALED)
    mutate, path, reads = _choose(slot, one, draw)
    if path is None or mutate is None or reads is None:
        return Result(reached=False)
    before = state(slot)
    mutate(path, draw)
    if resealed:
        _seal(path)
    changed = state(slot)
    if changed == before:
        return Result(reached=False)
    ended = bench.run(
        command.arguments,
        timeout=LONG_S,
        memory=MEMORY,
        signals=[[STOP_S, int(signal.SIGINT)]] if not reads.sealed else [],
    )
    faults = oracle.ending(ended, set(ExitCode))
    faults += _said(ended, unbroken.ended.said, path, slot)
    if ended.code == 0:
        known = {name: digest for name, digest in unbroken.content.items() if slot / name != path}
        faults += _made(slot, one, reads.sealed and not resealed, known, path)
    elif not faults:
        faults += _destroyed(slot, changed, path)
    return Result(faults=faults, where=str(path.relative_to(slot)), ended=ended)


def _choose(slot: Path, one: Try, draw: random.Random) -> tuple[Mutation | None, Path | None, Reads | None]:
    """The mutation, and one of the files that it can be applied to."""
    fault = one.fault.removesuffix(RESEALED)
    choices: list[tuple[Mutation, Path, Reads]] = []
    for reads in DAMAGED[one.command]:
        if one.fault.endswith(RESEALED) and not reads.sealed:
            continue
        files = [path for pattern in reads.files for path in sorted(slot.glob(pattern)) if path.is_file()]
        for path in files:
            mutation = ANY.get(fault) or FORMATS.get(fault, {}).get(path.suffix)
            if mutation is not None:
                choices.append((mutation, path, reads))
    return draw.choice(choices) if choices else (None, None, None)


def _said(ended: oracle.Ended, usual: str, path: Path, slot: Path) -> list[str]:
    """Like `oracle.message`; several settings may be wrong at once, a line for each."""
    faults = [line for line in oracle.message(ended, usual, ()) if "lines instead of one" not in line]
    said = [line for line in ended.said.splitlines() if line.strip()]
    if ended.code in (ExitCode.FAILED, ExitCode.USAGE):
        names = {path.name, *(part for part in path.relative_to(slot).parts[:-1])}
        last = said[-1] if said else ended.out.strip()
        text = last if last else ""
        if not any(name in f"{text} {ended.out}" for name in names) and not SETTING.search(text):
            faults.append(f"names neither file nor setting: {text[:300]!r}")
    if any(len(line) > 2000 for line in said) or len(said) > 60:
        faults.append(f"{len(said)} lines of at most {max(map(len, said))} characters")
    return faults


def _made(slot: Path, one: Try, strict: bool, unbroken: dict[str, str], damaged: Path) -> list[str]:
    """What is wrong with what a command made that ended with 0."""
    command = COMMANDS[one.command]
    faults = oracle.damaged(slot, command.shows)
    if strict:
        now = oracle.content(slot, command.makes)
        now.pop(str(damaged.relative_to(slot)), None)
        faults += [f"ended with 0, but {line}" for line in oracle.differences(now, unbroken)]
    for name in command.makes:
        for path in sorted((slot / name).rglob("*.safetensors")):
            faults += _not_finite(path, slot)
    return faults


def _not_finite(path: Path, slot: Path) -> list[str]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        return [f"{path.relative_to(slot)}: {error}"]
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    return [f"ended with 0, but {path.relative_to(slot)} is not finite: {bad}"] if bad else []


def state(slot: Path) -> dict[str, str]:
    """Every file, by what it is and holds."""
    out = {}
    for path in sorted(slot.rglob("*")):
        if path.is_symlink():
            out[str(path.relative_to(slot))] = f"-> {path.readlink()}"
        elif path.is_file():
            out[str(path.relative_to(slot))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not path.is_dir():
            out[str(path.relative_to(slot))] = "special"
    return out


def _destroyed(slot: Path, before: dict[str, str], damaged: Path) -> list[str]:
    """A command that fails leaves the other files as they were, but for records of the start, and what a process that
    died was writing."""
    now, kept = state(slot), (".safetensors", ".h5", ".json", ".hdf5", ".jsonl")
    records = ("metrics.jsonl", "versions.json", "history.jsonl", ".written_0.jsonl")
    lost = [
        name
        for name, digest in before.items()
        if now.get(name) != digest and name.endswith(kept) and not (name.endswith(records) or ".partial/" in name)
    ]
    return [f"failed, and {name} is not what it was" for name in lost if slot / name != damaged]


def _seal(path: Path) -> None:
    """Make the checksums fit a file that was changed."""
    manifest = path.parent / "manifest.json"
    if path == manifest or not manifest.is_file() or not path.is_file():
        return
    try:
        listed = json.loads(manifest.read_text())
    except ValueError:
        return
    data = path.read_bytes()
    if "files" in listed and path.name in listed["files"]:
        listed["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    elif path.name == "statistics.safetensors" and "statistics" in listed:
        listed["statistics"] = xxhash.xxh3_128_hexdigest(data)
    elif path.suffix == ".h5":
        for chunk in listed.get("chunks", []):
            if chunk["file"] == path.name:
                chunk["bytes"] = len(data)
                chunk["checksum"] = _chunk_checksum(path) or chunk["checksum"]
    manifest.write_text(json.dumps(listed))


def _chunk_checksum(path: Path) -> str | None:
    """Checksums of a chunk's blocks made to fit its rows, and the checksum of those."""
    import h5py
    import numpy as np

    names = ("inputs", "targets", "token_ids", "positions")
    try:
        with h5py.File(path, "r+") as file:
            known = [file[name] for name in (*names, "checksums") if name in file]
            if any(each.external or each.is_virtual or each.size > 2**20 for each in known):
                return None  # reading it would hang or fill the memory here
            stored = file["checksums"][()]
            rows = [file[name][()] for name in names if name in file]
            block = -(-len(rows[0]) // max(1, len(stored) - 1))
            for number in range(len(stored) - 1):
                state = xxhash.xxh3_64()
                for array in rows:
                    state.update(np.ascontiguousarray(array[number * block : (number + 1) * block]))
                stored[number] = state.intdigest()
            file["checksums"][...] = stored
            return xxhash.xxh3_128_hexdigest(stored.tobytes())
    except Exception:
        return None  # it is no such chunk any more: its checksum does not fit
