"""The ways from pre-activations to features: sparse, sparse with all pre-activations kept, and dense.

Each gets the encoder as h, rows and bias (`CrossLayerTranscoder.affine_form`), the activation, what makes its selection
for this batch, and further selections that share the pass; a further selection that is None gives None.

Shapes: B tokens, L layers, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.model.activation import CountsActive
from clt_plugins.data.features import Features
from clt_plugins.model.encoder import encode_selected
from clt_plugins.model.products.dense import encode_dense

if TYPE_CHECKING:
    from clt_plugins.contract.model.activation import Activation, Selection
    from clt_plugins.contract.model.kernels import Kernels
    from clt_plugins.model.products.matrix import Product

Form = tuple[Tensor, Tensor, Tensor]
"""h [B, L, H], rows [L, F, H] and bias [L, F]."""
Extras = Sequence["Selection | None"]
Select = Callable[[], "Selection"]


@attrs.frozen(eq=False)
class Encoded:
    """What one encoder pass gives."""

    features: Features
    extras: list[Features | None]
    """The pre-activations that further selections kept."""
    pre: Tensor | None
    """All pre-activations [B, L, F], where they were asked for."""
    active: Callable[[], Tensor] | None
    """See `Forward.active`; None where the activation has no gradient of it."""


def sparse(
    form: Form, activation: Activation, select: Select, extras: Extras, kernels: Kernels, product: Product | None
) -> Encoded:
    """A layer's pre-activations at a time: what no selection keeps is gone, and has no gradient."""
    selections = [select(), *(extra for extra in extras if extra is not None)]
    (pairs, pre), *further = encode_selected(*form, selections, kernels, product)
    others = iter(Features(kept, at) for at, kept in further)
    features = Features(activation(pre, pairs.feature), pairs)
    active = _active(activation, features, pre)
    return Encoded(features, [None if extra is None else next(others) for extra in extras], None, active)


def keeping_pre(form: Form, activation: Activation, select: Select, extras: Extras) -> Encoded:
    """Sparse features, with all pre-activations alive for a loss that reads them."""
    pre = encode_dense(*form)
    others = [None if extra is None else _selected(extra, pre) for extra in extras]
    chosen = _selected(select(), pre)
    assert chosen.pairs is not None
    features = Features(activation(chosen.values, chosen.pairs.feature), chosen.pairs)
    return Encoded(features, others, pre, _active(activation, features, chosen.values))


def dense(form: Form, activation: Activation, select: Select, extras: Extras) -> Encoded:
    """The reference, and the fast way while most features are active: [B, L, F] throughout."""
    pre = encode_dense(*form)
    others = [None if extra is None else _selected(extra, pre) for extra in extras]
    values = activation(pre, None)
    if activation.fixed_size:
        # Which features TopK keeps is not a function of each pre-activation alone: the selection says.
        chosen = _selected(select(), pre)
        # Empty places (-inf) are all at one pair, which others may have chosen; NaN is kept, and stops the run.
        kept = (chosen.values.detach() != -torch.inf).to(values.dtype)
        values = values * Features(kept, chosen.pairs).dense()
    features = Features(values)
    return Encoded(features, others, pre, _active(activation, features, pre))


def _active(activation: Activation, features: Features, pre: Tensor) -> Callable[[], Tensor] | None:
    """What counts the active features of a pass with a gradient, where the activation has one."""
    if not isinstance(activation, CountsActive):
        return None
    feature = None if features.pairs is None else features.pairs.feature
    return lambda: activation.active(pre, feature)


def _selected(selection: Selection, pre: Tensor) -> Features:
    """The pre-activations [B, L, F] that a selection keeps; differentiable, -inf where a pair is empty."""
    with torch.no_grad():
        for layer in range(pre.shape[1]):
            selection.see(layer, pre[:, layer])
        pairs, kept = selection.finish()
    values = pre.flatten(1)[pairs.token, pairs.feature]
    return Features(values.masked_fill(kept == -torch.inf, -torch.inf), pairs)
