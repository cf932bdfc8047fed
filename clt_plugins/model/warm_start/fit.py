"""Which layers and features of a new transcoder those of an earlier one are.

Shapes: L layers, F features per layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.errors import Fault, Faults

if TYPE_CHECKING:
    from clt_plugins.model.transcoder import CrossLayerTranscoder

FROM = ("transcoder", "from")


@attrs.frozen
class Fit:
    """How an earlier transcoder stands in a new one."""

    layers: list[int]
    """The new number of each of its layers, ascending."""
    n_layers: int
    """L of the new transcoder."""
    old_features: int
    """F of the earlier one: they are the first of each layer."""
    n_features: int
    """F of the new one."""

    @property
    def adds_layers(self) -> bool:
        return len(self.layers) < self.n_layers

    @property
    def widens(self) -> bool:
        return self.n_features > self.old_features


def fit(new: CrossLayerTranscoder, old: CrossLayerTranscoder) -> Fit:
    """Compare two transcoders.

    Raises:
        Faults: the new one has another d_model, fewer features, or lacks layers of the earlier one.
    """
    faults = []
    if new.d_model != old.d_model:
        text = (
            f"d_model is {old.d_model} there and {new.d_model} here: only a model of the same width can go on from it"
        )
        faults.append(Fault(FROM, text))
    if new.n_features < old.n_features:
        text = f"there are {old.n_features} features per layer in transcoder.from: give as many, or more"
        faults.append(Fault(("transcoder", "features"), text))
    mine, others = _numbers(new.model_described(), new.n_layers), _numbers(old.model_described(), old.n_layers)
    if not set(others) <= set(mine):
        text = f"it has layers {others} of the language model, and this run {mine}: layers can be added, not removed"
        faults.append(Fault(FROM, text))
    if faults:
        raise Faults(faults)
    return Fit([mine.index(number) for number in others], new.n_layers, old.n_features, new.n_features)


def _numbers(model: dict[str, Any], n_layers: int) -> list[int]:
    """The numbers of the layers in the language model, from 0 where it is not known."""
    numbers = model.get("layers")
    return list(numbers) if numbers and len(numbers) == n_layers else list(range(n_layers))
