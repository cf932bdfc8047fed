"""What the pages are made of: libraries as pinned, scripts that all are loaded, and nothing from elsewhere."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import pytest

from clt_reports.site import vendor
from clt_reports.site.write import ASSETS, copy_assets

OWN = sorted([*(ASSETS / "js").rglob("*.js"), *(ASSETS / "css").glob("*.css"), ASSETS / "index.html"])


def test_the_libraries_are_those_that_are_pinned(tmp_path: Path) -> None:
    vendor.check()
    copy = tmp_path / "vendor"
    shutil.copytree(vendor.VENDOR, copy)
    (copy / "preact.js").write_bytes((copy / "preact.js").read_bytes() + b" ")
    with pytest.raises(SystemExit, match=r"preact\.js: SHA-256 is \w{64}, pinned is \w{64}"):
        vendor.check(copy)
    (copy / "preact.js").unlink()
    with pytest.raises(SystemExit, match=r"not as pinned: preact\.js"):
        vendor.check(copy)


def test_each_library_comes_with_its_licence() -> None:
    scripts = {pin.package for pin in vendor.PINS}
    assert {name for name in scripts if not (vendor.VENDOR / f"{name}.LICENSE").is_file()} == set()


def test_the_page_loads_each_script_and_style_once() -> None:
    text = (ASSETS / "index.html").read_text()
    loaded = re.findall(r'(?:src|href)="(assets/[^"]+|data/[^"]+)"', text)
    files = [path for path in ASSETS.rglob("*") if path.suffix in (".js", ".css")]
    assert sorted(loaded) == sorted(["data/site.js", *(f"assets/{path.relative_to(ASSETS)}" for path in files)])


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_nothing_is_asked_for_from_elsewhere_and_no_text_becomes_markup(path: Path) -> None:
    forbidden = r"https?:|\bfetch\(|XMLHttpRequest|WebSocket|\bimport\(|innerHTML|outerHTML|insertAdjacentHTML|\beval\("
    assert re.findall(forbidden, path.read_text()) == []


def test_folders_and_files_are_small() -> None:
    for path in OWN:
        assert len(path.read_text().splitlines()) <= 300
        assert len(list(path.parent.iterdir())) <= 10


def test_a_full_disk_is_told_with_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "full"):
        (tmp_path / name).mkdir()
    copy_assets(tmp_path / "whole")
    copied = {path.relative_to(tmp_path / "whole").as_posix() for path in (tmp_path / "whole").rglob("*")}
    assert {"index.html", "assets/js/app.js", "assets/vendor/preact.js"} <= copied
    assert "assets/index.html" not in copied

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '[^']*' -> '[^']*'$"):
        copy_assets(tmp_path / "full")
