"""What the model says a step takes on an H100: written by `python -m tests.gpu.model --write`, not measured."""

from __future__ import annotations

import json
from pathlib import Path

BUDGETS = Path(__file__).resolve().parents[2] / "gpu" / "budgets.json"


def predicted() -> dict[str, float]:
    """Shape -> milliseconds of a step, where the model knows the shape."""
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    return {name: shape["milliseconds"] for name, shape in budgets.items() if "milliseconds" in shape}
