"""`norm_stats.json`: the mean and the standard deviation of each dimension, by layer and side.

    {"0": {"inputs": {"mean": [D numbers], "std": [D numbers]}, "targets": {...}}, "1": ...}

The library stores deviations over n - 1 rows, and divides by std + EPSILON.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clt_plugins import Refused, load_json

EPSILON = 1e-6
"""What the library adds to standard deviations before it divides by them."""
SIDES = ("inputs", "targets")


def read_statistics(path: Path, n_layers: int, d_model: int) -> dict[str, Tensor]:
    """`inputs.mean`, `inputs.std`, `targets.mean` and `targets.std`, each [L, D] in float64.

    Raises:
        Refused: the file is missing or not JSON; numbers are missing, or not finite, or deviations are negative.
    """
    table = load_json(path)
    statistics: dict[str, Tensor] = {}
    for side in SIDES:
        for kind in ("mean", "std"):
            try:
                rows = [table[str(layer)][side][kind] for layer in range(n_layers)]
                statistics[f"{side}.{kind}"] = torch.tensor(rows, dtype=torch.float64).view(n_layers, d_model)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise Refused(path, f"{side}.{kind} must be {d_model} numbers for each of {n_layers} layers") from error
            _check(path, f"{side}.{kind}", statistics[f"{side}.{kind}"])
    return statistics


def _check(path: Path, name: str, values: torch.Tensor) -> None:
    """Refuse numbers that no activations have: they would be divided by, or subtracted."""
    for layer, row in enumerate(values):
        if not bool(torch.isfinite(row).all()):
            raise Refused(path, f"{name} of layer {layer} is NaN or infinite")
        # An exported deviation of 0 may have become a little less than 0: see `write_statistics`.
        if name.endswith(".std") and bool((row < -EPSILON).any()):
            raise Refused(path, f"{name} of layer {layer} is negative")


def write_statistics(path: Path, means: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
    """Write the statistics of activations that are normalised as (x - mean) / scale.

    Args:
        means, scales: for "inputs" and "targets", each [L, D].
    """
    n_layers = len(means["inputs"])
    table = {
        str(layer): {
            side: {
                "mean": means[side][layer].tolist(),
                "std": (scales[side][layer].double() - EPSILON).tolist(),
            }
            for side in SIDES
        }
        for layer in range(n_layers)
    }
    path.write_text(json.dumps(table) + "\n")
