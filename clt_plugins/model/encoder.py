"""The encoder's product under selections: pre-activations `h_l · rows_l + bias_l`, a layer at a time.

Never more than one [B, F] block is held. The product may run in fewer bits; the pairs selected by it are then computed
again from the weights, so features have float32 values for any type of the product and of the weights.

Shapes: B tokens, L layers, F features per layer, H numbers of a row, N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clt_plugins.contract.model.activation import Selection
from clt_plugins.contract.model.kernels import Kernels
from clt_plugins.contract.spec import Choice
from clt_plugins.data.features import Pairs
from clt_plugins.data.layout import Layout
from clt_plugins.errors import PluginError
from clt_plugins.model.products.matrix import Product, affine, is_exact, without_bias
from clt_plugins.model.selection import Top
from clt_plugins.model.sparse import pre_activations


def encode_selected(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor,
    selections: Sequence[Selection],
    kernels: Kernels,
    product: Product | None = None,
) -> list[tuple[Pairs, Tensor]]:
    """What each selection keeps of the pre-activations: its pairs, and their pre-activations [N], differentiable.

    Args:
        inputs: [B, L, H], what the encoder makes of normalised inputs; weight: its rows, [L, F, H]; bias: [L, F].
        product: the type of the matrix product, if not that of the weights.
    """
    exact = is_exact(product, weight, inputs)
    with torch.no_grad():
        # Without autograd: a graph would keep every block alive, B·L·F numbers.
        for layer in range(weight.shape[0]):
            _show(selections, layer, inputs[:, layer], weight[layer], bias[layer], product)
    kept = []
    for selection in selections:
        pairs, kept_pre = selection.finish()
        with torch.no_grad():
            if not exact:
                # The low-precision product only chose the pairs; their values come from the weights themselves, in the
                # inputs' type: so all sums that follow, also those over ranks, are in float32 where weights are not.
                kept_pre = kept_pre.to(inputs.dtype)
                layout = Layout.own_layer(pairs.n_layers, pairs.n_features)
                empty = kept_pre == -torch.inf
                # In the inputs' type, whatever the product's and the weights': so is all that is computed from them.
                kept_pre = torch.empty_like(kept_pre, dtype=inputs.dtype)
                kernels.grad_values(inputs, pairs, layout, weight.view(layout.rows, -1), kept_pre)
                kept_pre += bias.flatten()[pairs.feature]
                kept_pre.masked_fill_(empty, -torch.inf)
        kept.append((pairs, pre_activations(kept_pre, inputs, weight, bias, pairs, kernels)))
    return kept


def _show(
    selections: Sequence[Selection],
    layer: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    product: Product | None,
) -> None:
    """Show a layer's pre-activations to all selections.

    A bias that would be another pass over the block is added by those selections that can, as they look at it. What
    they keep is without the bias then; it is computed again in any case.
    """
    block = without_bias(x, weight, product)
    if block is None:
        block = affine(x, weight, bias, product)
    else:
        adding = [selection for selection in selections if isinstance(selection, Top) and selection.adds_bias]
        for top in adding:
            top.see(layer, block, bias)
        selections = [selection for selection in selections if selection not in adding]
        if selections:
            block.add_(bias)
    for selection in selections:
        selection.see(layer, block)


def check_form(form: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int], choice: Choice) -> int:
    """H, how many numbers a row has.

    Args:
        form: h, rows and bias for one token.
        shape: (L, F of this rank).
        choice: the encoder's.

    Raises:
        PluginError: shapes of the encoder do not fit together.
    """
    h, rows, bias = (tuple(tensor.shape) for tensor in form)
    if (h, rows, bias) != ((1, shape[0], h[-1]), (*shape, h[-1]), shape):
        text = "inputs, rows and bias must be [B, L, H], [L, F, H] and [L, F]; for one token they are"
        raise PluginError(
            f"encoder: {choice}: {text} {list(h)}, {list(rows)} and {list(bias)}, with L = {shape[0]}, F = {shape[1]}",
            where=("encoder",),
        )
    return h[-1]
