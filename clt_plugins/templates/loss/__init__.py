"""The loss `example`: penalise the square of the features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Forward


@frozen(kw_only=True)
class ExampleConfig:
    """Mean over tokens of the sum of squared features."""

    weight: float = field(default=1e-3, validator=validators.ge(0))
    """Multiplies the term."""


class Example:
    needs_pre = False  # whether `forward.pre`, all pre-activations, is wanted: it costs memory

    def __init__(self, config: ExampleConfig, context: Context):
        self.weight = config.weight

    def selection(self, tokens: int, idle_tokens: Any) -> None:
        return None  # features besides those of the activation: none

    def __call__(self, forward: Forward) -> dict[str, Any]:
        # Features may be split over ranks: a sum over features goes through `sum_features`.
        total = forward.sum_features(forward.features.values.square().sum())
        return {"example": self.weight * total / forward.features.shape[0]}


@hookimpl
def clt_losses() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
