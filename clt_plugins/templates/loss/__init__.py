"""The loss `example`: a penalty on the square of the features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins import Context, Forward


@frozen(kw_only=True)
class ExampleConfig:
    """Mean over tokens of the sum of squared features."""

    weight: float = field(default=1e-3, validator=validators.ge(0))
    """Multiplies the term."""


class Example:
    """A `Loss`. A loss with parameters would also be a `torch.nn.Module`: they are trained and saved."""

    needs_pre = False
    """True would keep all pre-activations in memory, as `forward.pre` [B, L, F]."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.weight = config.weight

    def selection(self, tokens: int, idle_tokens: Tensor) -> None:
        """None: it needs no pre-activations besides those that the activation keeps."""

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        """The term by name, a scalar: a mean over this rank's tokens."""
        # Features may be split over ranks: a sum over features goes through `sum_features`.
        total = forward.sum_features(forward.features.values.square().sum())
        return {"example": self.weight * total / forward.features.shape[0]}


@hookimpl
def clt_losses() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
