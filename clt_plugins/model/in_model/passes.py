"""The language model in a training step, for losses that ask for it (`RunsModel`).

The unchanged model reads some contexts without gradients. Then it reads them with the transcoder in the place of its
MLPs (`Replacement`): gradients flow back through its later layers to all that the transcoder wrote.

Every tensor rank reads the same contexts, and has its own features. Data ranks read disjoint ones.

Shapes: R positions that a next token follows, L layers, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins.contract.reading.source import TrainsInModel
from clt_plugins.contract.training.loss import Loss, ModelPass, RunsModel
from clt_plugins.errors import Fault, Faults
from clt_plugins.model.in_model.replacement import Replacement, as_evaluated

if TYPE_CHECKING:
    from clt_plugins.contract.reading.language_model import TrainableModel
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.model.transcoder import CrossLayerTranscoder


class InModel:
    """Runs the language model for the losses of a run.

    Args:
        losses: of the recipe, in its order.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, losses: Sequence[Loss], source: Source):
        self.transcoder, self.source = transcoder, source
        self.losses = [loss if isinstance(loss, RunsModel) else None for loss in losses]
        self.model: TrainableModel | None = None
        if any(self.losses) and isinstance(source, TrainsInModel):
            self.model = source.trainable_model()
        self.text: Any = None
        """The last one that was read."""

    def wanted(self, step: int, progress: float) -> list[bool]:
        """For each loss, whether it runs the model in a step, counted from 1."""
        return [loss is not None and bool(loss.runs(step, progress)) for loss in self.losses]

    def read(self, wanted: Sequence[bool], position: Any) -> Any:
        """Read the contexts of a step, if any loss runs the model in it; returns the position after them.

        Args:
            position: see `TrainsInModel.training_text`.
        """
        contexts = [loss.contexts for loss, runs in zip(self.losses, wanted, strict=True) if loss is not None and runs]
        if contexts:
            assert isinstance(self.source, TrainsInModel)
            self.text, position = self.source.training_text(max(contexts), position)
        return position

    def passes(self, wanted: Sequence[bool]) -> list[ModelPass | None]:
        """For each loss that runs the model in this step, the pass that all of them share."""
        if not any(wanted):
            return [None] * len(wanted)
        assert self.model is not None
        made = run_model(self.transcoder, self.model, self.text)
        return [made if runs else None for runs in wanted]


def run_model(transcoder: CrossLayerTranscoder, model: TrainableModel, text: Any) -> ModelPass:
    """The model on a text, unchanged and with the transcoder in it; differentiable in the transcoder's parameters.

    An activation that selects (TopK, BatchTopK) does so within each context, by the k of an evaluation: then what is
    learned depends neither on the number of contexts in a pass, nor on that of ranks.
    """
    parallel = transcoder.context.parallel
    device, dtype = transcoder.device, torch.promote_types(transcoder.context.dtype, torch.float32)
    reads: list[Tensor] = []

    def watch(_: int, read: Tensor, written: Tensor) -> None:
        reads.append(read.to(device, dtype))

    with torch.no_grad():
        unchanged = model.logits(text, watch)
    replacement = Replacement(transcoder, torch.stack(reads, 1), model.lengths(text))
    with as_evaluated(transcoder):
        logits = model.logits(text, lambda layer, read, _: replacement(layer, read.to(device, dtype)))
    # Which positions have a next token is known on the host: no GPU is waited for.
    following = model.following(text).cpu()
    followed = (following >= 0).nonzero().squeeze(1)
    rows = followed.to(logits.device)
    here = torch.full((), len(followed), dtype=torch.float32, device=device)
    # Gradients are averaged over data ranks, so each divides by its even share of all positions.
    share = (parallel.total(here, over="tokens") / parallel.data_ranks).clamp_min(1)

    def mean(x: Tensor) -> Tensor:
        return x.to(device).sum() / share.to(x.dtype)

    # The transcoder's device is that of the other losses.
    logits, unchanged = (x[rows].to(device) for x in (logits, unchanged))
    return ModelPass(logits=logits, unchanged=unchanged, next_tokens=following[followed].to(device), mean=mean)


def check_losses(recipe: Recipe, losses: Sequence[Loss], source: Source, data_ranks: int) -> None:
    """Before training, refuse losses that run the language model where that cannot be done.

    Raises:
        Faults: the source cannot, or there are fewer contexts than data ranks.
    """
    faults = []
    for index, (chosen, loss) in enumerate(zip(recipe.losses, losses, strict=True)):
        if not isinstance(loss, RunsModel):
            continue
        if not isinstance(source, TrainsInModel):
            text = f"{chosen.name!r} runs the language model in training, which the source {recipe.source.name!r} "
            faults.append(
                Fault(("losses", index, "name"), text + 'does not: take the source "stream", or leave it out')
            )
        elif loss.contexts < data_ranks:
            text = f"{loss.contexts} cannot be divided among {data_ranks} data ranks: each needs one at least"
            faults.append(Fault(("losses", index, "contexts"), text))
    if faults:
        raise Faults(faults)
