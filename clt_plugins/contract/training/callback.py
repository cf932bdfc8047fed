"""What `[[callbacks]]` builds: what acts on a run between its steps."""

from __future__ import annotations

from typing import Protocol


class Callback(Protocol):
    """Acts between the steps of a run, by the operations of `Training`, which are exact on any number of ranks.

    It has one or more of these methods. Each is called on every rank, in the order of the recipe's list:

    `start(run)`
        Once, before the first step of this process. `run.step` is above 0 where a run is resumed: weights are those of
        the checkpoint then, and an initialisation must not act. Buffers that depend on the transcoder are made here;
        what the checkpoint holds of the callback is put into them afterwards.
    `before(run)`
        Before a step, where so many steps are done that `every` divides them: 0, every, 2 * every, ...
    `after(run, step)`
        After a step that `every` divides, before its log, evaluation and checkpoint. `step` is a `Step`.
    `evaluated(run, metrics)`
        After each evaluation on held-out tokens; `metrics` is what was logged, by name (`eval/nmse`).
    `finish(run)`
        At the end, before the transcoder is saved and the stages run; not where a run is interrupted. A finished run
        that is resumed comes here without a step. Where it changes weights, the transcoder is evaluated once more.
    `state_bytes(transcoder)`
        Bytes that it keeps on the transcoder's device, on this rank, for a plan; the transcoder may be on "meta".

    What it keeps from step to step is saved as it is for every plugin: parameters and buffers of a `torch.nn.Module`,
    and `Stateful` data.
    """

    every: int
    """Steps between calls of `before` and `after`; 0 where it has neither."""
