"""`norm_stats.json`: the mean and the standard deviation of each dimension, by layer and side.

    {"0": {"inputs": {"mean": [D numbers], "std": [D numbers]}, "targets": {...}}, "1": ...}

The library stores deviations over n - 1 rows, and divides by std + EPSILON.

Shapes: L layers, D d_model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt_plugins import Refused

EPSILON = 1e-6
"""What the library adds to standard deviations before it divides by them."""
SIDES = ("inputs", "targets")


def read_statistics(path: Path, n_layers: int, d_model: int) -> dict[str, Tensor]:
    """`inputs.mean`, `inputs.std`, `targets.mean` and `targets.std`, each [L, D] in float64.

    Raises:
        Refused: the file is missing or not JSON, or numbers are missing.
    """
    table = read_json(path)
    statistics: dict[str, Tensor] = {}
    for side in SIDES:
        for kind in ("mean", "std"):
            try:
                rows = [table[str(layer)][side][kind] for layer in range(n_layers)]
                statistics[f"{side}.{kind}"] = torch.tensor(rows, dtype=torch.float64).view(n_layers, d_model)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise Refused(path, f"{side}.{kind} must be {d_model} numbers for each of {n_layers} layers") from error
            numbers = statistics[f"{side}.{kind}"]
            wrong = ~torch.isfinite(numbers) | ((numbers < 0) & (kind == "std"))
            if bool(wrong.any()):
                layer, dimension = wrong.nonzero()[0].tolist()
                raise Refused(
                    path,
                    f"{side}.{kind} is {float(numbers[layer, dimension])} at layer {layer}, dimension {dimension}: "
                    "compute the statistics again",
                )
    return statistics


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


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        Refused: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(path, f"missing or not JSON: {error}") from error
