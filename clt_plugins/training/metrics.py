"""What the recipe's metrics report, checked and put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_plugins.contract.training.metric import Step
from clt_plugins.data.features import Features
from clt_plugins.errors import Refused, WrongReturn
from clt_plugins.training import learned
from clt_plugins.training.optimizers.make import weights_of

if TYPE_CHECKING:
    from clt_plugins.contract.results.scores import Scores
    from clt_plugins.contract.training.metric import HeldOut, Metric
    from clt_plugins.data.batch import Batch
    from clt_plugins.model.assemble import Parts
    from clt_plugins.training.objective import Outcome
    from clt_plugins.training.saved.checkpoint import Progress


def step_of(
    parts: Parts, progress: Progress, batch: Batch, outcome: Outcome, counts: Tensor, norm: Tensor | None, lr: float
) -> Step:
    """The step that was done, for metrics and callbacks.

    Args:
        counts: at how many tokens of all data ranks each feature was active, [L, F].
        norm: of the gradients; known at every log, evaluation and checkpoint, and where they are clipped.
        lr: the learning rate.
    """
    return Step(
        number=progress.step,
        batch=batch,
        targets=outcome.targets,
        features=Features(outcome.features.values.detach(), outcome.features.pairs),
        reconstruction=outcome.reconstruction,
        units=parts.transcoder.normaliser.units(),
        variance=parts.transcoder.target_variance,
        terms=outcome.terms,
        total=outcome.total.detach(),
        counts=counts,
        idle_tokens=progress.idle_tokens,
        gradient_norm=outcome.total.new_full((), torch.nan) if norm is None else norm,
        rate=lr,
        weights=weights_of(parts.transcoder, extra=learned.parameters(parts)),
        transcoder=parts.transcoder,
    )


def of_step(metrics: Sequence[Metric], step: Step, own: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a training step by `group/name`: those of all metrics, then the engine's own.

    Raises:
        Refused: two of them have the same name.
        WrongReturn: a metric returned something else than numbers by name.
    """
    return _together([*((metric, metric.step(step)) for metric in metrics), (None, own)], r"\S+/\S+")


def passes(metrics: Sequence[Metric]) -> list[HeldOut]:
    """A held-out pass begins."""
    return [one for metric in metrics if (one := metric.held_out()) is not None]


def of_pass(held_out: Sequence[HeldOut], scores: Scores) -> dict[str, Any]:
    """The numbers of a held-out pass, as `eval/NAME`; see `of_step`."""
    found = _together([(one, one.result(scores)) for one in held_out], r"\S+")
    return {f"eval/{name}": value for name, value in found.items()}


def _together(reports: Iterable[tuple[object, Any]], form: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for metric, numbers in reports:
        if metric is not None and not _is_right(numbers, form):
            what = "numbers or tensors of at most two dimensions by name" + (" `group/name`" if "/" in form else "")
            raise WrongReturn(metric, f"a metric must return {what}, got {numbers!r:.200}")
        for name, value in numbers.items():
            if name in out:
                raise Refused("metrics", f"two of them report {name!r}: leave one of them out")
            # What is not the CPU's is read here, so that no logger waits for it.
            out[name] = value.detach().cpu() if isinstance(value, Tensor) else value
            if isinstance(value, Tensor) and value.dim() == 0:
                out[name] = value.item()
    return out


def _is_right(numbers: Any, form: str) -> bool:
    return isinstance(numbers, Mapping) and all(
        isinstance(name, str)
        and re.fullmatch(form, name) is not None
        and (value.dim() <= 2 if isinstance(value, Tensor) else isinstance(value, (int, float)))
        for name, value in numbers.items()
    )
