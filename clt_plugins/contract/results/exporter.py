"""What `format` of the stage `export` builds: a format of another tool, written and perhaps read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

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
