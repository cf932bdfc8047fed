"""The loss `jensen_shannon`: (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Lin 1991), nats per token.

p are the next-token probabilities of the unchanged model, q those with the transcoder in the place of its MLPs.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins import Context, Forward


@frozen(kw_only=True)
class JensenShannonConfig:
    """Jensen-Shannon divergence of the model with the transcoder from the unchanged one, nats per token."""

    weight: float = field(default=1.0, validator=validators.ge(0))
    """Multiplies the term."""
    contexts: int = field(default=4, validator=validators.gt(0))
    """Contexts of training text that the model reads in a step, of all data ranks together."""
    start: float = field(default=2 / 3, validator=[validators.ge(0), validators.lt(1)])
    """The share of the run without it: with 2/3 it acts in the last third."""


class JensenShannon:
    """A `Loss` that `RunsModel`."""

    needs_pre = False

    def __init__(self, config: JensenShannonConfig, context: Context):
        self.weight, self.contexts, self.start = config.weight, config.contexts, config.start

    def runs(self, step: int, progress: float) -> bool:
        return progress >= self.start

    def selection(self, tokens: int, idle_tokens: Tensor) -> None:
        """None: it needs no further pre-activations."""

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        if forward.model is None:
            return {}
        log_p, log_q = forward.model.unchanged.log_softmax(-1), forward.model.logits.log_softmax(-1)
        log_m = log_p.logaddexp(log_q) - log(2)
        twice = (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
        return {"jensen_shannon": self.weight * forward.model.mean(twice / 2)}


@hookimpl
def clt_losses() -> list[Spec]:
    return [Spec("jensen_shannon", JensenShannonConfig, JensenShannon)]
