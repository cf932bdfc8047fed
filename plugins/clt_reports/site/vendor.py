"""The libraries in `assets/vendor`: which versions they are, and how they came there.

    python -m clt_reports.site.vendor            fetch them anew with npm, verify, write
    python -m clt_reports.site.vendor --check    compare the files on disk with the pins; needs no network

A site must open without a network, so its libraries lie in the wheel, each with its licence. The files are those of
the npm packages, byte for byte. To take a newer version, change its pin here: the SHA-256 of the package, then of each
file, are printed where they differ.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import attrs

VENDOR = Path(__file__).parent / "assets" / "vendor"


@attrs.frozen
class Pin:
    """One npm package: `files` maps a path in the package to the name it gets here and its SHA-256."""

    package: str
    version: str
    sha256: str
    files: dict[str, tuple[str, str]]


PINS = (
    # Components. Version 11 has no file that a classic script can load, and modules do not load from `file://`.
    Pin(
        "preact",
        "10.29.8",
        "b18cb0a457f3d43c7bb30391a74ade7d13e03bc6e77915e061c70c0fe1123299",
        {
            "dist/preact.min.umd.js": (
                "preact.js",
                "aa558e32247d4ccea18c5addbb0311bc1771bf39734185be01dc0c3c4cf3fd6d",
            ),
            "hooks/dist/hooks.umd.js": (
                "preact-hooks.js",
                "5c29238e5dc99df306d7f7fff038591a397cfcfabb59f81fbdef43d670aa0566",
            ),
            "LICENSE": (
                "preact.LICENSE",
                "1fe6958409c8c257a70c587a18b6f7f412b179b456630790d30b2ec9a8e4b7d4",
            ),
        },
    ),
    # Templates as tagged strings: no build step. A value in a template becomes a text node, never markup.
    Pin(
        "htm",
        "3.1.1",
        "2425b9bee11409177bcabc7f32e319926fc6690c1701c0b257c88bdff2d5ba90",
        {
            "dist/htm.umd.js": ("htm.js", "7a31776e04bd4afde0d4308177d26f377716fcf7e4bd70be590746d6aa594f08"),
            "LICENSE": ("htm.LICENSE", "740725f7252e750af735d0028cc534970772f513331e9f68150fede8fb3ce00f"),
        },
    ),
    # Curves and histograms.
    Pin(
        "uplot",
        "1.6.32",
        "4b8a8191e425658e3ea8c8c1314b0fc679c861ee3a1af2b20c7b16ba50b5133d",
        {
            "dist/uPlot.iife.min.js": ("uplot.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
            "dist/uPlot.min.css": ("uplot.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
            "LICENSE": ("uplot.LICENSE", "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd"),
        },
    ),
)


def fetch(pin: Pin, folder: Path) -> dict[str, bytes]:
    """The pinned files of a package by the names they get here. Raises SystemExit where a hash differs."""
    subprocess.run(
        ["npm", "pack", "--silent", f"{pin.package}@{pin.version}"], cwd=folder, check=True, stdout=sys.stderr
    )
    archive = folder / f"{pin.package}-{pin.version}.tgz"
    verify(archive.name, archive.read_bytes(), pin.sha256)
    files = {}
    with tarfile.open(archive) as package:
        for path, (name, sha256) in pin.files.items():
            member = package.extractfile(f"package/{path}")
            assert member is not None, f"{archive.name} has no file {path}"
            files[name] = member.read()
            verify(f"{archive.name}: {path}", files[name], sha256)
    return files


def verify(name: str, content: bytes, sha256: str) -> None:
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise SystemExit(f"{name}: SHA-256 is {actual}, pinned is {sha256}")


def check(folder: Path = VENDOR) -> None:
    """Compare the files on disk with the pins. Raises SystemExit at the first that differs, is missing or is extra."""
    pinned = dict(entry for pin in PINS for entry in pin.files.values())
    present = {path.name for path in folder.iterdir()}
    if present != set(pinned):
        raise SystemExit(f"{folder}: not as pinned: {', '.join(sorted(present ^ set(pinned)))}")
    for name, sha256 in pinned.items():
        verify(name, (folder / name).read_bytes(), sha256)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--check"]):
        raise SystemExit("usage: python -m clt_reports.site.vendor [--check]")
    if not arguments:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: content for pin in PINS for name, content in fetch(pin, Path(folder)).items()}
        VENDOR.mkdir(exist_ok=True)
        for name, content in files.items():
            (VENDOR / name).write_bytes(content)
    check()


if __name__ == "__main__":
    main(sys.argv[1:])
