"""Hostile HDF5 files: what leads outside, bombs, and numbers that are none."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import h5py
import numpy as np

BOMB = 2**28
"""Numbers that a data set claims: 2 GiB of eight bytes each, a few kilobytes on disk."""


def hostile_hdf5(path: Path, draw: random.Random) -> None:
    """Something in the file is not what it should be."""
    with h5py.File(path, "r+") as file:
        name = draw.choice(_data_sets(file))
        kind = draw.choice(sorted(KINDS))
        KINDS[kind](file, name, path, draw)


def not_finite_hdf5(path: Path, draw: random.Random) -> None:
    """NaN or an infinity in stored numbers."""
    with h5py.File(path, "r+") as file:
        floats = [name for name in _data_sets(file) if file[name].dtype.kind == "f" and file[name].size]
        if not floats:
            return
        name = draw.choice(floats)
        values = file[name][()]
        flat = values.reshape(-1)
        flat[draw.randrange(len(flat)) if draw.random() < 0.5 else slice(None)] = draw.choice([np.nan, np.inf, -np.inf])
        file[name][...] = values


def _data_sets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted(names)


def _replace(file: h5py.File, name: str, **options: Any) -> None:
    del file[name]
    file.create_dataset(name, **options)


def _external_storage(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    shape, dtype = file[name].shape, file[name].dtype
    outside = path.parent.parent / "outside"
    if draw.random() < 0.5:
        outside.write_bytes(bytes(int(np.prod(shape)) * dtype.itemsize))
    elif not outside.exists():
        os.mkfifo(outside)
    size = max(1, int(np.prod(shape)) * dtype.itemsize)
    _replace(file, name, shape=shape, dtype=dtype, external=[(str(outside), 0, size)])


def _external_link(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    others = sorted(p for p in path.parent.glob(f"*{path.suffix}") if p != path)
    target = draw.choice([*(str(p) for p in others), "nowhere.h5", "/dev/zero"])
    del file[name]
    file[name] = h5py.ExternalLink(target, name)


def _virtual(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    layout = h5py.VirtualLayout(shape, dtype)
    if shape:
        layout[...] = h5py.VirtualSource(draw.choice(["nowhere.h5", "/etc/passwd"]), name, shape)
    file.create_virtual_dataset(name, layout)


def _bomb(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    shape = (draw.choice([BOMB, 2**42]), *file[name].shape[1:])
    _replace(file, name, shape=shape, dtype=file[name].dtype, chunks=(2**16, *file[name].shape[1:]), compression="gzip")


def _other_type(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    dtype = draw.choice([np.float64, np.int8, h5py.string_dtype(), np.complex64, np.dtype([("a", "<f4")])])
    _replace(file, name, shape=file[name].shape, dtype=dtype)


def _other_shape(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    shape = file[name].shape
    other = draw.choice(
        [(), (0,), (*shape, 2), shape[:-1], tuple(2 * n for n in shape), tuple(max(0, n - 1) for n in shape)]
    )
    _replace(file, name, shape=other, dtype=file[name].dtype)


def _missing(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    del file[name]


def _group(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    del file[name]
    file.create_group(name)


def _soft_link(file: h5py.File, name: str, path: Path, draw: random.Random) -> None:
    del file[name]
    file[name] = h5py.SoftLink(draw.choice([f"/{name}", "/nowhere", "/"]))


KINDS = {
    "external storage": _external_storage,
    "external link": _external_link,
    "virtual": _virtual,
    "bomb": _bomb,
    "other type": _other_type,
    "other shape": _other_shape,
    "missing": _missing,
    "group": _group,
    "soft link": _soft_link,
}
