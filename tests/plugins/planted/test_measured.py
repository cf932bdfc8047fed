"""What the guide says of planted models is what was measured."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.support.tables import MEASUREMENTS, ROOT


def runs(**chosen: str) -> list[dict[str, Any]]:
    record = json.loads((MEASUREMENTS / "planted.json").read_text(encoding="utf-8"))
    return [one for one in record["runs"] if all(one[name] == value for name, value in chosen.items())]


def test_the_default_recipe_recovers_every_feature_of_the_easy_model() -> None:
    found = runs(kind="easy", tying="untied", penalty="batchtopk")
    assert sorted(one["seed"] for one in found) == [0, 1, 2]
    assert all(one["mcc"] >= 0.95 and one["recovered"] == 1 for one in found)


def test_the_guide_states_the_share_of_hops_that_is_rewritten() -> None:
    by_penalty: dict[str, list[float]] = {}
    for one in runs(kind="boolean", tying="untied"):
        by_penalty.setdefault(one["penalty"], []).append(one["rewritten"])
    means = [sum(values) / len(values) for values in by_penalty.values()]
    text = (ROOT / "examples" / "guides" / "faithfulness.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"between (\d+) and (\d+) % of what it writes of C", text)
    assert stated == (f"{100 * min(means):.0f}", f"{100 * max(means):.0f}")
    per_layer = runs(kind="boolean", tying="per_layer")
    assert per_layer and all(one["rewritten"] == 0 for one in per_layer)
