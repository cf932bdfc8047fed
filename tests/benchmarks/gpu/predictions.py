"""What the model says a step takes on an H100, by shape: of `python -m tests.gpu.model`. Not measured on a device."""

from __future__ import annotations

PREDICTED: dict[str, dict[str, float]] = {}
"""Shape -> milliseconds of the step."""
