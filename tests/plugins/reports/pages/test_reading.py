"""What a reader does: searches, opens features, moves by keyboard, changes the theme, labels. All of it from disk."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.pages import until
from tests.support.sites import Made

pytestmark = pytest.mark.browser

ROWS = "[role=row].gridrow"


def listed(page: Any) -> list[str]:
    """Names of the features that the list shows, in order."""
    page.wait_for_selector(ROWS)
    rows = "rows => rows.sort((a, b) => a.ariaRowIndex - b.ariaRowIndex).map(row => row.querySelector('a').textContent)"
    return page.locator(ROWS).evaluate_all(rows)


def shows(page: Any, expected: list[str], part: slice = slice(None)) -> None:
    """The list comes to show these names, or a part of it does; a browser draws a little after a key or a click."""
    end = time.monotonic() + 5
    while listed(page)[part] != expected and time.monotonic() < end:
        page.wait_for_timeout(20)
    assert listed(page)[part] == expected


def with_token(made: Made, text: str) -> set[str]:
    """Features one of whose strongest contexts peaks at a token that begins with `text`."""
    found = set()
    for layer in range(made.collected.info.n_layers):
        rows = made.collected.layer(layer)["top_row"]
        for feature, row in zip(*np.nonzero(rows >= 0), strict=True):
            token = int(made.collected.ids[rows[feature, row]])
            if made.collected.spell([token])[0].decode("utf-8", "replace").strip().lower().startswith(text):
                found.add(f"{layer}/{feature}")
    return found


def test_a_token_is_searched_and_a_feature_opened(made: Made, opened: Any) -> None:
    page = opened(made.folder)
    page.keyboard.press("/")
    page.wait_for_selector("#token:focus")
    page.keyboard.type("Word42")  # case does not matter
    expected = with_token(made, "word42")
    until(page, "n => document.querySelector('.count').textContent.startsWith(n + ' ')", arg=str(len(expected)))
    assert set(listed(page)) <= expected and expected
    first = listed(page)[0]
    page.locator(ROWS).first.click()
    page.wait_for_selector(".context")
    assert page.locator("h1").inner_text() == f"Feature {first}"
    page.go_back()
    shows(page, [first], slice(1))  # the list is as it was


def test_the_list_is_sorted_and_filtered_as_its_columns_say(made: Made, opened: Any) -> None:
    columns = [made.collected.layer(layer) for layer in range(3)]
    density = np.concatenate([one["active"] for one in columns]) / made.collected.info.tokens
    maximum = np.concatenate([one["maximum"] for one in columns])
    norm = np.concatenate([np.sqrt((one["norms"].astype(np.float64) ** 2).sum(1)) for one in columns])
    names = np.array([f"{layer}/{feature}" for layer in range(3) for feature in range(300)])
    page = opened(made.folder, "#/features")
    for title, column in (("Maximum", maximum), ("Density", density), ("Norm", norm)):
        order = np.argsort(-column, kind="stable")
        page.get_by_role("columnheader").get_by_text(title).click()
        shows(page, names[order][:12].tolist(), slice(12))
        page.get_by_role("columnheader").get_by_text(title).click()
        shows(page, names[np.argsort(column, kind="stable")][:12].tolist(), slice(12))
    page.get_by_label("Layer").select_option("1")
    page.get_by_label("Density (%), at least").fill("0.5")
    page.get_by_label("Decoder norm, at most").fill("1.5")
    kept = (np.arange(900) // 300 == 1) & (density >= 0.005) & (norm <= 1.5)
    until(page, "n => document.querySelector('.count').textContent.startsWith(n + ' ')", arg=str(kept.sum()))
    assert set(listed(page)) <= set(names[kept])


def test_everything_can_be_done_by_keyboard(made: Made, opened: Any) -> None:
    page = opened(made.folder)
    page.keyboard.press("f")
    page.wait_for_selector(ROWS)
    page.get_by_role("grid").focus()
    page.keyboard.press("End")
    shows(page, ["2/299"], slice(-1, None))
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector(".context")
    # A new page begins at its heading. Who waits for that is answered by the keys of the new page.
    page.wait_for_selector("h1:has-text('Feature 0/3'):focus")
    page.keyboard.press("j")
    page.wait_for_selector("h1:has-text('Feature 0/4'):focus")
    page.wait_for_selector(".context")
    page.keyboard.press("k")
    page.wait_for_selector("h1:has-text('Feature 0/3'):focus")
    page.wait_for_selector(".context")
    page.keyboard.press("l")
    page.wait_for_selector("input:focus")
    page.keyboard.type("jk?")  # letters in a field are letters
    assert page.get_by_label("Label", exact=True).input_value() == "jk?"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.get_by_label("Single letters are shortcuts").uncheck()
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.keyboard.press("r")
    # A shortcut changes the address at once, and the page later.
    assert page.evaluate("location.hash") == "#/feature/0/3", "shortcuts are switched off"


def test_values_stand_at_tokens_on_hover_and_on_focus(made: Made, opened: Any) -> None:
    examples = made.collected.examples(1, 7)
    page = opened(made.folder, "#/feature/1/7")
    context = page.locator(".context").first
    peak = context.locator(".token.peak")
    peak.hover()
    assert page.locator("#tip").inner_text().splitlines()[0] == f"value {examples.top[0].value:.9g}"
    page.mouse.move(0, 0)
    page.wait_for_selector("#tip", state="hidden")
    peak.focus()
    page.wait_for_selector("#tip")
    page.keyboard.press("ArrowRight")
    described = page.evaluate("document.activeElement.getAttribute('aria-describedby')")
    assert described == "tip"
    assert page.evaluate("document.activeElement.dataset.piece") == str(int(peak.get_attribute("data-piece")) + 1)
    page.keyboard.press("Escape")
    page.wait_for_selector("#tip", state="hidden")


SHOWN = """async ([layer, feature, count]) => {
    location.hash = `#/feature/${layer}/${feature}`;
    const title = `Feature ${layer}/${feature}`;
    const there = () => document.querySelector("h1").textContent === title && document.querySelector(".main .facts");
    const contexts = () => [...document.querySelectorAll(".main .context")];
    for (let tries = 0; !(there() && contexts().length === count); tries++) {
        if (tries > 2000) throw new Error(`${title}: ${contexts().length} contexts, not ${count}`);
        await new Promise((then) => setTimeout(then, 4));
    }
    return contexts().map((context) => ({
        value: context.querySelector(".value").textContent.trim(),
        tokens: [...context.querySelectorAll(".token")].map((token) => [
            token.textContent,
            Number(token.style.getPropertyValue("--share")),
        ]),
    }));
}"""
"""Opens a feature's page, and reads its contexts: value, tokens as text, and the share by which each is shaded."""


