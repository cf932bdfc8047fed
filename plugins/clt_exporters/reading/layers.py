"""A transcoder in another tool's files, layer by layer, as the engine asks for it.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_exporters.reading.on_disk import Mapped, Rows
from clt_plugins import Context, Imported, Refused

if TYPE_CHECKING:
    from clt_plugins import Tying

OfLayer = Callable[[int], Tensor]
"""A tensor of a layer, read when it is asked for."""


@attrs.frozen(eq=False, kw_only=True)
class Layers:
    """What a format holds, in the units that it computes in."""

    folder: Path
    """For errors."""
    n_layers: int
    d_model: int
    n_features: int
    W_enc: OfLayer
    """[F, D]."""
    rows: Callable[[int], Rows]
    """Of a source layer's features, for all its targets, or for its own layer only."""
    b_enc: OfLayer | None = None
    """[F]; None for 0."""
    b_dec: OfLayer | None = None
    """Of a layer as a target, [D]; None for 0."""
    threshold: OfLayer | None = None
    """[F], of jumprelu."""
    W_skip: OfLayer | None = None
    """[D, D], applied as x W_skip; None without a skip path."""
    own_layer: bool = False
    """Whether features write to their own layer only: `per_layer` in place of `untied`."""
    tied: str | None = None
    """"per_source" or "per_target" where one matrix [F, D] serves several pairs of layers: `rows` has one target then,
    and the decoder cannot stay on disk."""
    input_scale: Tensor | None = None
    """What inputs are divided by, [L]; None for 1."""
    target_scale: Tensor | None = None
    """What reconstructions are multiplied by, [L]; None for 1."""
    norms: Tensor | None = None
    """‖decoder‖ of each feature [L, F], where the files have them."""
    only_on_disk: bool = False
    """Whether the decoder can do more than an untied one can (offsets), and so must stay on disk."""

    def imported(
        self,
        kind: str,
        activation: Mapping[str, Any],
        model: Mapping[str, Any],
        decoder_bytes: int,
        *,
        hooks: Mapping[str, str | None] | None = None,
    ) -> Imported:
        """What the engine reads.

        Args:
            hooks: what is read ("input") and written ("output"), as TransformerLens names it within a block.
        """
        tying = {"name": self.tied or ("per_layer" if self.own_layer else "untied")}
        known = {side: name for side, name in (hooks or {}).items() if name}
        described = {**model, "hooks": known} if known else dict(model)
        return Imported(
            kind=", ".join([kind, *(f"{side} {name}" for side, name in known.items())]),
            n_layers=self.n_layers,
            d_model=self.d_model,
            n_features=self.n_features,
            activation=activation,
            tying={**tying, "skip": True} if self.W_skip is not None else tying,
            model=described,
            tensor=self.tensor,
            decoder_bytes=2**62 if self.only_on_disk else decoder_bytes,
            decoder=self.mapped if self.tied is None else None,
        )

    def tensor(self, name: str) -> Tensor | None:
        """A tensor by the engine's name; None for a statistic that the format does not have.

        Raises:
            Refused: it is missing, or cannot be held.
        """
        if name.startswith("normaliser."):
            scale = {"input_scale": self.input_scale, "target_scale": self.target_scale}.get(name.partition(".")[2])
            return None if scale is None else scale.float()[:, None].expand(-1, self.d_model)
        if name.startswith("W_dec."):
            return self.rows(int(name.removeprefix("W_dec."))).all()
        if name == "W_dec":
            return torch.stack([self.rows(layer).all()[:, 0].float() for layer in range(self.n_layers)])
        if name == "log_threshold":
            return self._thresholds().log()
        sizes = {"b_enc": self.n_features, "b_dec": self.d_model}
        of_layer: OfLayer | None = getattr(self, name)
        if of_layer is None:  # some trainers have no biases
            return torch.zeros(self.n_layers, sizes[name])
        return self._stack(of_layer)

    def mapped(self, context: Context) -> Tying:
        """The decoder, left on disk."""
        bias, skip = self.tensor("b_dec"), None if self.W_skip is None else self.tensor("W_skip")
        assert bias is not None
        rows = [self.rows(layer) for layer in range(self.n_layers)]
        return Mapped(context, rows, bias, skip=skip, own_layer=self.own_layer, norms=self.norms)

    def _thresholds(self) -> Tensor:
        assert self.threshold is not None
        threshold = self._stack(self.threshold)
        if bool((threshold < 0).any()):
            layer, feature = (threshold < 0).nonzero()[0].tolist()
            raise Refused(
                self.folder,
                f"threshold_{layer}[{feature}] is {float(threshold[layer, feature]):g}: thresholds below zero cannot "
                "be loaded",
            )
        return threshold

    def _stack(self, of_layer: OfLayer) -> Tensor:
        """[L, ...] in float32."""
        return torch.stack([of_layer(layer).float() for layer in range(self.n_layers)])
