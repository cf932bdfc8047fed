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

from clt_plugins.contract.model.kernels import BothGradients
from clt_plugins.data.layout import Layout

if TYPE_CHECKING:
    from clt_plugins.contract.model.kernels import Kernels
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


def own_rows(weight: Tensor, layout: Layout) -> Tensor:
    """The rows with which features write to their own layer, [L, F, D]; differentiable.

    The gradient is added to that of the weight, in place where it has a buffer (`reuse_gradients`). Where these are all
    the rows, in this order, they are the weight itself.

    Args:
        weight: R · D numbers.
    """
    own = Layout.own_layer(layout.n_layers, layout.n_features)
    if (layout.first, layout.step, layout.rows) == (own.first, own.step, own.rows):
        return weight.view(layout.n_layers, layout.n_features, -1) if weight.dim() != 3 else weight
    return _OwnRows.apply(weight, layout)


def release_gradients(parameters: Any) -> None:
    """Release gradients and the memory that `reuse_gradients` keeps for them."""
    for parameter in parameters:
        parameter.grad, parameter.reuses_gradient = None, False
        for name in ("grad_buffer", "squares_buffer", "grad_squares"):
            if hasattr(parameter, name):
                delattr(parameter, name)


def reuse_gradients(parameters: Any) -> None:
    """Let the sparse products write these parameters' gradients into one buffer, kept from step to step.

    A gradient as large as a decoder costs a pass over memory to allocate and another to add up; the buffer
    saves both. Gradients then appear in `.grad` during `backward`; `torch.autograd.grad` does not see them.
    """
    for parameter in parameters:
        parameter.reuses_gradient = True


def row_squares(parameter: Any) -> Tensor | None:
    """The sum of squares of each row of a parameter's gradient, [R] float32, which kernels left while they wrote it.

    None where they did not, or where torch changed the gradient since then: a term that autograd added, a factor. An
    average over data ranks may go unnoticed: with several of them, do not ask.
    """
    squares, grad = getattr(parameter, "grad_squares", None), parameter.grad
    if squares is None or grad is not parameter.grad_buffer or grad._version != parameter.grad_version:
        return None
    return squares


def own_gradient(weight: Any) -> tuple[Tensor, bool, bool]:
    """The gradient of a weight to write into; whether it is to be overwritten; whether it is the weight's `.grad`.

    It is, in the weight's buffer, where the weight has one (`reuse_gradients`): then nothing is left to return.
    """
    if not getattr(weight, "reuses_gradient", False):
        return torch.empty_like(weight), True, False
    fresh = weight.grad is None
    if fresh:
        if not hasattr(weight, "grad_buffer"):
            weight.grad_buffer = torch.empty_like(weight)
        weight.grad = weight.grad_buffer
    return weight.grad, fresh, True


def _gradients(
    weight: Any,
    values: Tensor,
    pairs: Pairs,
    layout: Layout,
    dense: Tensor,
    kernels: Kernels,
    grad_values: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor | None:
    """The gradient of a weight's rows: returned, or put in place (then None) where the weight has a buffer.

    Args:
        grad_values, sums: filled too, where given: see `BothGradients`.
    """
    grad, overwrite, in_place = own_gradient(weight)
    shape = layout.rows, weight.shape[-1]
    if isinstance(kernels, BothGradients):
        squares = None
        if in_place and not hasattr(weight, "squares_buffer"):
            weight.squares_buffer = torch.empty(layout.rows, dtype=torch.float32, device=weight.device)
        if in_place and (overwrite or row_squares(weight) is not None):
            squares = weight.squares_buffer
        kernels.gradients(
            values, pairs, layout, weight.view(shape), dense, grad_values, grad.view(shape),
            overwrite=overwrite, squares=squares, sums=sums,
        )  # fmt: skip
        # Torch counts how often it changed a tensor in place; kernels that write by themselves are not counted.
        weight.grad_squares, weight.grad_version = squares, grad._version
    else:
        if grad_values is not None:
            kernels.grad_values(dense, pairs, layout, weight.view(shape), grad_values)
        kernels.grad_rows(values, pairs, layout, dense, grad.view(shape), overwrite=overwrite)
        if sums is not None:
            # A sum over a feature's pairs is its row of a product with ones. The order of the sum is the kernels', and
            # fixed; that of `index_add` is not, on a GPU.
            ones = torch.ones(pairs.tokens, pairs.n_layers, 1, dtype=sums.dtype, device=sums.device)
            kernels.grad_rows(values, pairs, layout, ones, sums[:, None], overwrite=True)
        weight.grad_squares = None
    return None if in_place else grad


class _OwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, layout):
        ctx.weight, ctx.layout = weight, layout
        return torch.stack(_own_parts(weight, layout))

    @staticmethod
    def backward(ctx, grad):
        out, fresh, in_place = own_gradient(ctx.weight)
        if fresh:
            out.zero_()
        for part, of_layer in zip(_own_parts(out, ctx.layout), grad, strict=True):
            part += of_layer
        ctx.weight.grad_squares = None  # of its rows; not known here
        return None if in_place else out, None


def _own_parts(weight: Tensor, layout: Layout) -> list[Tensor]:
    """Each layer's part of what `own_rows` gives, [F, D]: a view."""
    rows = weight.view(layout.rows, -1)
    return [
        rows[first : first + step * (layout.n_features - 1) + 1 : step]
        for first, step in zip(layout.first, layout.step, strict=True)
    ]


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
        if ctx.needs_input_grad[1]:
            grad_weight = _gradients(ctx.weight, values, pairs, layout, grad, kernels, grad_values)
        elif grad_values is not None:
            kernels.grad_values(grad, pairs, layout, weight.view(layout.rows, -1), grad_values)
        return grad_values, grad_weight, None, None, None


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept, inputs, weight, bias, pairs, kernels):
        ctx.save_for_backward(inputs, weight, bias)
        ctx.sparse = pairs, Layout.own_layer(pairs.n_layers, pairs.n_features), kernels
        ctx.weight = weight
        return kept.clone()

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, bias = ctx.saved_tensors
        pairs, layout, kernels = ctx.sparse
        grad = grad.contiguous()
        grad_inputs = grad_weight = grad_bias = None
        # An encoder row is a decoder row that writes to its own layer, so `decode` gives the gradient of the inputs.
        if ctx.needs_input_grad[1]:
            grad_inputs = torch.empty_like(inputs)
            kernels.decode(grad, pairs, layout, weight.view(layout.rows, -1), grad_inputs)
        sums = None
        if ctx.needs_input_grad[3]:
            # In float32 at least: bfloat16 does not count beyond 256.
            wide = torch.promote_types(bias.dtype, torch.float32)
            sums = torch.empty(pairs.n_layers * pairs.n_features, dtype=wide, device=grad.device)
        if ctx.needs_input_grad[2]:
            grad_weight = _gradients(ctx.weight, grad, pairs, layout, inputs, kernels, sums=sums)
        elif sums is not None:
            ones = inputs.new_ones(*inputs.shape[:2], 1)
            kernels.grad_rows(grad, pairs, layout, ones, sums[:, None], overwrite=True)
        if sums is not None:
            grad_bias = sums.view(pairs.n_layers, pairs.n_features).to(bias.dtype)
        return None, grad_inputs, grad_weight, grad_bias, None, None
