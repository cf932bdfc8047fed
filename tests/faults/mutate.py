"""Damages files: bit rot, mistakes of a hand, and what a stranger with bad intentions would send; all by a seed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[Path, random.Random], None]

NUMBERS = [0, -1, 1, 2**31, 2**53 + 1, 2**63, 10**18, -(10**18), 1.5, 1e-300, 1e300, float("nan"), float("inf")]
HOSTILE: list[Any] = [
    *NUMBERS,
    *(None, True, "", "x", "../../outside", "/dev/zero", "\x00", "\ud800", "\x1b[2J", "nan", "1e5", "x" * 100_000),
    *([], {}, [[]], {"a": 1}, [1] * 100_000),
]
"""Values that stand where another one is expected."""


# -- any file ---------------------------------------------------------------------------------------------------------


def truncate(path: Path, draw: random.Random) -> None:
    size = path.stat().st_size
    os.truncate(path, draw.choice([0, 1, size // 2, max(0, size - 1), draw.randrange(size + 1)]))


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 8]) if data else 0):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def blank(path: Path, draw: random.Random) -> None:
    """What a crash leaves of a file that was not flushed: zeros."""
    data = bytearray(path.read_bytes())
    start = draw.choice([0, draw.randrange(len(data) + 1) // 512 * 512])
    end = min(len(data), start + draw.choice([512, 4096, len(data)]))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def append(path: Path, draw: random.Random) -> None:
    with path.open("ab") as file:
        file.write(draw.choice([b"\n", b"\x00", b"}", b"garbage\n", draw.randbytes(1000), path.read_bytes()]))


def swap(path: Path, draw: random.Random) -> None:
    """Another file of the same kind, or of another one, has its name."""
    others = sorted(p for p in path.parent.parent.rglob("*") if p.is_file() and p != path and p.stat().st_size)
    alike = [p for p in others if p.suffix == path.suffix and p.read_bytes() != path.read_bytes()]
    shutil.copyfile(draw.choice(alike if alike and draw.random() < 0.7 else others), path)


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "x").write_text("x")


def fifo(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path, draw: random.Random) -> None:
    """To nowhere, to itself, to a device, to the file that was moved elsewhere."""
    kept = path.with_name(f"{path.name}.moved")
    path.rename(kept)
    path.symlink_to(draw.choice(["nowhere", path.name, "/dev/zero", "/dev/null", "/dev/full", kept.name]))


# -- text that is structured ------------------------------------------------------------------------------------------


def hostile_json(path: Path, draw: random.Random) -> None:
    """A value is replaced, removed or added; or the text as a whole is hostile."""
    if draw.random() < 0.25:
        path.write_bytes(draw.choice(_texts(b"[", b"]", b'{"a":')))
        return
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = draw.randrange(len(lines))
    lines[number] = json.dumps(_changed(json.loads(lines[number]), draw))
    path.write_text("\n".join(lines) + "\n")


def _changed(tree: Any, draw: random.Random) -> Any:
    places = list(_places(tree, ()))
    where = draw.choice(places)
    if not where:
        return draw.choice(HOSTILE)
    parent = tree
    for key in where[:-1]:
        parent = parent[key]
    kind = draw.random()
    if kind < 0.7:
        parent[where[-1]] = draw.choice(HOSTILE)
    elif kind < 0.85:
        del parent[where[-1]]
    elif isinstance(parent, dict):
        parent[draw.choice(["new", "", "__class__", f"{where[-1]} "])] = draw.choice(HOSTILE)
    else:
        parent.append(draw.choice(HOSTILE))
    return tree


def _places(tree: Any, path: tuple[Any, ...]) -> Any:
    yield path
    children = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, value in children:
        yield from _places(value, (*path, key))


def _texts(opening: bytes, closing: bytes, entry: bytes) -> list[bytes]:
    deep = 100_000
    return [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"\x00" * 1000,
        b"\xef\xbb\xbf{}",
        opening * deep,
        opening * deep + closing * deep,
        entry * deep,
        b"9" * 1_000_000,
        b'"' + b"x" * 5_000_000 + b'"',
        b"[" + b"1," * 2_000_000 + b"1]",
    ]


def hostile_toml(path: Path, draw: random.Random) -> None:
    """A setting has a hostile value, a key is changed or stands twice; or the text as a whole is hostile."""
    if draw.random() < 0.15:
        path.write_bytes(draw.choice([*_texts(b"a = [", b"]", b"a = {a = "), b"a = " + b"[" * 50_000]))
        return
    lines = path.read_text().splitlines()
    settings = [n for n, line in enumerate(lines) if re.match(r"[\w.]+ = ", line)]
    number = draw.choice(settings)
    key, _, value = lines[number].partition(" = ")
    written = draw.choice(
        ["nan", "inf", "-inf", "[]", "{}", "''", "'x'", "true", "1979-05-27", "0x1F", "{a = 1}", "[[1]]"]
    )
    if re.match(r"-?[\d.e-]+$", value) and draw.random() < 0.7:
        written = str(draw.choice([n for n in NUMBERS if n == n])).replace("inf", "1e400")
    change = draw.random()
    if change < 0.8:
        lines[number] = f"{key} = {written}"
    elif change < 0.9:
        lines[number] = f"{key}x = {value}"
    else:
        lines.insert(number, lines[number])
    path.write_text("\n".join(lines) + "\n")


# -- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _write_tensors(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def hostile_tensors(path: Path, draw: random.Random) -> None:
    """The header promises what is not there."""
    header, data = _tensors(path)
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = draw.randrange(9)
    if kind == 0:
        path.write_bytes(struct.pack("<Q", draw.choice([2**63, 2**40, 10**8, 0, 7])) + path.read_bytes()[8:])
        return
    if kind == 1:
        _write_tensors(path, draw.choice(_texts(b"[", b"]", b'{"a":')[:-3]), data)
        return
    if kind == 2:
        entry["shape"] = draw.choice([[2**62, 4], [0], [], [-1], entry["shape"][::-1], [*entry["shape"], 1], "x"])
    elif kind == 3:
        entry["data_offsets"] = draw.choice([[0, 2**62], [8, 0], [0, 0], [-1, 4], [0], "x"])
    elif kind == 4:
        entry["dtype"] = draw.choice(["F64", "F16", "I32", "BOOL", "F8_E4M3", "x", 5])
    elif kind == 5:
        del header[name]
    elif kind == 6:
        header[f"{name}x"] = header.pop(name)
    elif kind == 7:
        header["__metadata__"] = draw.choice([{"a": "x" * 10**6}, [], 5, {"a": {}}])
    else:
        header[f"{name}_copy"] = entry
    _write_tensors(path, json.dumps(header).encode(), data)


def not_finite(path: Path, draw: random.Random) -> None:
    """NaN or an infinity, in one number or in all of a tensor."""
    import torch
    from safetensors.torch import load, save_file

    tensors = load(path.read_bytes())  # not mapped: the file is written anew
    floats = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel())
    if not floats:
        return
    tensor, value = tensors[draw.choice(floats)], draw.choice([torch.nan, torch.inf, -torch.inf])
    flat = tensor.view(-1)
    if draw.random() < 0.5:
        flat[draw.randrange(len(flat))] = value
    else:
        flat.fill_(value)
    save_file(tensors, path, metadata={"format": "pt"})


ANY: dict[str, Mutation] = {
    "truncated": truncate,
    "bits flipped": flip,
    "zeros after a crash": blank,
    "something appended": append,
    "another file under its name": swap,
    "missing": remove,
    "a folder in its place": folder,
    "a FIFO in its place": fifo,
    "a link in its place": link,
}
"""Of files of every format."""
