"""When callbacks are called. Without callbacks there is no `Calls`, and the loop calls nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from clt_plugins.model.parameters import note_axes
from clt_plugins.registry.build import plugin_error
from clt_plugins.training.between.run import Training

if TYPE_CHECKING:
    from clt_plugins.contract.training.callback import Callback
    from clt_plugins.contract.training.metric import Step
    from clt_plugins.model.assemble import Parts
    from clt_plugins.training.saved.checkpoint import Progress

MEMBERS = ("start", "before", "after", "evaluated", "finish")


class Calls:
    """The callbacks of a run.

    Raises:
        PluginError: an object has none of the methods of a callback, or its `every` does not fit them.
    """

    def __init__(self, parts: Parts, optimizer: torch.optim.Optimizer, progress: Progress, steps: int):
        self.run = Training(parts, optimizer, progress, steps)
        self.callbacks: list[Callback] = parts.callbacks
        recipe = parts.context.recipe
        self.asked = True
        """Whether a callback was called since the last decision; the same on all ranks."""
        self.evaluates: Callback | None = None
        """The one whose weights evaluations are made with."""
        chosen = [] if recipe is None else recipe.callbacks
        for number, (callback, one) in enumerate(zip(self.callbacks, chosen, strict=True)):
            if text := misfit(callback):
                raise plugin_error(one.choice, f"callbacks[{number}]", text)

    def start(self) -> None:
        """Before the first step of this process."""
        for callback in self._with("start"):
            before = self.run._evaluation
            callback.start(self.run)
            if self.run._evaluation is not before:
                self.evaluates = callback
            if isinstance(callback, torch.nn.Module):
                note_axes(callback)  # of buffers that were made just now

    def before(self) -> None:
        """Before a step."""
        for callback in self._with("before", self.run.step):
            callback.before(self.run)

    def after(self, make: Callable[[], Step]) -> None:
        """After a step.

        Args:
            make: says what was done in it; asked only where a callback is due.
        """
        due = self._with("after", self.run.step)
        step = make() if due else None
        for callback in due:
            callback.after(self.run, step)

    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """After an evaluation, before it is logged."""
        self.run.metrics.update(metrics)
        for callback in self._with("evaluated"):
            callback.evaluated(self.run, metrics)

    def finish(self) -> bool:
        """At the end. Returns whether weights were changed in a way that no evaluation has seen."""
        changed = False
        finishing = self._with("finish")
        for callback in finishing:
            before = self._versions()
            callback.finish(self.run)
            changed |= callback is not self.evaluates and self._versions() != before
        if not finishing:
            return False
        # A rank may have none of the features that were changed.
        return bool(self.run.parallel.total(torch.tensor(int(changed)), over="all", what="agreement") > 0)

    def _versions(self) -> list[int]:
        """How often each parameter was written to."""
        return [parameter._version for parameter in self.run.transcoder.parameters()]

    def evaluating(self) -> AbstractContextManager[None]:
        """A block in which the transcoder has the weights that evaluations are to be made with."""
        return self.run._evaluating()

    def decide(self, due: dict[str, bool]) -> dict[str, bool]:
        """What happens after this step, as callbacks wish: the same on all ranks, which all call it.

        If one wants to stop, `progress.stopped` says why, and all that a last step has is due. Where none was called,
        ranks exchange nothing.
        """
        if not self.asked:
            return due
        self.asked = False
        run = self.run
        told = torch.tensor([int(bool(run._reason)), int(run._checkpoint)])
        stop, checkpoint = (run.parallel.total(told, over="all", what="agreement") > 0).tolist()
        if stop:
            reasons = run.parallel.gather(run._reason)
            run._progress.stopped = next(filter(None, reasons))
        run._reason, run._checkpoint = "", False
        return {name: on or stop or (name == "checkpoint" and checkpoint) for name, on in due.items()}

    @property
    def waiting(self) -> bool:
        """Whether callbacks have logged something that no record has yet."""
        return bool(self.run._logged)

    def records(self, metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What is to be logged now: some numbers, and with them those that callbacks have logged since the last call.

        It is one record, but where a name comes again: two callbacks of one kind, or several calls between two steps.
        """
        together = [dict(metrics), *self.run._logged]
        self.run._logged.clear()
        record: dict[str, Any] = {}
        for numbers in together:
            if record.keys() & numbers.keys():
                yield record
                record = {}
            record |= numbers
        yield record

    def note(self, metrics: Mapping[str, Any]) -> None:
        """Let callbacks know what was logged."""
        self.run.metrics.update(metrics)

    def _with(self, member: str, step: int | None = None) -> list[Any]:
        """The callbacks that have a method; of those with an interval, that are due after so many steps."""
        found = [
            callback
            for callback in self.callbacks
            if hasattr(callback, member) and (step is None or (callback.every and step % callback.every == 0))
        ]
        self.asked |= bool(found)
        return found


def misfit(callback: Any) -> str:
    """Why an object is no callback; "" if it is one."""
    has = [name for name in MEMBERS if callable(getattr(callback, name, None))]
    if not has:
        return f"{type(callback).__name__} has none of the methods of a callback: {', '.join(MEMBERS)}"
    if type(callback.every) is not int or callback.every < 0:
        return f"its `every` must be a number of steps, 0 or more: {callback.every!r}"
    timed = [name for name in ("before", "after") if name in has]
    if bool(callback.every) != bool(timed):
        return (
            f"its `every` is 0, so that `{timed[0]}` would never be called: say after how many steps"
            if timed
            else f"its `every` is {callback.every}, but it has neither `before` nor `after`: set it to 0"
        )
    return ""
