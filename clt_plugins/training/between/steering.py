"""Steers L0 to what the activation aims at: by the weight of penalties, and by thresholds where there are some.

From L0 in steps up to t, for step t + 1:

    s = s + (log L0 - s) / SMOOTH                    a mean over a few steps; log L0 in the first
    e = s - log target                               within ± NEAR
    d = d + (log L0 - log target) / DRIFT            while the difference is within ± NEAR, and only for an activation
                                                     that has thresholds to move
    i = i + (e + d) GAIN / (INTEGRAL steps)          with e + d within ± NEAR
    factor = exp(GAIN e + i)                         of the penalties
    log L0 - log target + d                          what the activation is told, to correct L0 itself (`Follows`)

Weights act slowly. What they decide is the direction in which the optimizer moves thresholds and encoder, by the
learning rate: so most of their control is proportional, which brakes in time, and the integral finds the weight that
keeps L0 where it is. Logarithms, because suitable weights differ by orders of magnitude, and because L0 falls by a
factor.

An activation that moves its thresholds keeps L0 in a few steps, exactly. Then e is about 0, and d says how fast
gradients would let L0 grow: the weight rises until they do not, so that in the end thresholds are where gradients leave
them.

All of it is arithmetic of scalars on the device: no number is read back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins.contract.model.activation import AimsAtL0, Follows
from clt_plugins.contract.training.loss import Steered
from clt_plugins.errors import Refused

if TYPE_CHECKING:
    from clt_plugins.model.assemble import Parts

SMOOTH = 3.0
"""Steps that L0 is averaged over."""
GAIN = 6.0
"""How much the logarithm of the factor rises with that of L0."""
INTEGRAL = 0.2
"""The share of a run after which an error that stays has counted twice."""
DRIFT = 10.0
"""Steps after which an error of L0 that stays has counted twice for thresholds."""
NEAR = 0.5
"""The largest error that counts: L0 may be far away at the beginning, and a weight that jumps would undo what features
have learned."""


class Steering:
    """What leads a run to its L0. Every rank computes the same numbers.

    Args:
        steps: that schedules go over.
        state: of a checkpoint: what `state` was.
    """

    def __init__(self, parts: Parts, steps: int, state: Tensor | None = None):
        activation = parts.transcoder.activation
        assert isinstance(activation, AimsAtL0)
        self.activation, self.parallel, self.steps = activation, parts.context.parallel, steps
        self.penalised = any(isinstance(loss, Steered) and loss.steered for loss in parts.losses)
        self.begun = state is not None
        zeros = torch.zeros(4, dtype=torch.float64, device=parts.context.device)
        self.state = zeros if state is None else state.to(zeros)
        """[s, d, i, log factor] float64."""
        self.target = 0.0
        """Of the last step."""
        self.used = self.factor()
        """The factor in the last step."""

    def factor(self) -> Tensor:
        """What steered terms are multiplied by in the next step, a scalar; 1 in the first."""
        return self.state[3].exp()

    def update(self, counts: Tensor, tokens: int, progress: float) -> None:
        """Learn from a step, and move thresholds; all ranks call it.

        Args:
            counts: at how many tokens of all data ranks each feature of this rank was active, [L, F] int64.
            tokens: of all data ranks.
            progress: the share of the steps that were done before it.
        """
        target = self.activation.target_l0(progress)
        assert target is not None, "an activation that aims at an L0 does so in all steps"
        self.target, self.used = target, self.factor()
        # Whole numbers: the same sum for any number of ranks. None active counts as one in the batch.
        l0 = (self.parallel.total(counts.sum()).clamp_min(1).double() / tokens).log()
        smooth, drift, integral, _ = self.state
        smooth = smooth + (l0 - smooth) / (SMOOTH if self.begun else 1.0)
        error, now = (smooth - math.log(target)).clamp(-NEAR, NEAR), l0 - math.log(target)
        if isinstance(self.activation, Follows):
            drift = drift + torch.where(now.abs() < NEAR, now, 0.0) / DRIFT
            self.activation.follow(now + drift)
        integral = integral + (error + drift).clamp(-NEAR, NEAR) * (GAIN / (INTEGRAL * self.steps))
        self.state = torch.stack([smooth, drift, integral, GAIN * error + integral])
        self.begun = True

    def metrics(self) -> dict[str, Any]:
        """What is logged of the last step."""
        factor = {"train/penalty_factor": self.used} if self.penalised else {}
        return {"train/l0_target": self.target, **factor}


def aims(parts: Parts) -> bool:
    """Whether the activation has an L0 to reach."""
    activation = parts.transcoder.activation
    return isinstance(activation, AimsAtL0) and activation.target_l0(0.0) is not None


def check_steering(parts: Parts) -> None:
    """Before training, refuse an L0 that nothing leads to.

    Raises:
        Refused: no loss is steered, and the activation does not follow L0 itself.
    """
    follows = isinstance(parts.transcoder.activation, Follows)
    if aims(parts) and not follows and not any(isinstance(loss, Steered) and loss.steered for loss in parts.losses):
        text = "no loss penalises active features, so there is no weight to steer: add tanh_sparsity or l0 (without a "
        raise Refused("activation.target_l0", text + "target of its own) to the losses, or leave target_l0 out")
