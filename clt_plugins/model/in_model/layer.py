"""One layer of the encoder, for a language model in which the transcoder stands in the place of the MLPs.

There a layer's inputs are known only after the layers before it have written, and gradients flow back through them.

Shapes: R positions, L layers, H numbers of an encoder's row, F features per layer of this rank, N active pairs of the
layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins.data.features import Pairs
from clt_plugins.data.layout import Layout
from clt_plugins.model.products.matrix import affine
from clt_plugins.model.select.above import Above
from clt_plugins.model.sparse import own_gradient

if TYPE_CHECKING:
    from clt_plugins.contract.model.activation import Selection
    from clt_plugins.contract.model.kernels import Kernels
    from clt_plugins.contract.model.parallel import Parallel


def select_in_layer(
    selection: Selection, inputs: Tensor, weight: Tensor, bias: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    """What a selection keeps of one layer: token [N] and number of the feature in its layer [N], by token.

    A bound for each feature needs the layer alone. Any other selection compares it with the other layers and sees all.
    How many are kept is read back from a GPU.

    Args:
        inputs: what rows are multiplied with, [R, L, H]; weight: the rows, [L, F, H]; bias: [L, F].
    """
    n_features = weight.shape[1]
    with torch.no_grad():
        for each in [layer] if isinstance(selection, Above) else range(len(weight)):
            selection.see(each, affine(inputs[:, each], weight[each], bias[each], None))
        pairs, pre = selection.finish()
        kept = (pairs.layer == layer) & (pre != -torch.inf)
        return pairs.token[kept], pairs.feature[kept] - layer * n_features


def encode_in_layer(
    inputs: Tensor, weight: Tensor, bias: Tensor, token: Tensor, number: Tensor, layer: int, kernels: Kernels
) -> Tensor:
    """The pre-activations of some pairs of a layer, [N]; differentiable.

    Args:
        inputs: of the layer, [R, H]; weight: [L, F, H]; bias: [L, F].
        token, number: which pairs, sorted; see `select_in_layer`.
    """
    pairs = Pairs(token, number, len(inputs), 1, weight.shape[1])
    return _LayerPre.apply(inputs, weight, bias, pairs, layer, kernels)


def of_all_ranks(x: Tensor, parallel: Parallel) -> Tensor:
    """What this rank's features read, which is the same on all ranks that share features. Each rank knows what flows
    back through its own features: it is added up, since the layers before need all of it."""
    return x if parallel.tensor_ranks == 1 else _OfAllRanks.apply(x, parallel)


class _OfAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parallel):
        ctx.parallel = parallel
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.parallel.total(grad, over="features", what="features"), None


class _LayerPre(torch.autograd.Function):
    """inputs · weight[layer] + bias[layer] at some pairs. The weight's gradient goes where the other products put it
    (`reuse_gradients`): autograd would make one as large as the weight for every layer, and add them up."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, pairs, layer, kernels):
        # A slice of a larger tensor would keep all of that in memory.
        inputs = inputs.contiguous()
        layout = Layout.own_layer(1, weight.shape[1])
        out = inputs.new_empty(len(pairs.token))
        kernels.grad_values(inputs[:, None], pairs, layout, weight[layer], out)
        ctx.save_for_backward(inputs, weight, bias)
        ctx.sparse, ctx.weight = (pairs, layout, layer, kernels), weight
        return out.add_(bias[layer][pairs.feature])

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, bias = ctx.saved_tensors
        pairs, layout, layer, kernels = ctx.sparse
        grad = grad.contiguous()
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = torch.empty_like(inputs)
            kernels.decode(grad, pairs, layout, weight[layer], grad_inputs[:, None])
        if ctx.needs_input_grad[1]:
            out, fresh, in_place = own_gradient(ctx.weight)
            if fresh:
                out.zero_()  # of the other layers
            kernels.grad_rows(grad, pairs, layout, inputs[:, None], out[layer], overwrite=False)
            ctx.weight.grad_squares = None  # of its rows; not known here
            grad_weight = None if in_place else out
        if ctx.needs_input_grad[2]:
            # Summed as a product with ones: its order is the kernels', and fixed.
            wide = torch.promote_types(bias.dtype, torch.float32)
            sums = torch.zeros(weight.shape[1], 1, dtype=wide, device=grad.device)
            kernels.grad_rows(grad, pairs, layout, inputs.new_ones(len(inputs), 1, 1), sums, overwrite=True)
            grad_bias = torch.zeros_like(bias)
            grad_bias[layer] = sums[:, 0]
        return grad_inputs, grad_weight, grad_bias, None, None, None
