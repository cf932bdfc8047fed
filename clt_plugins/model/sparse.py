"""The sparse products of a cross-layer transcoder, as autograd functions over a kernel plugin.

Every weight is a list of rows [R, D]; a `Layout` says which rows belong to a feature and which layers they
write to. The encoder is the simplest case (one row per feature, its own layer), so its gradient and the
decoder's are the same kernel.

Shapes: B tokens, L layers, D d_model, F features per layer, N active pairs, R rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Kernels
    from clt_plugins.data.features import Pairs


@attrs.frozen
class Layout:
    """Which rows of a weight [R, D] belong to feature f of layer s, and where they write.

    Row j (0 <= j < count[s]) of that feature is row `first[s] + f * step[s] + j * stride[s]` of the weight and
    writes to layer s + j.
    """

    features: int
    """F, per layer."""
    first: tuple[int, ...]
    """Row of feature 0 of each source layer."""
    step: tuple[int, ...]
    """Rows from one feature to the next."""
    stride: tuple[int, ...]
    """Rows from one target to the next."""
    count: tuple[int, ...]
    """How many targets a feature of each source layer writes to, counted from its own layer on."""
    rows: int
    """R."""

    @property
    def layers(self) -> int:
        return len(self.first)

    @classmethod
    def own_layer(cls, layers: int, features: int) -> Layout:
        """One row per feature, writing to the feature's own layer: an encoder [L, F, D]."""
        first = tuple(layer * features for layer in range(layers))
        return cls(features, first, (1,) * layers, (0,) * layers, (1,) * layers, layers * features)

    @classmethod
    def untied(cls, layers: int, features: int) -> Layout:
        """A row for each target, contiguous: [F, L - s, D] for each source layer s, one after the other."""
        first = tuple(features * sum(layers - r for r in range(s)) for s in range(layers))
        count = tuple(layers - s for s in range(layers))
        return cls(features, first, count, (1,) * layers, count, features * sum(count))

    @classmethod
    def per_source(cls, layers: int, features: int) -> Layout:
        """One row per feature, written to every target from its layer on: [L, F, D], by source."""
        own = cls.own_layer(layers, features)
        return attrs.evolve(own, count=tuple(layers - s for s in range(layers)))

    @classmethod
    def per_target(cls, layers: int, features: int) -> Layout:
        """One row per target and feature number, shared by all sources: [L, F, D], by target."""
        own = cls.per_source(layers, features)
        return attrs.evolve(own, stride=(features,) * layers)


def decode(values: Tensor, pairs: Pairs, weight: Tensor, layout: Layout, kernels: Kernels) -> Tensor:
    """What the active features write: [B, L, D].

    Args:
        values: [N], or [N, L] where a feature writes a different value to each target (column t for layer t).
        weight: [R, D].
    """
    return _Decode.apply(values, weight, pairs, layout, kernels)


def pre_activations(
    found: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, pairs: Pairs, kernels: Kernels
) -> Tensor:
    """Give the pre-activations of some pairs, already computed, their gradients: [N].

    Args:
        found: the pre-activations `inputs · weight + bias` of the pairs, [N], without gradient.
        inputs: [B, L, D]; weight: [L, F, D]; bias: [L, F].
    """
    return _PreActivations.apply(found, inputs, weight, bias, pairs, kernels)


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
        out = values.new_empty(pairs.tokens, layout.layers, weight.shape[-1])
        kernels.decode(values, pairs, layout, weight.view(layout.rows, -1), out)
        ctx.save_for_backward(values, weight)
        ctx.sparse = pairs, layout, kernels
        # save_for_backward hands back a tensor without its attributes; the parameter itself holds the buffer.
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx, grad):
        values, weight = ctx.saved_tensors
        pairs, layout, kernels = ctx.sparse
        grad = grad.contiguous()
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = torch.empty_like(values)
            kernels.grad_values(grad, pairs, layout, weight.view(layout.rows, -1), grad_values)
        if ctx.needs_input_grad[1]:
            grad_weight = _row_gradient(ctx.weight, values, pairs, layout, grad, kernels)
        return grad_values, grad_weight, None, None, None


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, found, inputs, weight, bias, pairs, kernels):
        ctx.save_for_backward(inputs, weight)
        ctx.sparse = pairs, Layout.own_layer(pairs.layers, pairs.features), kernels
        ctx.weight = weight
        return found.clone()

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        pairs, layout, kernels = ctx.sparse
        grad = grad.contiguous()
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_inputs = torch.empty_like(inputs)
            kernels.decode(grad, pairs, layout, weight.view(layout.rows, -1), grad_inputs)
        if ctx.needs_input_grad[2]:
            grad_weight = _row_gradient(ctx.weight, grad, pairs, layout, inputs, kernels)
        if ctx.needs_input_grad[3]:
            zeros = grad.new_zeros(pairs.layers * pairs.features)
            grad_bias = zeros.index_add(0, pairs.feature, grad).view(pairs.layers, pairs.features)
        return None, grad_inputs, grad_weight, grad_bias, None, None
