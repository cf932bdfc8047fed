"""HDF5 and JSON files of strangers: they lead nowhere, claim nothing, and stop nobody."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from clt_plugins import Refused, load_json, open_hdf5, read_small
from tests.support.peak import peak

ROWS = np.arange(600, dtype="f4").reshape(100, 6)


def honest(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("layer_0/inputs", data=ROWS, chunks=(16, 6), compression="gzip", shuffle=True)
        file.create_dataset("layer_0/targets", data=ROWS)
        file.create_dataset("small", data=ROWS[:1])


def external_storage(file: h5py.File, outside: Path) -> None:
    file.create_dataset("x", shape=(16,), dtype="u1", external=[(str(outside), 0, 16)])


def virtual(file: h5py.File, outside: Path) -> None:
    layout = h5py.VirtualLayout(shape=(10, 6), dtype="f4")
    layout[:] = h5py.VirtualSource(str(outside), "x", shape=(10, 6))
    file.create_virtual_dataset("layer_0/x", layout)


def virtual_of_any_length(file: h5py.File, outside: Path) -> None:
    # Asked for its shape, HDF5 looks at how many rows the source has.
    layout = h5py.VirtualLayout(shape=(10, 6), dtype="f4", maxshape=(None, 6))
    source = h5py.VirtualSource(str(outside), "x", shape=(10, 6), maxshape=(None, 6))
    layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
    file.create_virtual_dataset("x", layout)


def external_link(file: h5py.File, outside: Path) -> None:
    file["x"] = h5py.ExternalLink(str(outside), "/x")


def soft_link(file: h5py.File, _: Path) -> None:
    file["layer_0/x"] = h5py.SoftLink("/elsewhere")


def never_written(file: h5py.File, _: Path) -> None:
    file.create_dataset("x", shape=(2**28,), dtype="u8")


def written_in_part(file: h5py.File, _: Path) -> None:
    data = file.create_dataset("x", shape=(100, 6), dtype="f4", chunks=(16, 6))
    data[:50] = 1


def gigabytes_of_nothing(file: h5py.File, _: Path) -> None:
    file.create_dataset("x", shape=(2**40,), dtype="u8", chunks=(2**20,), compression="gzip")


def huge_chunks(file: h5py.File, _: Path) -> None:
    file.create_dataset("x", shape=(1,), maxshape=(None,), dtype="u1", chunks=(2**30 + 1,), compression="gzip")


def rare_filter(file: h5py.File, _: Path) -> None:
    file.create_dataset("x", data=ROWS.astype("i4"), chunks=(16, 6), scaleoffset=0)


def references(file: h5py.File, _: Path) -> None:
    file.create_dataset("x", data=[file.ref], dtype=h5py.ref_dtype)


def text_of_any_length(file: h5py.File, _: Path) -> None:
    file["x"] = ["a", "b"]


def records(file: h5py.File, _: Path) -> None:
    file["x"] = np.zeros(3, [("a", "f4"), ("b", "f4")])


def named_type(file: h5py.File, _: Path) -> None:
    file["x"] = np.dtype("f4")


def one_number(file: h5py.File, _: Path) -> None:
    file["x"] = 3.0


def nested(file: h5py.File, _: Path) -> None:
    file.create_group("a/" * 5000)


def within_itself(file: h5py.File, _: Path) -> None:
    file["layer_0/again"] = file["layer_0"]


HOSTILE = [
    external_storage,
    virtual,
    virtual_of_any_length,
    external_link,
    soft_link,
    never_written,
    written_in_part,
    gigabytes_of_nothing,
    huge_chunks,
    rare_filter,
    references,
    text_of_any_length,
    records,
    named_type,
    one_number,
    nested,
    within_itself,
]


@pytest.mark.parametrize("add", HOSTILE, ids=lambda add: add.__name__)
def test_what_leads_out_of_a_file_or_claims_too_much_is_refused(
    tmp_path: Path, add: Callable[[h5py.File, Path], None]
) -> None:
    honest(tmp_path / "rows.h5")
    # Whoever opens it waits for ever.
    os.mkfifo(tmp_path / "outside.h5")
    with h5py.File(tmp_path / "rows.h5", "r+") as file:
        add(file, tmp_path / "outside.h5")
    with peak() as grown:
        with pytest.raises(Refused, match=r"^[^\n]*rows\.h5: [^\n]*$"):
            open_hdf5(tmp_path / "rows.h5")
        assert grown() < 200e6, "far less than any of the sizes that are claimed"
    # It is closed: another program may write it.
    with h5py.File(tmp_path / "rows.h5", "r+"):
        pass


def test_an_honest_file_is_read(tmp_path: Path) -> None:
    honest(tmp_path / "rows.h5")
    with open_hdf5(tmp_path / "rows.h5") as file:
        assert np.array_equal(file["layer_0/inputs"][10:20], ROWS[10:20])
        assert np.array_equal(file["layer_0/targets"][()], ROWS)
    (tmp_path / "link.h5").symlink_to(tmp_path / "rows.h5")
    open_hdf5(tmp_path / "link.h5").close()


@pytest.mark.parametrize("read", [open_hdf5, load_json, read_small])
def test_only_regular_files_are_opened(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, text in (("fifo", "not a regular file"), ("folder", "not a regular file"), ("nothing", "missing")):
        with pytest.raises(Refused, match=rf"{name}: {text}$"):
            read(tmp_path / name)
    with pytest.raises(Refused, match=r"^/dev/zero: not a regular file$"):
        read(Path("/dev/zero"))


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    honest(tmp_path / "rows.h5")
    raw = (tmp_path / "rows.h5").read_bytes()
    for size in (0, 7, 100, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cut.h5").write_bytes(raw[:size])
        with pytest.raises(Refused, match=r"cut\.h5: "):
            open_hdf5(tmp_path / "cut.h5")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[" * 200_000, "nested too deep"),
        (b'{"a": ' * 200_000, "nested too deep"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "Expecting value"),
        (b"9" * 10_000, "Exceeds the limit"),
    ],
)
def test_json_that_kills_or_is_none_is_refused_by_name(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Refused, match=rf"a\.json: not a readable JSON file: {text}"):
        load_json(tmp_path / "a.json")


def test_large_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[1]")
    assert load_json(tmp_path / "a.json") == [1]
    with pytest.raises(Refused, match=r"a\.json: larger than 2 bytes$"):
        read_small(tmp_path / "a.json", 2)
    # A hole: it takes no room on the disk.
    os.truncate(tmp_path / "a.json", 2**40)
    with pytest.raises(Refused, match=r"a\.json: larger than 67,108,864 bytes$"):
        load_json(tmp_path / "a.json")


FLIP = """
import random, sys
from pathlib import Path
from clt_plugins import Refused, open_hdf5
path, begin, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
raw = path.read_bytes()
for seed in range(begin, end):
    draw = random.Random(seed)
    data = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.with_suffix(".flipped").write_bytes(data)
    print(seed, flush=True)
    try:
        with open_hdf5(path.with_suffix(".flipped")) as file:
            for name in ("layer_0/inputs", "layer_0/targets", "small"):
                file[name][()]
    except (Refused, OSError, KeyError, ValueError, RuntimeError):
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_flipped_bits_do_not_end_the_process(tmp_path: Path, version: str) -> None:
    """HDF5 is written in C: a crash would take the server, or a run, with it."""
    with h5py.File(tmp_path / "rows.h5", "w", libver=version) as file:
        file.create_dataset("layer_0/inputs", data=ROWS, chunks=(16, 6), compression="gzip", shuffle=True)
        file.create_dataset("layer_0/targets", data=ROWS[:20])
        file.create_dataset("small", data=ROWS[:1])
    done = subprocess.run(
        [sys.executable, "-c", FLIP, str(tmp_path / "rows.h5"), "0", "2000"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"ended with {done.returncode} at seed {done.stdout.splitlines()[-1]}: {done.stderr}"


@pytest.mark.parametrize("place", ["h5py.File", "clt_plugins.files.hdf5._check"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_what_may_pass_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int) -> None:
    """HDF5 tells both alike, in several lines."""
    honest(tmp_path / "x.h5")

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, f"Can't synchronously read data (time = Fri\n, filename = 'x.h5', errno = {number})")

    monkeypatch.setattr(place, fails)
    with pytest.raises(OSError, match=r"^\[Errno \d+\] [^\n]*x\.h5'$") as raised:
        open_hdf5(tmp_path / "x.h5")
    assert raised.value.errno == number
    number = errno.EIO
    with pytest.raises(Refused, match=r"x\.h5: cannot be read: "):
        open_hdf5(tmp_path / "x.h5")
