"""What reads the inputs of a token reads no more than a language model has when it computes a layer of that token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.testing.bench import LAYERS, Bench
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import same
from clt_plugins.testing.skewed import fitted, skewed_batch

ROUNDING = {"normalisation": 1e-6, "encoder": 1e-10, "tying": 1e-10}
"""Of float64; of a normalisation through matrices whose largest and smallest scale are 1e6 apart."""


@check("normalisation", "encoder", "tying", needs=("there_and_back",))
def causal(bench: Bench) -> None:
    """A layer of `inputs(x)`, or of a tying's `affine(x)`, depends neither on later layers of x, which a language model
    has not computed yet, nor on other tokens of the batch."""
    name, function = _of(bench, fitted(bench).transcoder)
    x, rounding = skewed_batch(bench, 7).inputs, ROUNDING[bench.slot]
    with torch.no_grad():
        whole = function(x)
        alone = torch.cat([function(token[None]) for token in x])
        text = f"`{name}` of each token as if it were alone"
        same(alone, whole, text, f"`{name}`: a mean over the tokens of the batch", rounding)
        for layer in range(LAYERS - 1):
            changed = x.clone()
            changed[:, layer + 1 :] += 1
            same(
                function(changed)[:, : layer + 1],
                whole[:, : layer + 1],
                f"`{name}` of layers up to {layer} as before, when only later layers of x change",
                f"`{name}`: a mean or a product over layers (`dim=(1, 2)`), or layers in another order",
                rounding,
            )


def _of(bench: Bench, transcoder: CrossLayerTranscoder) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What the choice computes of inputs [B, L, D], and the name of its method."""
    if bench.slot == "normalisation":
        return "inputs", transcoder.normaliser.inputs
    if bench.slot == "encoder":
        return "inputs", transcoder.encoder.inputs
    return "affine", lambda x: transcoder.tying.affine(x).expand(len(x), -1, -1)
