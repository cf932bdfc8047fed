"""One update of a parameter by Adam, as kernels get it.

Kingma & Ba 2015 (arXiv 1412.6980); Loshchilov & Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

import attrs
from torch import Tensor


@attrs.frozen(eq=False, kw_only=True)
class AdamUpdate:
    """What one step of Adam does to some rows of a parameter: [R, C] tensors, contiguous, changed in place.

    In float32, with g the gradient, m and v its moments, w the weight, and the five `scalars`:

        g = g * grad_factor          (+ weight_decay * w, where it is coupled)
        m = m + (g - m) * (1 - beta1)
        v = v * beta2 + g * g * (1 - beta2)
        w = w - decay * w            (decay is 0 where it is coupled)
        w = w - rate * m / (sqrt(v) * root_factor + eps)

    A number that is kept in bfloat16 is rounded up or down at random, in proportion (Gupta et al. 2015, arXiv
    1502.02551): 16 random bits are added below the last place that is kept, then the places below are cut off. With
    `low` the weight is not rounded: weight and low are the halves of a float32. As integers, its bits are
    `(bits of weight) * 2^16 + low`, and the weight is the nearest bfloat16. NaN, of whatever bits, is stored as NaN.

    The random bits follow from the number of the element in the complete parameter, that of all ranks, the key and the
    step. In unsigned 32-bit arithmetic, with `mix` the last steps of MurmurHash3 (Appleby 2011, public domain):

        mix(x):   x ^= x >> 16;  x *= 0x85EBCA6B;  x ^= x >> 13;  x *= 0xC2B2AE35;  x ^= x >> 16
        element = (r // period) * stride + first + (r % period) * C + c        for row r, column c; 64 bits
        bits    = mix(low half of element ^ high half of element * 0x9E3779B1 ^ mix(key + step * 0x9E3779B1))

    The low 16 of the bits round the weight, the high 16 the first moment, and the high 16 of `bits * 0x9E3779B1` the
    second.
    """

    weight: Tensor
    """[R, C] float32 or bfloat16."""
    low: Tensor | None
    """The lower halves of float32 weights, [R, C] int16; None if there are none."""
    grad: Tensor
    """[R, C], of the weight's type."""
    mean: Tensor
    """The first moment, [R, C] float32 or bfloat16."""
    square: Tensor
    """The second moment, [R, C], of the same type."""
    grad_squares: Tensor | None
    """The sum of squares of each row of the gradient, [R] float32: where it is 0, the row is 0 and need not be read.
    None if it is not known."""
    scalars: Tensor
    """[5] float32, on the device: 1 / (what gradients are divided by); lr / (1 - beta1^step); 1 / sqrt(1 - beta2^step);
    lr · weight decay; the number of the step, from 1."""
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    """Coupled: added to the gradient; 0 where it is decoupled."""
    key: int
    """32 bits that follow from the seed and the parameter's name."""
    first: int
    """The number of row 0's element 0 in the complete parameter."""
    period: int
    """Rows that follow each other in the complete parameter."""
    stride: int
    """Elements in the complete parameter from the beginning of one period to that of the next."""
