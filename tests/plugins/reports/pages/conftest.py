"""A site in a headless browser, opened from disk. Whatever it does, it must not print an error or ask for anything else
than its own files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.sites import Made, make_site

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium of this machine. Without it, or without the extra `browser`, the tests are skipped."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser' (playwright)")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs Chromium (of the system: apt-get install chromium), or its path in CHROMIUM")
    # Containers have no user namespaces for the sandbox, and root may not use it.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A small site with hostile tokens and a graph."""
    return make_site(tmp_path_factory.mktemp("site"))


class Opened:
    """Opens pages of sites, each in a new profile, and watches them."""

    def __init__(self, browser: Any):
        self.browser = browser
        self.contexts: list[Any] = []
        self.faults: list[str] = []
        self.expected: tuple[str, ...] = ()
        """Texts of console errors that a test provokes."""

    def __call__(self, folder: Path, route: str = "#/", **settings: Any) -> Any:
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings})
        self.contexts.append(context)
        page = context.new_page()
        own = folder.as_uri() + "/"
        page.set_default_timeout(10_000)
        page.on("console", lambda message: self._console(message))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(own) or self.faults.append(f"request: {request.url}"))
        page.on("websocket", lambda socket: self.faults.append(f"socket: {socket.url}"))
        page.goto(f"{own}index.html{route}")
        page.wait_for_selector("h1")
        return page

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not any(text in message.text for text in self.expected):
            self.faults.append(f"{message.type}: {message.text}")


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    """`opened(folder, route)` is a page. After the test: no console error, no request but for files of the folder."""
    pages = Opened(browser)
    yield pages
    for context in pages.contexts:
        context.close()
    assert pages.faults == []


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the site, to damage."""

    def copy() -> Path:
        shutil.copytree(made.folder, tmp_path / "copy")
        return tmp_path / "copy"

    return copy
