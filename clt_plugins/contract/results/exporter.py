"""What `format` of the stage `export` builds: a format of another tool, written and perhaps read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    from torch import Tensor

    from clt_plugins.contract.model.tying import Tying


class Exporter(Protocol):
    """Writes a trained transcoder in another tool's format.

    It may also be one that `Checks`: then a format that cannot hold the transcoder is refused before training. A format
    that can be read back has a `Spec.reader`.
    """

    def export(self, transcoder: Any, folder: Any) -> None:
        """Write the files into an empty folder.

        Raises:
            Refused: the format cannot hold this transcoder; says why and what to do.
        """


@attrs.frozen(eq=False, kw_only=True)
class Imported:
    """A transcoder read from another tool's format."""

    kind: str
    """What it is, for people: "circuit-tracer folder with thresholds"."""
    n_layers: int
    d_model: int
    n_features: int
    activation: Mapping[str, Any]
    """The `[activation]` table that it amounts to."""
    tying: Mapping[str, Any]
    """The `[tying]` table."""
    model: Mapping[str, Any]
    """What is known of the language model, as in `[model]`."""
    tensor: Callable[[str], Tensor | None]
    """Returns a tensor of the transcoder by its name in files (`W_enc`, `W_dec.03`, `normaliser.input_scale`); called
    for one at a time. None leaves a statistic of the normaliser at its first value."""
    normalisation: Mapping[str, Any] | None = None
    """The `[normalisation]` table. If not given, it follows from the shifts and scales of inputs and targets [L, D]:
    "mean_std", or "none" where they change nothing."""
    decoder_bytes: int = 0
    """Bytes of the decoder on disk."""
    decoder: Callable[[Any], Tying] | None = None
    """Makes, from a `Context`, a tying that leaves the decoder on disk."""


# -- what may be besides: the engine asks by `isinstance` -----------------------------------------------------------


@runtime_checkable
class Checks(Protocol):
    """An exporter that can tell before training what its format could not hold."""

    def check(self, transcoder: Any) -> list[str]:
        """Complaints, each `setting: what is wrong: remedy`.

        Args:
            transcoder: as built, with thresholds where it is to be converted; its values mean nothing, and it may be
                on the device "meta".
        """


@runtime_checkable
class ReadsBack(Protocol):
    """An exporter that reads its format, so that `CrossLayerTranscoder.load` does.

    The engine asks the object that `Spec.reader` makes, without settings or a run.
    """

    def recognises(self, folder: Path) -> bool:
        """A quick look at the names of files: is it this format?"""

    def read(self, folder: Path) -> Imported:
        """What is in the folder.

        Raises:
            Refused: the files are not complete; says what is missing.
        """
