"""The figures of a GPU for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.gpu.predictions import predicted


def table(figures: Mapping[str, Any]) -> str:
    """Lines of text: the machine, what is right, then times in ms beside those of the model."""
    lines = ["  ".join(f"{key} {value}" for key, value in figures["machine"].items()), ""]
    for name, value in figures.items():
        if name in ("machine", "seconds"):
            continue
        if isinstance(value, str):
            lines.append(f"{name}: {value}")
        elif name == "ceilings":
            lines.append("ceilings: " + ", ".join(f"{key} {number / 1e12:.2f}e12" for key, number in value.items()))
        elif name in ("kernels", "selection"):
            lines.append(f"{name}: {value['passed']} right, {len(value['failed'])} wrong")
            lines += [f"    {text}" for text in value["failed"]]
        elif name == "steps":
            lines += _steps(value)
        elif name.startswith("shapes: "):
            lines += _shape(name.removeprefix("shapes: "), value)
        elif name == "peers":
            lines.append("peers (12 x 768, F 3,072, B 2,048, k 200):")
            lines += [f"    {peer}: {_peer(result)}" for peer, result in value.items()]
        else:
            lines.append(f"{name}: " + ", ".join(f"{key} {number:.4g}" for key, number in value.items()))
    lines.append("seconds: " + ", ".join(f"{key} {value}" for key, value in figures.get("seconds", {}).items()))
    return "\n".join(lines)


def _steps(value: Mapping[str, Any]) -> list[str]:
    lines = ["steps:"]
    for name, result in value.items():
        words = [
            f"worst difference from the CPU {result['worst_difference_from_cpu']:.1e}",
            "two runs equal" if result["two_runs_equal"] else "TWO RUNS DIFFER",
            f"{len(result['waits'])} places wait" if result["waits"] else "no waits",
        ]
        if not result["as_the_cpu"]:
            words[0] += " (TOO LARGE)"
        lines.append(f"    {name}: {', '.join(words)}")
        lines += [f"        waits at {place}" for place in result["waits"]]
    return lines


def _shape(name: str, value: Mapping[str, Any]) -> list[str]:
    head = f"{name}: {value['step_ms']:.2f} ms a step"
    if name in predicted():
        head += f" (model {predicted()[name]:.1f})"
    head += f", {value['tokens_per_s']:,.0f} tokens/s, plan {value['planned_bytes'] / 1e9:.2f} GB"
    if "peak_bytes" in value:
        head += f", peak {value['peak_bytes'] / 1e9:.2f} GB"
    return [head, *(f"    {piece:<18}{spent:9.3f} ms" for piece, spent in value["pieces_ms"].items())]


def _peer(result: Any) -> str:
    return result if isinstance(result, str) else f"{result['step_ms']:.2f} ms a step"
