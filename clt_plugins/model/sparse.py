"""The sparse products of a cross-layer transcoder, as autograd functions over a kernel plugin.

Every weight is a list of rows [R, D]; a `Layout` says which rows belong to a feature and which layers they
write to. The encoder is the simplest case (one row per feature, its own layer), so its gradient and the
decoder's are the same kernel.

Shapes: B tokens, L layers, D d_model, F features per layer, N active pairs, R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins.data.layout import Layout

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Kernels
    from clt_plugins.data.features import Pairs


def sparse_decode(values: Tensor, pairs: Pairs, weight: Tensor, layout: Layout, kernels: Kernels) -> Tensor:
    """What the active features write: [B, L, D].

    Args:
        values: [N], or [N, L] where a feature writes a different value to each target (column t for layer t).
        weight: [R, D].
    """
    return _Decode.apply(values, weight, pairs, layout, kernels)


def pre_activations(
    kept: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, pairs: Pairs, kernels: Kernels
) -> Tensor:
    """The pre-activations of some pairs, already computed, with gradients: [N].

    The forward product was made without autograd, a layer at a time; here its backward is attached for the pairs alone.

    Args:
        kept: the pre-activations `inputs · weight + bias` of the pairs, [N], without gradient.
        inputs: [B, L, D]; weight: [L, F, D]; bias: [L, F].
    """
    return _PreActivations.apply(kept, inputs, weight, bias, pairs, kernels)


def reuse_gradients(parameters: Any) -> None:
    """Let the sparse products write these parameters' gradients into one buffer, kept from step to step.

    A gradient as large as a decoder costs a pass over memory to allocate and another to add up; the buffer
    saves both. Gradients then appear in `.grad` during `backward`; `torch.autograd.grad` does not see them.
    """
    for parameter in parameters:
        parameter.reuses_gradient = True


def _row_gradient(weight: Tensor, values: Tensor, pairs: Pairs, layout: Layout, dense: Tensor, kernels: Kernels):
    """The gradient of a weight's rows: returned, or put in place (then None) where the weight has a buffer."""
    rows = weight.view(layout.rows, -1)
    if not getattr(weight, "reuses_gradient", False):
        grad = torch.empty_like(rows)
        kernels.grad_rows(values, pairs, layout, dense, grad, overwrite=True)
        return grad.view_as(weight)
    fresh = weight.grad is None
    if fresh:
        if not hasattr(weight, "grad_buffer"):
            weight.grad_buffer = torch.empty_like(weight)  # type: ignore[attr-defined]
        weight.grad = weight.grad_buffer  # type: ignore[attr-defined]
    assert weight.grad is not None
    kernels.grad_rows(values, pairs, layout, dense, weight.grad.view_as(rows), overwrite=fresh)
    return None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, weight, pairs, layout, kernels):
        out = values.new_empty(pairs.tokens, layout.n_layers, weight.shape[-1])
        kernels.decode(values, pairs, layout, weight.view(layout.rows, -1), out)
        ctx.save_for_backward(values, weight)
        ctx.sparse = pairs, layout, kernels
        # save_for_backward returns a tensor without its attributes; the buffer hangs on the parameter itself.
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx, grad):
        values, weight = ctx.saved_tensors
        pairs, layout, kernels = ctx.sparse
        grad = grad.contiguous()
        grad_values = grad_weight = None
        # The decoder's output is linear in values and rows, so both gradients are products of the same kind: a dot
        # product per pair and target, and a weighted sum of gradient rows per weight row.
        if ctx.needs_input_grad[0]:
            grad_values = torch.empty_like(values)
            kernels.grad_values(grad, pairs, layout, weight.view(layout.rows, -1), grad_values)
        if ctx.needs_input_grad[1]:
            grad_weight = _row_gradient(ctx.weight, values, pairs, layout, grad, kernels)
        return grad_values, grad_weight, None, None, None


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept, inputs, weight, bias, pairs, kernels):
        ctx.save_for_backward(inputs, weight)
        ctx.sparse = pairs, Layout.own_layer(pairs.n_layers, pairs.n_features), kernels
        ctx.weight = weight
        return kept.clone()

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        pairs, layout, kernels = ctx.sparse
        grad = grad.contiguous()
        grad_inputs = grad_weight = grad_bias = None
        # An encoder row is a decoder row that writes to its own layer, so `decode` gives the gradient of the inputs.
        if ctx.needs_input_grad[1]:
            grad_inputs = torch.empty_like(inputs)
            kernels.decode(grad, pairs, layout, weight.view(layout.rows, -1), grad_inputs)
        if ctx.needs_input_grad[2]:
            grad_weight = _row_gradient(ctx.weight, grad, pairs, layout, inputs, kernels)
        if ctx.needs_input_grad[3]:
            zeros = grad.new_zeros(pairs.n_layers * pairs.n_features)
            grad_bias = zeros.index_add(0, pairs.feature, grad).view(pairs.n_layers, pairs.n_features)
        return None, grad_inputs, grad_weight, grad_bias, None, None
