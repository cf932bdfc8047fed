"""What is shown besides curves: pages of the custom scalars, settings for the comparison of runs, and a table.

Shapes: L layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import summary

GROUPS = ("evaluate", "eval", "train")
"""Groups of metrics that are about the same quantities; the first one that has a value is the best estimate."""
HELD_OUT = ("eval/", "evaluate/")
"""How the names of held-out metrics begin."""
TITLES = {
    "nmse": "NMSE",
    "explained_variance": "explained variance",
    "l0": "L0",
    "dead_fraction": "dead features",
    "dense_fraction": "dense features",
}


def layer_tag(name: str, layer: int) -> str:
    """The tag of one layer; with leading zeros, since TensorBoard sorts tags as text."""
    section = name.removesuffix("_by_layer").replace("/", "_")
    return f"{section}_by_layer/{layer:02}"


def layout(names: Sequence[str], n_layers: int) -> Any:
    """The pages of the dashboard "Custom scalars": one with all layers in each chart, and one for each layer.

    A chart is of one quantity, and has the curves of training and evaluation. Charts depend on nothing else, so that
    those of several runs become one.

    Args:
        names: of the metrics by layer that were logged.
    """
    sections: dict[str, str] = {}
    for name in names:
        one = quantity(name)
        if name.split("/")[0] in GROUPS:
            sections[TITLES.get(one, one)] = f"({'|'.join(GROUPS)})_{re.escape(one)}_by_layer"
        else:
            sections[name] = re.escape(layer_tag(name, 0).split("/")[0])

    def charts(layers: str) -> dict[str, tuple[str, list[str]]]:
        return {title: ("Multiline", [f"^{section}/{layers}$"]) for title, section in sections.items()}

    pages = {"all layers": charts(r"\d+")}
    return summary.custom_scalars(pages | {f"layer {layer:02}": charts(f"{layer:02}") for layer in range(n_layers)})


def quantity(name: str) -> str:
    """What a metric is about: `nmse` of `eval/nmse_by_layer`."""
    return name.split("/", 1)[-1].removesuffix("_by_layer")


def settings(recipe: Any, path: str = "") -> Iterator[tuple[str, int | float | str | bool]]:
    """A recipe's values by key, an item of a list by its name: `losses.mse.weight`. A list of values is one text."""
    if isinstance(recipe, Mapping):
        for key, value in recipe.items():
            yield from settings(value, f"{path}.{key}" if path else key)
    elif isinstance(recipe, list) and recipe and all(isinstance(item, Mapping) for item in recipe):
        seen: Counter[str] = Counter()
        for number, item in enumerate(recipe):
            name = str(item.get("name", number))
            again = f"[{seen[name]}]" if seen[name] else ""
            seen[name] += 1
            yield from settings(item, f"{path}.{name}{again}")
    else:
        yield path, recipe if isinstance(recipe, int | float | str) else str(recipe)


def best(values: Mapping[str, Any], ending: str) -> Any:
    """The value of the first group that has one with this ending; None if none has."""
    return next((values[name] for group in GROUPS if (name := f"{group}/{ending}") in values), None)


def table(numbers: Mapping[str, float], by_layer: Mapping[str, Tensor]) -> str:
    """The last held-out scores as Markdown: a row for each layer, one for all, then the other numbers."""
    held_out = {name: value for name, value in numbers.items() if name.startswith(HELD_OUT)}
    columns = [one for one in TITLES if best(held_out, one) is not None]
    lines = []
    if columns:
        values = {one: best(by_layer, f"{one}_by_layer") for one in columns}
        n_layers = max((len(each) for each in values.values() if each is not None), default=0)
        lines = [_row(["layer", *(TITLES[one] for one in columns)]), _row(["---", *("---:" for _ in columns)])]
        for layer in range(n_layers):
            cells = [
                _cell(one, None if values[one] is None or layer >= len(values[one]) else values[one][layer])
                for one in columns
            ]
            lines.append(_row([str(layer), *cells]))
        lines.append(_row(["all", *(_cell(one, best(held_out, one)) for one in columns)]))
    others = {name: value for name, value in held_out.items() if quantity(name) not in TITLES}
    if others:
        lines += ["", _row(["", ""]), _row(["---", "---:"])]
        lines += [_row([name, f"{value:.6g}"]) for name, value in others.items()]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(name: str, value: Any) -> str:
    if value is None or value != value:
        return "-"
    return f"{float(value):.2%}" if name.endswith("_fraction") else f"{float(value):.4g}"
