"""`collected.json`: what a store was collected from, and how."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from clt_plugins.files.records import FORMAT
from clt_plugins.finished.provenance import Provenance

RECORD = "collected.json"


@attrs.frozen(kw_only=True)
class CollectionSettings:
    """How examples were chosen."""

    text: Literal["held_out", "training"] = "held_out"
    """Which text was read."""
    seed: int = 0
    """What random samples were drawn with."""
    top: int = 0
    """K: the strongest examples of each feature."""
    groups: int = 0
    """Q: the active values of each feature, sorted, are cut into so many groups of equal size."""
    per_group: int = 0
    """E: examples that are drawn from each group."""
    window: int = 0
    """W: the feature's values are kept at so many tokens before and after each example."""
    distinct: int | None = None
    """Of examples whose tokens are equal up to so many before and after, one is kept in the top and in each group;
    None: all are."""
    coactive: int = 0
    """N: co-active features of each feature."""
    coactive_tokens: int = 0
    """Co-activity is measured at so many of the tokens at which a feature is active; at all if it has fewer."""


@attrs.frozen(kw_only=True)
class GeometryInfo:
    """What was computed from the weights alone."""

    similar: int = 0
    """S: similar features of each feature."""
    virtual: int = 0
    """V: upstream and downstream features of each feature."""
    logits: int = 0
    """G: the tokens that each row raises most, and as many that it lowers most; 0 without a language model."""


@attrs.frozen(kw_only=True)
class CollectionInfo:
    """What a store holds; the content of `collected.json`."""

    format: int = FORMAT
    """The version of the store's files."""
    tokens: int
    """T: tokens that were read."""
    contexts: int
    """Contexts that they are in."""
    n_layers: int
    """L."""
    d_model: int
    """D."""
    n_features: int
    """F, per layer."""
    settings: CollectionSettings
    """How examples were chosen."""
    edges: list[float]
    """Edges of the histograms' bins, [H + 1], ascending. The first bin also counts values below it."""
    activation: str
    """The activation's name."""
    thresholds: bool = False
    """Whether the activation has thresholds, which are then in the store."""
    spelled: bool = False
    """Whether the source has spelled the tokens. If not, the text of token 17 is `<17>`."""
    model: dict[str, Any] | None = None
    """The language model, as a recipe's [model] describes it; None if it is not known."""
    geometry: GeometryInfo | None = None
    """What was computed from the weights; None if nothing was."""
    made_from: Provenance | None = None
    """The transcoder and the settings; None in stores of tests."""
