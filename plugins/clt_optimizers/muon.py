"""Muon for matrices, AdamW for all else.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_optimizers.groups import groups, refuse_split

if TYPE_CHECKING:
    from clt_optimizers import MuonConfig
    from clt_plugins import Context, Piece, Weight


class MuonWithAdam(torch.optim.Optimizer):
    """torch's Muon of the matrices of some parameters, torch's AdamW of the others.

    Muon takes matrices [A, B] only. A parameter of several layers is one matrix [F, D] for each layer, and of each
    layer of a decoder one for each layer that it writes to: views of the parameter. Their momenta are views of one
    tensor beside the parameter, so that files hold them as they hold the parameter.
    """

    def __init__(self, params: list[dict[str, Any]], matrices: dict[nn.Parameter, Sequence[Piece]], config: MuonConfig):
        """
        Args:
            params: groups.
            matrices: the parameters that are matrices, with their pieces.
        """
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0})
        self.parts: list[tuple[nn.Parameter, Tensor, Any]] = []
        """(parameter, matrix, how to cut it out of a tensor of the parameter's shape)."""
        self.inner: list[tuple[dict[str, Any], torch.optim.Optimizer]] = []
        """The optimizers of each group."""
        beta1, beta2 = config.betas
        for group in self.param_groups:
            views = []
            for p in group["params"]:
                if p not in matrices:
                    continue
                momentum = self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                for piece in matrices[p]:
                    for number, view in enumerate(_matrices(piece, p.detach())):
                        views.append((p, view, (piece, number), _matrices(piece, momentum)[number]))
            others = [p for p in group["params"] if p not in matrices]
            if views:
                muon = torch.optim.Muon(
                    [view for _, view, _, _ in views],
                    momentum=config.momentum,
                    nesterov=config.nesterov,
                    ns_steps=config.newton_schulz_steps,
                    adjust_lr_fn=config.adjust_lr,
                )
                for p, view, cut, momentum in views:
                    muon.state[view]["momentum_buffer"] = momentum
                    self.parts.append((p, view, cut))
                self.inner.append((group, muon))
            if others:
                adam = torch.optim.AdamW(others, betas=(beta1, beta2), eps=config.eps, fused=True)
                adam.state = self.state  # one state, which is what checkpoints hold
                self.inner.append((group, adam))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None
        for p, view, (piece, number) in self.parts:
            view.grad = None if p.grad is None else _matrices(piece, p.grad.contiguous())[number]
        for group, inner in self.inner:
            for own in inner.param_groups:
                own["lr"], own["weight_decay"] = group["lr"], group["weight_decay"]
            inner.step()


def _matrices(piece: Piece, x: Tensor) -> list[Tensor]:
    """The matrices of a piece of a tensor of the parameter's shape: views [F, D], or [D, D] without features."""
    x = piece.view(x)
    found = [x.movedim(x.dim() - 2 if piece.axis is None else piece.axis, -2)]
    while found[0].dim() > 2:
        found = [part for one in found for part in one.unbind(0)]
    return found


class MakesMuon:
    """Makes `MuonWithAdam`."""

    def __init__(self, config: MuonConfig, context: Context):
        refuse_split("muon", context)
        self.config = config

    def make(self, weights: Sequence[Weight]) -> torch.optim.Optimizer:
        matrices = {weight.parameter: weight.pieces for weight in weights if weight.rows}
        return MuonWithAdam(groups(weights, self.config), matrices, self.config)

    def state_bytes(self, weight: Weight) -> int:
        """One momentum of matrices, two moments of all else."""
        return (1 if weight.rows else 2) * weight.parameter.numel() * weight.parameter.element_size()
