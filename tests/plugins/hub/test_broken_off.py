"""Uploads and downloads that break off at random moments, by either side: done again, they end with equal bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from clt_plugins import CrossLayerTranscoder, HubPlace, upload
from clt_plugins.files.hub import library, listing
from clt_plugins.files.hub.choose import fetch_place
from tests.support.hub.client import environment
from tests.support.hub.standin import Standin

MOMENTS = range(20)
PLACE = HubPlace.parse("user/clt/transcoder")


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """A transcoder's folder with a large file besides: many parts, and many moments."""
    folder = tmp_path_factory.mktemp("large") / "transcoder"
    folder.mkdir()
    for path in (trained / "converted").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "more.safetensors").write_bytes(random.Random(0).randbytes(2**21))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub: Standin) -> dict[str, bytes]:
    files = hub.repositories["user/clt"].files()
    return {path.removeprefix("transcoder/"): content for path, content in files.items()}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_hub_that_breaks_off_or_is_overloaded_is_asked_again(hub, folder, moment, monkeypatch):
    """A third of all requests fail, after a random one on; neither the upload nor the download does."""
    draw = random.Random(moment)
    first, faults = draw.randrange(30), []

    def fault(request, number):
        # A client does not ask more than some times: no request fails for ever.
        if number < first or len(faults) == 12 or draw.random() > 0.3:
            return None
        faults.append(request.path)
        return draw.choice(["drop", "503"])

    hub.fault = fault
    _be_quick(monkeypatch)
    monkeypatch.setattr(library, "ATTEMPTS", 30)
    monkeypatch.setattr(listing, "ATTEMPTS", 30)
    upload(folder, PLACE, message="first")
    assert pushed(hub) == contents(folder)
    assert len(hub.repositories["user/clt"].commits) == 2, "what is visible was changed once"
    snapshot = fetch_place(PLACE)
    expected = {name: content for name, content in contents(folder).items() if name != "more.safetensors"}
    assert contents(snapshot) == expected, "what the manifest lists"
    assert faults


@pytest.mark.parametrize("answer", ["503", "drop"])
def test_every_request_of_an_upload_may_fail_once(hub, folder, answer, tmp_path, monkeypatch):
    """Also that about the card, whose answer the hub's library reads as JSON before it looks at the status."""
    _be_quick(monkeypatch)
    folder = shutil.copytree(folder, tmp_path / "with a card")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA transcoder.\n")
    upload(folder, HubPlace.parse("user/unbroken"), message="first")
    for failing in range(len(hub.requests)):
        first = len(hub.requests) + failing
        hub.fault = lambda request, number, failing=first: answer if number == failing + 1 else None
        name = f"user/clt{failing}"
        upload(folder, HubPlace.parse(name), message="first")
        files = hub.repositories[name].files()
        files.pop(".gitattributes", None)
        assert files == contents(folder), hub.requests[first]


def _be_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's pauses between attempts, which are for real hubs."""
    real = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: real(min(seconds, 0.001)))


def killed(work: object, after_s: float) -> bool:
    """Do something in a child, which is killed after so many seconds; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            work()  # type: ignore[operator]
        finally:
            os._exit(0)
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def test_a_client_that_is_killed_goes_on_where_it_was(hub, folder):
    """At ten random moments of an upload, and of a download, at least. How long they take depends on the machine: it is
    tried until so many were killed before their end.
    """
    began = time.monotonic()
    upload(folder, HubPlace("user/timed"), message="timed")
    seconds = time.monotonic() - began
    draw, uploads, downloads = random.Random(1), 0, 0
    for moment in range(200):
        if uploads >= 10 and downloads >= 10:
            break
        place = HubPlace(f"user/killed-{moment}", "transcoder")
        uploads += killed(lambda place=place: upload(folder, place, message="killed"), draw.uniform(0, seconds))
        repository = hub.repositories.get(place.repository)
        if repository is not None:
            there = repository.files()
            assert not there or there == {f"transcoder/{n}": c for n, c in contents(folder).items()}, "all or nothing"
        before = len(hub.requests)
        upload(folder, place, message="again")
        files = hub.repositories[place.repository].files()
        assert files == {f"transcoder/{name}": content for name, content in contents(folder).items()}
        puts = [request for request in hub.requests[before:] if request.startswith("PUT")]
        assert not puts or moment == 0, "the hub has what was sent before, also by another repository"
        downloads += killed(lambda place=place: fetch_place(place), draw.uniform(0, seconds))
        snapshot = fetch_place(place)
        assert all(content == contents(folder)[name] for name, content in contents(snapshot).items())
    CrossLayerTranscoder.load(str(place))
    assert uploads >= 10 and downloads >= 10


@pytest.mark.slow
def test_the_command_is_killed_and_goes_on(hub, trained, tmp_path):
    """Whole processes: `push`, then a program that loads; each killed at 20 random moments."""
    import subprocess
    import sys

    variables = {**os.environ, **environment(hub.url, tmp_path / "home")}
    draw, kills = random.Random(2), 0

    def start(*arguments: object) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, *map(str, arguments)], env=variables, stderr=subprocess.DEVNULL)

    load = "from clt_plugins import CrossLayerTranscoder; CrossLayerTranscoder.load('user/clt')"
    program = ("-m", "clt_plugins", "push", trained, "user/clt", "--license", "mit")
    began = time.monotonic()
    for command in (program, ("-c", load)):
        for _ in range(20):
            process = start(*command)
            seconds = draw.uniform(1.5, 6.0)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
                process.wait()
        assert start(*command).wait() == 0
    files = hub.repositories["user/clt"].files()
    for path in (trained / "converted").glob("*.safetensors"):
        assert files[f"converted/{path.name}"] == path.read_bytes()
    assert kills > 10 and time.monotonic() - began < 600
