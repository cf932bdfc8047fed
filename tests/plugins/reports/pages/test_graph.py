"""The page of an attribution graph."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.support.sites import Made

pytestmark = pytest.mark.browser


def test_a_graph_is_drawn_pruned_and_walked_through(made: Made, opened: Any) -> None:
    page = opened(made.folder)
    page.keyboard.press("g")
    page.get_by_role("link", name="main").click()
    page.wait_for_selector("[data-node]")
    links = sorted(made.graph["links"], key=lambda link: -abs(link["weight"]))

    def drawn() -> int:
        paths = page.locator(".links:not(.own) path").evaluate_all("all => all.map((one) => one.getAttribute('d'))")
        return sum(path.count("M") for path in paths)

    def draws(expected: int) -> None:
        """So many links come to be drawn; a browser draws a little after a key."""
        end = time.monotonic() + 5
        while drawn() != expected and time.monotonic() < end:
            page.wait_for_timeout(20)
        assert drawn() == expected

    slider = page.get_by_label("Links shown")
    slider.focus()
    page.keyboard.press("End")
    draws(len(links))
    always = {node["node_id"] for node in made.graph["nodes"] if node["feature_type"] in ("embedding", "logit")}
    ends = {name for link in links for name in (link["source"], link["target"])}
    assert page.locator("[data-node]").count() == len(ends | always)
    slider.fill("0.5")
    kept = round(len(links) ** 0.5)
    draws(kept)
    ends = {name for link in links[:kept] for name in (link["source"], link["target"])}
    assert page.locator("[data-node]").count() == len(ends | always)

    # The keyboard: one stop for Tab, arrows between nodes, Enter chooses.
    assert page.locator("[data-node][tabindex='0']").count() == 1
    strongest = links[0]["target"]
    number = [node["node_id"] for node in made.graph["nodes"]].index(strongest)
    page.locator(f"[data-node='{number}']").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    page.locator(f"[data-node='{number}']").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"[data-node='{number}'][aria-pressed='true']")
    detail = page.locator(".detail")
    into = [link for link in links if link["target"] == strongest]
    rows = detail.locator("table.ends").first.locator("tbody tr")
    rows.first.wait_for()
    assert rows.count() == min(12, len(into))


def test_a_node_shows_its_features_contexts_and_leads_to_its_page(made: Made, opened: Any) -> None:
    page = opened(made.folder, "#/graph/main")
    layer, feature, _ = next(
        node["node_id"] for node in made.graph["nodes"] if node["feature_type"] == "cross layer transcoder"
    ).split("_")
    page.locator("#prune").fill("1")
    page.locator(f"[data-node][aria-label^='{layer}/{feature} ']").first.click()
    page.wait_for_selector(".detail h2")
    examples = made.collected.examples(int(layer), int(feature))
    if examples.top:
        page.wait_for_selector(".detail .context")
        assert page.locator(".detail .context").count() == len(examples.top)
    assert "<i>group</i>" in page.locator(".detail").inner_text()
    page.get_by_role("link", name=f"Open feature {layer}/{feature}").click()
    page.wait_for_selector(f"h1:has-text('Feature {layer}/{feature}')")
