"""What `[normalisation]` builds: how raw activations become those that the transcoder works on, and back.

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.data.affine import Affine, Folding
    from clt_plugins.data.batch import Batch


class Normalisation(Protocol):
    """Normalises MLP inputs and outputs. It is a `torch.nn.Module` whose numbers are buffers, without parameters.

    Buffers are saved as `normaliser.NAME`, and all ranks have all of them. They are fitted once, before the first step,
    and never change afterwards. `AffineNormalisation` has all but `needs` and `fit`.

    Inputs may be normalised in any way that each token allows. The targets' side must be affine and the same for all
    tokens, since nobody knows the targets of a token that is reconstructed.

    It may also be `Observes`: then it gathers statistics of its own.
    """

    @property
    def needs(self) -> Sequence[str]:
        """Which statistics `fit` reads: of "mean", "std", "rms" and "norm". An attribute of the class will do."""

    def fit(self, statistics: Mapping[str, Tensor]) -> None:
        """Set the buffers from statistics of raw activations, of all ranks, in float64 on the CPU: those of each side
        from its own.

        Args:
            statistics: `mean` and `std` [L, D] of each dimension, `rms` [L], the root of the mean square over tokens
                and dimensions, and `norm` [L], the mean over tokens of a token's norm; each under `inputs.` and
                `targets.`. Those that `needs` names are there, all are finite.

        Raises:
            Refused: they cannot be used; says why and what to do.
        """

    def inputs(self, raw: Tensor) -> Tensor:
        """Raw MLP inputs [B, L, D] of any floating type -> normalised, in the type of the statistics; differentiable.

        `raw` must not be changed; it may be returned as it is where nothing is to be done. Layer l of a token may
        depend on layers up to l of that token only: in a language model later ones are not there yet.
        """

    def targets(self, raw: Tensor) -> Tensor:
        """Raw MLP outputs [B, L, D] -> normalised, like `inputs`."""

    def restore(self, normalised: Tensor) -> Tensor:
        """Normalised outputs [B, L, D], such as a reconstruction, in raw units; differentiable."""

    def units(self) -> Affine:
        """What `targets` and `restore` do; called in every step, so it must not compute."""

    def fold(self) -> Folding:
        """What is done to inputs and targets, from the statistics as they are: exporters fold it into the weights.

        Raises:
            Refused: `inputs` is not affine, or not the same for all tokens; names the setting, says what to do. On the
                device "meta" as well: exporters ask before training.
        """


# -- what may be besides: the engine asks by `isinstance` -----------------------------------------------------------


@runtime_checkable
class Observes(Protocol):
    """A normalisation that gathers statistics of its own, such as a covariance or quantiles."""

    def observe(self, batch: Batch) -> None:
        """Read a batch of raw activations, on the CPU; its numbers are shared and must not be changed.

        It is called before `fit` for the first batches of the run, and on each data rank for that rank's tokens:
        `fit` joins what the ranks gathered, by `context.parallel.total(x, over="tokens")`. All ranks are handed as many
        batches. What is gathered is no buffer, and not saved.
        """

    def observed_bytes(self) -> int:
        """Bytes of what is gathered on the transcoder's device, for a plan; asked on the device "meta"."""