def test_a_hundred_features_have_the_contexts_and_values_of_the_store(made: Made, opened: Any) -> None:
    draw = random.Random(0)
    page = opened(made.folder, "#/feature/0/0")
    plain = range(22, 200)  # ids of tokens that are words; hostile ones have their own test
    compared = 0
    for _ in range(100):
        layer, feature = draw.randrange(3), draw.randrange(300)
        examples = made.collected.examples(layer, feature)
        expected = [*examples.top, *(one for group in examples.groups for one in group)]
        contexts = page.evaluate(SHOWN, [layer, feature, len(expected)])
        for context, example in zip(contexts, expected, strict=True):
            assert float(context["value"].replace(",", "")) == pytest.approx(example.value, rel=6e-3)
            ids = made.collected.ids[example.start : example.stop]
            if not all(int(one) in plain for one in ids):
                continue
            compared += 1
            texts = [one.decode() for one in made.collected.spell(int(one) for one in ids)]
            assert [text for text, _ in context["tokens"]] == texts
            shares = np.array(example.values) / made.collected.layer(layer)["maximum"][feature]
            assert np.allclose([share for _, share in context["tokens"]], shares, atol=6e-4)
    assert compared > 50


def test_the_whole_context_opens_on_a_click(made: Made, opened: Any) -> None:
    page = opened(made.folder, "#/feature/0/7")
    example = made.collected.examples(0, 7).top[0]
    context = page.locator(".context").first
    context.locator(".token").first.wait_for()  # a page has its title before its examples
    before = context.locator(".token").count()
    context.locator(".tokens").click(position={"x": 3, "y": 5})
    context.locator("[aria-expanded=true]").wait_for()
    after = context.locator(".token").count()
    whole = int((made.collected.text.context == made.collected.text.context[example.row]).sum())
    assert before < after <= whole
    assert context.get_by_role("button").get_attribute("aria-expanded") == "true"
    context.get_by_role("button").click()
    context.locator("[aria-expanded=false]").wait_for()
    assert context.locator(".token").count() == before


def test_the_theme_is_the_systems_until_one_is_chosen_which_is_kept(made: Made, opened: Any) -> None:
    page = opened(made.folder, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.keyboard.press("t")
    until(page, f"{ground} !== '{dark}'")
    light = page.evaluate(ground)
    page.reload()
    assert page.evaluate(ground) == light
    page.get_by_label("Theme").select_option("auto")
    until(page, f"{ground} === '{dark}'")


def test_labels_are_kept_exported_and_imported(made: Made, opened: Any, tmp_path: Path) -> None:
    markup = "<img src=x onerror=alert(1)>"
    page = opened(made.folder, "#/feature/1/5")
    page.get_by_label("Label", exact=True).fill(markup)
    page.get_by_label("Note").fill("line one\n</script>")
    assert page.locator("h1 .label").inner_text() == markup
    page.reload()
    assert page.get_by_label("Label", exact=True).input_value() == markup
    page.keyboard.press("f")
    page.get_by_label("Label or note").fill("ONERROR")
    page.wait_for_selector(".count:has-text('1 feature')")
    shows(page, ["1/5"])
    assert markup in page.locator(ROWS).inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    download.value.save_as(tmp_path / "labels.json")
    written = json.loads((tmp_path / "labels.json").read_text())
    assert written["features"] == [{"layer": 1, "feature": 5, "label": markup, "note": "line one\n</script>"}]

    other = opened(made.folder, "#/features")  # another browser: it knows no labels
    assert other.locator(".labelfiles").inner_text().startswith("0 labels")
    written["features"].append({"layer": 99, "feature": 0, "label": "", "note": ""})
    (tmp_path / "bad.json").write_text(json.dumps(written))
    other.get_by_label("Import").set_input_files(tmp_path / "bad.json")
    other.wait_for_selector("text=Entry 2 is no label")
    assert other.locator(".labelfiles").inner_text().startswith("0 labels")
    other.get_by_label("Import").set_input_files(tmp_path / "labels.json")
    other.wait_for_selector("text=1 imported")
    assert other.locator(".labelfiles").inner_text().startswith("1 label in")
