"""What `[[transforms]]` builds: a change of batches between the source and the normalisation.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from clt_plugins.data.batch import Batch


class Transform(Protocol):
    """A batch of raw activations in, a batch out: with other numbers, or with fewer rows.

    It is called wherever batches are read: for training, for the statistics of the normalisation, for the estimate of
    thresholds, and, where `held_out` says so, for everything that is measured on held-out tokens.

    One that changes over a run is also `Stateful`.
    """

    held_out: bool
    """Whether held-out batches are transformed too."""
    drops: bool
    """Whether it may return fewer rows than it is given. The engine then reads on until a training batch is full, and
    in every read the processes of all ranks wait for each other."""

    def __call__(self, batch: Batch, number: int) -> Batch:
        """The transformed batch; the one given, and its tensors, stay as they are.

        Args:
            batch: this data rank's rows of a batch of the source, or what the transforms before this one left of them;
                on the transcoder's device, but `token_ids` and `positions` where the source put them.
            number: of the source's batch, from 0, the same on all ranks and after a resume; -1, -2, ... for the
                batches of a held-out pass, in which its state must not change.

        Raises:
            Refused: the source's batches lack what it needs; says what, and what to do.
        """
