"""A feature as circuit-tracer's page and Neuronpedia's graph page read it: one JSON object.

Its keys come from the page of Ameisen et al. (2025), which circuit-tracer ships. Neuronpedia asks for `index` and
`examples_quantiles` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clt_plugins import Collected, FeatureExample

Array = np.ndarray[Any, np.dtype[Any]]

PERCENTS = np.arange(1, 101)


class Example(TypedDict):
    """A text in which the feature is active."""

    tokens: list[str]
    """See `escaped`."""
    tokens_acts_list: list[float]
    """The feature's value at each of them."""
    train_token_ind: int
    """Which of the tokens the example was chosen for; it stands in the middle of the line."""
    is_repeated_datapoint: bool
    """Whether the same token is an example further up; it is shown pale."""


class Quantile(TypedDict):
    """A group of examples."""

    quantile_name: str
    """The heading above it."""
    examples: list[Example]
    """The largest value first."""


class Feature(TypedDict):
    """All that the page shows of a feature."""

    transcoder_id: str
    """Which transcoder it is of."""
    index: int
    """Its number in its layer."""
    examples_quantiles: list[Quantile]
    """The strongest examples, then the groups from the strongest to the weakest."""
    top_logits: list[str]
    """Tokens that all of its decoder rows together raise most."""
    bottom_logits: list[str]
    """Tokens that they lower most."""
    act_min: float
    """Its smallest active value: the lightest shade, and the left end of the histogram."""
    act_max: float
    """Its largest value: the darkest shade, and the right end."""
    quantile_values: list[float]
    """Percentile 1, 2, ... 100 of its active values."""
    histogram: list[float]
    """How many active values are in each of so many bins of equal width from `act_min` to `act_max`."""
    activation_frequency: float
    """The share of tokens at which it is active."""


class Features:
    """The features of a store.

    Args:
        name: of the transcoder.
        bins: of each histogram.
    """

    def __init__(self, collected: Collected, name: str, bins: int):
        self.collected, self.name, self.bins = collected, name, bins
        tokens = collected.vocabulary.token.tolist()
        self._text = dict(zip(tokens, map(escaped, collected.spell(tokens)), strict=True))

    def feature(self, layer: int, feature: int) -> Feature:
        """One of them."""
        arrays = self.collected.layer(layer)
        low, high = float(arrays["minimum"][feature]), float(arrays["maximum"][feature])
        counts = arrays["histogram"][feature]
        logits = [self._logits(arrays, name, feature) for name in ("logits_up_id", "logits_down_id")]
        return Feature(
            transcoder_id=f"{self.name}/layer_{layer}",
            index=feature,
            examples_quantiles=self._quantiles(layer, feature, arrays["group_edge"][feature]),
            top_logits=logits[0],
            bottom_logits=logits[1],
            act_min=exact([low])[0],
            act_max=exact([high])[0],
            quantile_values=percentiles(counts, self.collected.info.edges, low, high),
            histogram=even_bins(counts, self.collected.info.edges, low, high, self.bins),
            activation_frequency=int(arrays["active"][feature]) / max(1, self.collected.info.tokens),
        )

    def _logits(self, arrays: dict[str, Array], name: str, feature: int) -> list[str]:
        """The tokens of the last row, which is the sum of all; none without a language model."""
        return (
            [self._text[token] for token in arrays[name][feature, -1].tolist() if token >= 0] if name in arrays else []
        )

    def _quantiles(self, layer: int, feature: int, edges: Array) -> list[Quantile]:
        examples = self.collected.examples(layer, feature)
        groups = [("Top", examples.top)]
        for number, group in enumerate(examples.groups):
            name = f"{number + 1}/{len(examples.groups)}: {edges[number]:.3g} to {edges[number + 1]:.3g}"
            groups.append((name, group))
        seen: set[int] = set()
        quantiles = []
        for name, group in groups:
            if group:
                quantiles.append(Quantile(quantile_name=name, examples=[self._example(one, seen) for one in group]))
        return quantiles

    def _example(self, example: FeatureExample, seen: set[int]) -> Example:
        repeated = example.row in seen
        seen.add(example.row)
        return Example(
            tokens=[self._text[token] for token in self.collected.ids[example.start : example.stop].tolist()],
            tokens_acts_list=exact(example.values.tolist()),
            train_token_ind=example.row - example.start,
            is_repeated_datapoint=repeated,
        )


def escaped(piece: bytes) -> str:
    """A token's text as the page wants it: bytes that are no characters by themselves, such as a part of an emoji, are
    written `\\xf0`; the page puts those of neighbours together. A token that spells such an escape keeps it as text."""
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(chr(byte) if byte < 128 and byte != 92 else f"\\x{byte:02x}" for byte in piece)
    return text.replace("\\x", "\\x5cx")


def exact(values: Iterable[float]) -> list[float]:
    """float32 values with as few digits as give the same float32 again."""
    return [float(f"{value:.9g}") if value else 0.0 for value in values]


def _distribution(counts: Array, edges: list[float], low: float, high: float) -> tuple[Array, Array]:
    """The values at the ends of the store's bins, and how many active values are below each, [H + 1].

    Bins begin at the smallest value and end at the largest: the outer ones count all that is beyond their edges.
    """
    at = np.asarray(edges, np.float64)
    at = np.concatenate([[-np.inf], at[1:-1], [np.inf]]).clip(low, high)
    return at, np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)


def even_bins(counts: Array, edges: list[float], low: float, high: float, bins: int) -> list[float]:
    """Counts of bins of equal width from low to high, out of those of the store's bins: within one of those, values
    are taken to be spread evenly. Their sum stays the same.

    Args:
        counts: of the store's bins, [H].
        edges: theirs, [H + 1].
    """
    at, below = _distribution(counts, edges, low, high)
    if not high > low:  # one value, or none
        return [float(below[-1]), *[0.0] * (bins - 1)]
    return [round(count, 3) for count in np.diff(np.interp(np.linspace(low, high, bins + 1), at, below)).tolist()]


def percentiles(counts: Array, edges: list[float], low: float, high: float) -> list[float]:
    """Percentiles 1 to 100 of a feature's active values, as exact as the store's bins are narrow; [] if there are none.

    Args:
        counts: of the store's bins, [H].
        edges: theirs, [H + 1].
    """
    at, below = _distribution(counts, edges, low, high)
    if not below[-1]:
        return []
    return [float(f"{value:.6g}") for value in np.interp(PERCENTS / 100 * below[-1], below, at).tolist()]
