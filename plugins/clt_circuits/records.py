"""`circuits.json`: what circuit-tracer found, as the stage writes it."""

from __future__ import annotations

import attrs

from clt_plugins import Provenance, printable


@attrs.frozen(kw_only=True)
class Circuit:
    """The attribution graph of a prompt, before it is pruned."""

    slug: str
    """The name of its JSON file in `graphs/`."""
    prompt: str
    """The text that was traced."""
    tokens: int
    """Its tokens, with the special one that comes first."""
    logits: list[tuple[str, float]]
    """The next tokens that were attributed, with their probabilities."""
    active_features: int
    """Pairs of a position and a feature that is active there."""
    features: int
    """Those of them that the graph holds: at most `max_features`."""
    edges: int
    """Direct effects that are not 0."""
    replacement: float
    """The share of the influence on the logits that comes from tokens through features, not from errors: 0 to 1."""
    completeness: float
    """The share of inputs to nodes, weighted by each node's influence, that does not come from errors: 0 to 1."""
    pruned_features: int | None = None
    """Features that the JSON file keeps; None without one."""
    seconds: float
    """How long it took."""


@attrs.frozen(kw_only=True)
class Circuits:
    """How well circuit-tracer explains prompts with a transcoder; the content of `circuits.json`."""

    replacement: float
    """Mean over the prompts."""
    completeness: float
    """Mean over the prompts."""
    graphs: list[Circuit]
    """One for each prompt."""
    versions: dict[str, str | None]
    """Of circuit-tracer and what it ran on."""
    made_from: Provenance | None = None
    """The transcoder, and the settings."""


def as_table(record: Circuits) -> str:
    """The scores for people."""
    lines = [f"circuit-tracer {record.versions.get('circuit-tracer')}, {len(record.graphs)} prompts"]
    lines.append(f"{'replacement':>11} {'completeness':>12} {'features':>8} {'edges':>10} {'tokens':>6}  prompt")
    for graph in record.graphs:
        shown = " ".join(graph.prompt.split())
        shown = shown if len(shown) <= 50 else f"{shown[:47]}..."
        scores = f"{graph.replacement:11.4f} {graph.completeness:12.4f}"
        lines.append(f"{scores} {graph.features:8,} {graph.edges:10,} {graph.tokens:6}  {shown}")
    lines.append(f"{record.replacement:11.4f} {record.completeness:12.4f}{'':>28}mean")
    return "\n".join(map(printable, lines))
