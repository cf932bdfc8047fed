"""The dense products of a transcoder, as autograd functions: while most features are on, one matrix product per layer.

The gradient of a weight is written where the sparse products write it (`reuse_gradients`): into one buffer, each part
once. Autograd would make a gradient as large as the weight for every slice that is read, and add them up.

Shapes: B tokens, L layers, D d_model, F features per layer, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clt_plugins.data.layout import Layout
from clt_plugins.model.products.matrix import wide_product
from clt_plugins.model.sparse import own_gradient


def encode_dense(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All pre-activations, [B, L, F]; differentiable, in the inputs' type.

    Args:
        inputs: [B, L, H], what the encoder makes of normalised inputs; weight: its rows, [L, F, H]; bias: [L, F].
    """
    return _Encode.apply(inputs, weight, bias)


def dense_decode(values: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """out[b, t] = sum over source layers s and features of value · their row for t: [B, L, D]; differentiable.

    Args:
        values: [B, L, F], in float32 at least.
        weight: R · D numbers. The rows of a source layer must lie together, and be its own: `own_layer`, `untied`.
    """
    return _Decode.apply(values, weight, layout)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight, bias)
        ctx.weight = weight
        # Layer by layer in memory: selections and losses read a layer at a time.
        if weight.dtype == inputs.dtype:
            by_layer = torch.baddbmm(bias[:, None], inputs.transpose(0, 1), weight.transpose(1, 2))
        else:
            by_layer = inputs.new_empty(weight.shape[0], inputs.shape[0], weight.shape[1])
            for layer in range(weight.shape[0]):
                _multiply(inputs[:, layer], weight[layer].T, by_layer[layer], add=False)
            by_layer += bias[:, None]
        return by_layer.transpose(0, 1)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, bias = ctx.saved_tensors
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_inputs = torch.empty_like(inputs)
            for layer in range(weight.shape[0]):
                _multiply(grad[:, layer], weight[layer], grad_inputs[:, layer], add=False)
        if ctx.needs_input_grad[1]:
            out, fresh, in_place = own_gradient(ctx.weight)
            for layer in range(weight.shape[0]):
                _multiply(grad[:, layer].T, inputs[:, layer], out[layer], add=not fresh)
            ctx.weight.grad_squares = None  # of its rows; not known here
            grad_weight = None if in_place else out
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0).to(bias.dtype)
        return grad_inputs, grad_weight, grad_bias


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, weight, layout):
        d_model = weight.shape[-1]
        ctx.save_for_backward(values, weight)
        ctx.weight, ctx.layout = weight, layout
        out = values.new_zeros(values.shape[0], layout.n_layers, d_model)
        flat = out.view(len(values), -1)
        for source, block, columns in _blocks(layout, d_model):
            _multiply(values[:, source], _rows(weight, layout, block), flat[:, columns], add=True)
        return out

    @staticmethod
    def backward(ctx, grad):
        values, weight = ctx.saved_tensors
        layout, d_model = ctx.layout, weight.shape[-1]
        grad = grad.reshape(len(values), -1)
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = torch.empty_like(values)
            for source, block, columns in _blocks(layout, d_model):
                _multiply(grad[:, columns], _rows(weight, layout, block).T, grad_values[:, source], add=False)
        if ctx.needs_input_grad[1]:
            out, fresh, in_place = own_gradient(ctx.weight)
            if fresh and layout.n_features * sum(layout.count) < layout.rows:
                out.zero_()  # some rows belong to no feature here
            for source, block, columns in _blocks(layout, d_model):
                part = _rows(out, layout, block)
                _multiply(values[:, source].T, grad[:, columns], part, add=not fresh)
            ctx.weight.grad_squares = None  # of its rows; not known here
            grad_weight = None if in_place else out
        return grad_values, grad_weight, None


def _blocks(layout: Layout, d_model: int) -> list[tuple[int, slice, slice]]:
    """For each source layer: its number, its rows of the weight, the columns [L * D] of the layers it writes to."""
    found = []
    for s, count in enumerate(layout.count):
        own = count == 1 or layout.stride[s] == 1
        assert layout.step[s] == count and own, f"rows of layer {s} do not lie together: {layout}"
        rows = slice(layout.first[s], layout.first[s] + layout.n_features * count)
        found.append((s, rows, slice(s * d_model, (s + count) * d_model)))
    return found


def _rows(weight: Tensor, layout: Layout, block: slice) -> Tensor:
    """A source layer's rows as a matrix: [F, targets * D], a view."""
    return weight.view(layout.rows, -1)[block].view(layout.n_features, -1)


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out (+)= a · b, summed in float32 at least.

    Where `out` is a half-precision weight's gradient, a GPU multiplies numbers of its type and rounds each sum once.
    """
    if out.dtype in (torch.bfloat16, torch.float16) and out.device.type == "cuda":
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == b.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        out += wide_product(a, b)
    else:
        out.copy_(wide_product(a, b))
