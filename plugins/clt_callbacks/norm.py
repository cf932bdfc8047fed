"""Projection of decoder norms, after each step (as sparse autoencoders keep theirs at 1: Bricken et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clt_plugins import Refused, Shifted, Step, Training

if TYPE_CHECKING:
    from clt_callbacks import DecoderNormConfig


class DecoderNorm:
    """A `Callback`."""

    def __init__(self, config: DecoderNormConfig):
        self.config = config
        self.every = config.every

    def start(self, run: Training) -> None:
        """Ask for decoder rows, so that a tying without them is refused before training; and keep the first norms."""
        run.decoder(0)
        if self.config.compensate and _has_offset(run):
            text = (
                "compensate: an offset of features (tying.feature_offset) cannot be divided back: leave one of them out"
            )
            raise Refused("callbacks", text)
        if run.step == 0:
            self._project(run)

    def after(self, run: Training, step: Step) -> None:
        """Keep the norms."""
        self._project(run)

    def _project(self, run: Training) -> None:
        norms = run.transcoder.tying.norms()
        factor = self.config.norm / norms
        if self.config.how == "at_most":
            factor = factor.clamp_max(1.0)
        # A decoder of zeros has no direction: it stays.
        run.scale_decoder(torch.where(norms > 0, factor, 1.0), inverse=self.config.compensate)


def _has_offset(run: Training) -> bool:
    """Whether something is added to active features before the decoder's rows."""
    tying = run.transcoder.tying
    try:
        return isinstance(tying, Shifted) and tying.shift(0) is not None
    except Refused:  # it differs between targets
        return True
