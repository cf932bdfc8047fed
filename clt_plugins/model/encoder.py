"""The encoder: pre-activations `x_l · W_l + b_l`, all at once or a layer at a time under selections.

The blockwise form never holds more than one [B, F] block. The product may run in bfloat16; the pairs selected by it are
then computed again from the float32 weights, so features have float32 values for any type of the product.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clt_plugins.contract.interfaces import Kernels, Selection
from clt_plugins.data.features import Pairs
from clt_plugins.data.layout import Layout
from clt_plugins.model.sparse import pre_activations

ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""What torch's compiler calls for a linear layer on a CPU; torch in eager mode calls it for bfloat16 only. A private
operator: where a version of torch lacks it, `addmm` is used."""


def encode_dense(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All pre-activations, [B, L, F]; differentiable.

    Args:
        inputs: [B, L, D], normalised; weight: [L, F, D]; bias: [L, F].
    """
    # Where weights are kept in bfloat16, this reference still computes in the inputs' type.
    weight, bias = weight.to(inputs.dtype), bias.to(inputs.dtype)
    by_layer = torch.baddbmm(bias[:, None], inputs.transpose(0, 1), weight.transpose(1, 2))
    return by_layer.transpose(0, 1)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x · weightᵀ + bias, [B, F]; no gradient. On a CPU by oneDNN, twice as fast as MKL where the CPU is not Intel's.

    Args:
        x: [B, D]; weight: [F, D]; bias: [F].
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and ONEDNN is not None:
        return ONEDNN(x, weight, bias, "none", [], "")
    return torch.addmm(bias, x, weight.T)


def encode_selected(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    selections: Sequence[Selection],
    kernels: Kernels,
    product: torch.dtype | None = None,
) -> list[tuple[Pairs, Tensor]]:
    """What each selection keeps of the pre-activations: its pairs, and their pre-activations [N], differentiable.

    Args:
        inputs: [B, L, D], normalised; weight: [L, F, D]; bias: [L, F].
        product: the type of the matrix product, if not that of the weights.
    """
    with torch.no_grad():
        product = product or weight.dtype
        exact = product == inputs.dtype
        # Without autograd: a graph would keep every block alive, B·L·F numbers.
        for layer in range(weight.shape[0]):
            if exact:
                block = affine(inputs[:, layer], weight[layer], bias[layer])
            else:
                block = inputs[:, layer].to(product) @ weight[layer].to(product).T + bias[layer]
            for selection in selections:
                selection.see(layer, block)
    kept = []
    for selection in selections:
        pairs, kept_pre = selection.finish()
        with torch.no_grad():
            if not exact:
                # The low-precision product only chose the pairs; their values come from the weights themselves.
                layout = Layout.own_layer(pairs.n_layers, pairs.n_features)
                empty = kept_pre == -torch.inf
                kernels.grad_values(inputs, pairs, layout, weight.view(layout.rows, -1), kept_pre)
                kept_pre += bias.flatten()[pairs.feature]
                kept_pre.masked_fill_(empty, -torch.inf)
        kept.append((pairs, pre_activations(kept_pre, inputs, weight, bias, pairs, kernels)))
    return kept
