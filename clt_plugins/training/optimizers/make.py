"""The optimizer of a run, from the recipe's settings.

Kingma & Ba 2015 (arXiv 1412.6980); Loshchilov & Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from clt_plugins.training.optimizers.adam import AdamBF16, Piece
from clt_plugins.training.optimizers.schedule import with_rate

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import TrainConfig
    from clt_plugins.model.transcoder import CrossLayerTranscoder


def make_optimizer(
    model: CrossLayerTranscoder, config: TrainConfig, seed: int = 0, extra: Mapping[str, nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """Adam or AdamW over a model's parameters: torch's fused one, or `AdamBF16` where weights or moments are bfloat16.

    Weight decay applies to matrices, not to biases and thresholds. The learning rate is set anew in every step, by
    `set_rate`. On a GPU it is a tensor there, as is the count of steps: a CUDA graph of a step can be captured.

    Args:
        extra: parameters of losses, by name.
    """
    extra = extra or {}
    parameters = [*model.parameters(), *extra.values()]
    matrices = [p for p in parameters if is_matrix(p, model.d_model)]
    others = [p for p in parameters if not is_matrix(p, model.d_model)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # The loop sets the rate before every step; the optimizer only needs some number to start with.
    config = with_rate(config, model.n_layers * model.n_features)
    assert config.lr is not None
    device = model.device
    beta1, beta2 = config.betas
    optimizer: torch.optim.Optimizer
    moments = torch.bfloat16 if config.states == "bf16" else torch.float32
    # torch's fused optimizers keep moments in the parameters' type, and round both to the nearest.
    if moments == torch.bfloat16 or any(p.dtype == torch.bfloat16 for p in parameters):
        optimizer = AdamBF16(
            groups,
            lr=config.lr,
            betas=(beta1, beta2),
            eps=config.eps,
            decoupled=config.optimizer == "adamw",
            seed=seed,
            moments=moments,
            split=config.bf16_weights == "split",
            pieces=_pieces(model, extra),
            kernels=model.context.kernels,
        )
    else:
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        capturable = device.type == "cuda"
        optimizer = kind(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True, capturable=capturable)
    if device.type == "cuda":
        for group in optimizer.param_groups:  # not at once: torch reads the first rate back to check it
            group["lr"] = torch.full((), config.lr, device=device)
    return optimizer


def state_bytes(config: TrainConfig, dtype: torch.dtype) -> int:
    """Bytes that the optimizer keeps for each parameter of a type: two moments, and the weight's lower half."""
    if config.states == "bf16":
        moment = 2
    else:
        moment = torch.promote_types(dtype, torch.float32).itemsize
    return 2 * moment + (2 if config.bf16_weights == "split" and dtype == torch.bfloat16 else 0)


def is_matrix(parameter: nn.Parameter, d_model: int) -> bool:
    """Whether a parameter holds rows, of features or between dimensions; not a bias or threshold.

    Rows of a decoder may be a list [R, D]; whatever else is a matrix has one for each layer. An encoder's rows need not
    have d_model numbers.
    """
    is_list = getattr(parameter, "feature_axis", None) == 0 and parameter.shape[-1] == d_model
    return parameter.dim() >= (2 if is_list else 3)


def _pieces(model: CrossLayerTranscoder, extra: Mapping[str, nn.Parameter]) -> dict[nn.Parameter, list[Piece]]:
    """How parameters are cut: as in files, where they are the same for any number of ranks."""
    by_name = {**dict(model.named_parameters()), **extra}
    found: dict[nn.Parameter, list[Piece]] = {p: [] for p in by_name.values()}
    for name, (owner, view, axis) in model.views().items():
        found[by_name[owner]].append(Piece(name, view, axis, model.own, model.n_features))
    for name, p in by_name.items():
        parts = [piece.view(p.detach()) for piece in found[p]]
        # A plugin's view may be transposed or leave something out; and losses have none.
        if sum(x.numel() for x in parts) != p.numel() or not all(x.is_contiguous() for x in parts):
            found[p] = [Piece(name, axis=getattr(p, "feature_axis", None), own=model.own, features=model.n_features)]
    return found
