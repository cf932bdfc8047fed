"""Losses of the language model with the transcoder in the place of its MLPs.

Shapes: R positions that a next token follows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_losses.terms import Term
from clt_plugins import Forward

if TYPE_CHECKING:
    from clt_losses import CEConfig, KLConfig


class InModel(Term):
    """What both losses share: when they act, and on how much text."""

    def __init__(self, config: KLConfig | CEConfig):
        self.config = config
        self.contexts = config.contexts

    def runs(self, step: int, progress: float) -> bool:
        """Every so many steps, from a share of the run on."""
        return step % self.config.every == 0 and progress >= self.config.start


class KL(InModel):
    """KL(unchanged model || model with the transcoder), nats per token (arXiv 2503.17272)."""

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        if forward.model is None:
            return {}
        log_p, log_q = forward.model.unchanged.log_softmax(-1), forward.model.logits.log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return {"kl": self.config.weight * forward.model.mean(kl)}


class CE(InModel):
    """The cross-entropy of the next token in the model with the transcoder, nats per token."""

    def __call__(self, forward: Forward) -> dict[str, Tensor]:
        if forward.model is None:
            return {}
        model = forward.model
        entropy = torch.nn.functional.cross_entropy(model.logits, model.next_tokens, reduction="none")
        return {"ce": self.config.weight * model.mean(entropy)}
