"""The guard of a training step: no file holds what a loss or a gradient that is not finite has made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clt_plugins.errors import ExitCode, Stopped
from clt_plugins.training.objective import Outcome

if TYPE_CHECKING:
    from clt_plugins.data.batch import Batch
    from clt_plugins.model.assemble import Parts
    from clt_plugins.training.objective import Totals


def guard(parts: Parts, outcome: Totals, norm: Tensor | None, batch: Batch | None, step: int, saved_step: int) -> None:
    """Stop before a loss that is not finite reaches the weights (on a GPU: a file), and such a gradient a file.

    Args:
        outcome: of the pass. Where only its totals and no batch are given, the message names gradients and weights.
        norm: of all gradients; None in steps that clip none and write nothing.

    Raises:
        Stopped: naming the step, what was not finite, and the first layer where it was not.
    """
    parallel = parts.context.parallel
    loss = float(parallel.total(outcome.total, over="tokens"))
    if math.isfinite(loss) and (norm is None or math.isfinite(float(norm))):
        return
    # In the order of the step, so that the first one named is where it began.
    transcoder = parts.transcoder
    with torch.no_grad():
        rows = transcoder.encoder.rows(transcoder.tying)
    suspects: list[tuple[str, Tensor]] = [("the encoder's weights", rows)]
    if batch is not None:
        suspects[:0] = [
            (f"the source's {name}", getattr(batch, name).transpose(0, 1)) for name in ("inputs", "targets")
        ]
    if isinstance(outcome, Outcome):
        suspects.append(("the reconstruction", outcome.reconstruction.transpose(0, 1)))
    of_encoder = transcoder.encoder.parameters()  # type: ignore[attr-defined]
    grads = (p.grad for p in of_encoder if p.dim() > 1 and len(p) == transcoder.n_layers)
    suspects += [("the encoder's gradient", grad) for grad in grads if grad is not None]
    where = "no single place"
    for name, by_layer in suspects:
        bad = ~torch.isfinite(by_layer.flatten(1)).all(1)
        if bool(bad.any()):
            where = f"{name} at layer {int(bad.nonzero()[0])}"
            break
    # All ranks are here, since they agree on the loss; but what was not finite first may belong to one rank's features.
    where = next((by_rank for by_rank in parallel.gather(where) if "layer " in by_rank), where)
    terms = ", ".join(f"{name} {float(value):g}" for name, value in outcome.terms.items())
    kept = f"the checkpoint of step {saved_step} is good" if saved_step else "there is no checkpoint yet"
    # What a source yields does not depend on the learning rate.
    remedy = "lower train.lr, or set train.clip_norm"
    if where.startswith("the source's"):
        remedy = 'set model.dtype = "float32" or "bfloat16", or generate stored activations again'
    if parallel.rank > 0:
        raise Stopped(ExitCode.GUARD, "")
    raise Stopped(
        ExitCode.GUARD,
        f"step {step + 1}: loss or gradient not finite ({terms}): first in {where}; {kept}; {remedy}",
    )
