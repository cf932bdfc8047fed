"""Everybody can read it: axe-core finds no serious fault on any page, in both themes, on a phone and on a laptop."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.pages import until
from tests.support.sites import Made

pytestmark = pytest.mark.browser

PAGES = {
    "run": ("#/", "A <em>run</em>", ".tiles"),
    "list": ("#/features?token=word4&sort=density", "Features", ".gridrow"),
    "feature": ("#/feature/1/7", "Feature 1/7", ".context"),
    "graphs": ("#/graphs", "Graphs", "table"),
    "graph": ("#/graph/main", "main", "[data-node]"),
    "nothing": ("#/nothing", "No such page", "main a"),
}
"""Route, heading, and what is there when the page is complete."""


@pytest.fixture(scope="module")
def axe() -> Any:
    return pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra 'browser'").Axe()


def shown(page: Any, heading: str, selector: str) -> None:
    """Wait until this page is drawn. What the page before it had is no sign: headings and tables are on most pages."""
    until(page, "heading => document.querySelector('h1')?.textContent.trim() === heading", arg=heading)
    page.wait_for_selector(selector)
    drawn(page)


def drawn(page: Any) -> None:
    """Wait until nothing is being loaded, and charts have the width of their columns."""
    until(page, "!document.querySelector('.loading')")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def serious(axe: Any, page: Any) -> list[str]:
    # Without preload: it would ask for the style sheets a second time, which nothing may from file://.
    # Two contexts of each group stand for all: colours of thousands of tokens take axe-core long.
    rest = {"exclude": [[".context:nth-child(n + 3)"]]}
    results = axe.run(page, context=rest, options={"resultTypes": ["violations"], "preload": False})
    assert results.response["passes"], "axe-core checked something"
    return [
        f"{fault['id']}: {node['target']} {node['html'][:150]} {[one['message'] for one in node['any']][:1]}"
        for fault in results.response["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"][:3]
    ]


@pytest.mark.parametrize(
    "theme, size", [("light", (1280, 800)), ("dark", (390, 844))], ids=["laptop, light", "phone, dark"]
)
def test_axe_finds_no_serious_fault(made: Made, opened: Any, axe: Any, theme: str, size: tuple[int, int]) -> None:
    faults = {}
    page = opened(made.folder, color_scheme=theme, viewport={"width": size[0], "height": size[1]})
    for name, (route, heading, selector) in PAGES.items():
        page.evaluate(f"location.hash = '{route}'")
        shown(page, heading, selector)
        if name == "graph":
            page.locator("[data-node]").nth(20).click()
            page.wait_for_selector("[data-node][aria-pressed='true']")
            page.wait_for_selector(".detail h2")
        if name == "run":
            page.get_by_text("Choose curves").click()
            page.wait_for_selector(".chooser")
        if name == "feature":
            page.locator(".token.peak").first.focus()
            page.wait_for_selector("#tip")
        drawn(page)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} is wider than the window, by {wide} pixels"
        faults[name] = serious(axe, page)
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    faults["help"] = serious(axe, page)
    assert {name: fault for name, fault in faults.items() if fault} == {}


def test_axe_would_find_a_fault(made: Made, opened: Any, axe: Any) -> None:
    page = opened(made.folder)
    shown(page, *PAGES["run"][1:])
    page.evaluate(
        "document.querySelector('main').style.color = document.querySelector('main').style.background = '#777'"
    )
    assert any(fault.startswith("color-contrast") for fault in serious(axe, page))


def test_pages_have_a_language_landmarks_one_heading_and_a_way_past_the_navigation(made: Made, opened: Any) -> None:
    page = opened(made.folder, "#/feature/1/7")
    shown(page, *PAGES["feature"][1:])
    assert page.locator("html").get_attribute("lang") == "en"
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() >= 1
    assert page.locator("h1").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    until(page, "document.activeElement.tagName === 'MAIN'")


def test_nothing_moves_for_readers_who_want_that(made: Made, opened: Any) -> None:
    page = opened(made.folder, reduced_motion="reduce")
    shown(page, *PAGES["run"][1:])
    times = page.locator("*").evaluate_all("all => all.flatMap((one) => getComputedStyle(one).transitionDuration)")
    assert {time for text in times for time in text.split(", ")} == {"0s"}


def test_the_focus_is_visible(made: Made, opened: Any) -> None:
    page = opened(made.folder, "#/feature/1/7")
    shown(page, *PAGES["feature"][1:])
    invisible = []
    for _ in range(25):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.outerHTML.slice(0, 80)")
        if page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "none":
            invisible.append(name)
    assert not invisible
