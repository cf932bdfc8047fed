"""A new transcoder's first weights, from those of an earlier one.

What the earlier one computes stays what it was, where that can be: features keep their rows, and whatever is added
writes nothing. So the decoder rows of added features and layers begin at 0, and their encoder rows as in a new run.

Shapes: L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.errors import Refused
from clt_plugins.model.warm_start.exact import ways
from clt_plugins.model.warm_start.fit import fit
from clt_plugins.model.warm_start.units import Units
from clt_plugins.toml import inline

if TYPE_CHECKING:
    from clt_plugins.model.transcoder import CrossLayerTranscoder

logger = logging.getLogger(__name__)


class WarmStart:
    """What `[transcoder] from` does to a run's transcoder.

    Args:
        new: the run's, freshly built.
        old: with all features, on the CPU.
        keep_statistics: whether the earlier transcoder's statistics are kept. They are only where both have the same
            normalisation.

    Raises:
        Faults: they do not fit, or a part of the earlier one has no exact counterpart; says which and what to do.
    """

    def __init__(self, new: CrossLayerTranscoder, old: CrossLayerTranscoder, *, keep_statistics: bool = True):
        self.new, self.old = new, old
        self.fit = fit(new, old)
        self.ways = ways(new, old, self.fit, keep_statistics=keep_statistics)

    @property
    def needs_statistics(self) -> bool:
        """Whether the new transcoder must be fitted to its source first."""
        return not self.ways.keeps_statistics or self.fit.adds_layers

    @torch.no_grad()
    def begin(self) -> None:
        """Make the new transcoder compute what the earlier one does, and release the latter.

        Raises:
            Refused: other settings of an encoder or a tying make other rows of the same tensors; or features of an
                added layer would write into layers that there were; or a plugin's tensors do not say which of their
                numbers belong to which layer.
        """
        if self.ways.keeps_statistics:
            self._statistics()
        self._weights()
        for part in ("encoder", "tying"):
            if self.ways.copied[part] and self.new.choices[part].config != self.old.choices[part].config:
                self._check_same(part)
        if self.fit.adds_layers:
            self._check_added()
        for text in self._changes():
            logger.warning("transcoder.from: the function changes: %s", text)
        del self.old

    def _statistics(self) -> None:
        """Those of the layers that there were."""
        theirs = {**self.old.statistics(), "target_variance": self.old.target_variance}
        for name, mine in {**self.new.statistics(), "target_variance": self.new.target_variance}.items():
            self._put(mine, theirs[name], None)

    def _weights(self) -> None:
        old, new, copied = self.old, self.new, self.ways.copied
        theirs, axes, mine = old.tensors(), new.feature_axes(), new.tensors()
        units = None if all(copied.values()) else Units(new, old, self.fit.layers)
        for name in new.encoder.views():
            if copied["encoder"]:
                value = theirs.get(name)
            else:
                assert units is not None
                which = ("W_enc", "b_enc").index(name)
                value = torch.stack([units.encoder(layer)[which] for layer in range(old.n_layers)])
            if value is not None:
                self._put(mine[name], value, axes[name])
        affine = (
            dict(zip(("b_dec", "W_skip"), units.affine(), strict=True)) if units and not copied["tying"] else theirs
        )
        for name in new.tying.views():
            if name.startswith("W_"):
                mine[name].zero_()
            if match := re.fullmatch(r"W_dec\.(\d+)", name):
                self._rows(mine[name], int(match[1]), None if copied["tying"] else units)
            elif (value := affine.get(name)) is not None:
                self._put(mine[name], value, axes[name])
        for name in new.tensors().keys() - new.encoder.views().keys() - new.tying.views().keys():
            if not name.startswith("normaliser.") and name in theirs:  # thresholds, and what an activation counts
                self._put(mine[name], theirs[name], axes[name])

    def _put(self, mine: Tensor, theirs: Tensor, axis: int | None) -> None:
        """Copy a tensor with all features of the earlier transcoder into this rank's part of the new one's.

        Args:
            axis: the one that counts features.
        """
        shapes = f"a tensor of shape {list(theirs.shape)}, where this run has {list(mine.shape)}"
        theirs = theirs.to(mine)
        if axis is not None and mine.dim() == theirs.dim():
            first, last = self.new.own.start, min(self.new.own.stop, self.fit.old_features)
            if first >= last:
                return  # this rank has added features only
            mine, theirs = mine.narrow(axis, 0, last - first), theirs.narrow(axis, first, last - first)
        if mine.shape == theirs.shape:
            mine.copy_(theirs)
        elif mine.shape[1:] == theirs.shape[1:] and (len(mine), len(theirs)) == (self.fit.n_layers, self.old.n_layers):
            mine[torch.tensor(self.fit.layers, device=mine.device)] = theirs
        else:
            raise Refused("transcoder.from", f"has {shapes}: it cannot be continued")

    def _rows(self, mine: Tensor, source: int, units: Units | None) -> None:
        """The decoder rows of one layer, [F, L - source, D]; rows for added targets stay 0."""
        if source not in self.fit.layers:
            return
        layer = self.fit.layers.index(source)
        rows = self.old.tying.expand(layer) if units is None else units.decoder(layer)
        targets = torch.tensor([target - source for target in self.fit.layers[layer:]], device=mine.device)
        out = mine.new_zeros(rows.shape[0], *mine.shape[1:])
        out[:, targets] = rows.to(mine)
        self._put(mine, out, 0)

    def _check_same(self, part: str) -> None:
        """The same tensors with other settings must make the same rows: a factor may have been added, or left out."""
        first, last = self.new.own.start, min(self.new.own.stop, self.fit.old_features)
        mine, theirs = slice(0, max(0, last - first)), slice(first, max(first, last))
        for old_layer, layer in enumerate(self.fit.layers):
            now: tuple[Tensor, ...]
            before: tuple[Tensor, ...]
            if part == "encoder":
                now = self.new.encoder.expand(layer, self.new.tying)
                before = self.old.encoder.expand(old_layer, self.old.tying)
            else:
                targets = [target - layer for target in self.fit.layers[old_layer:]]
                now = (self.new.tying.expand(layer)[:, targets],)
                before = (self.old.tying.expand(old_layer),)
            for one, other in zip(now, before, strict=True):
                kept, wanted = one[mine].double().cpu(), other[theirs].double()
                # What is the same differs by rounding to the type of the weights.
                if float((kept - wanted).norm()) > 2 * torch.finfo(self.new.context.dtype).eps * float(wanted.norm()):
                    settings = _differing(self.new.choices[part].config, self.old.choices[part].config)
                    text = f"with these settings it does not compute what transcoder.from does: write {settings}"
                    raise Refused(part, text)

    def _check_added(self) -> None:
        """Features of added layers must not write where the earlier transcoder did."""
        for layer in set(range(self.fit.n_layers)) - set(self.fit.layers):
            later = [target - layer for target in self.fit.layers if target > layer]
            if later and bool(self.new.tying.expand(layer)[:, later].any()):
                name = self.new.choices["tying"].name
                text = f"{name!r} shares rows between the features of an added layer and those that there were"
                raise Refused("tying", f'{text}: choose "untied"')

    def _changes(self) -> list[str]:
        """What changes the function, a sentence each; empty where it stays what it was."""
        out = []
        before, now = (one.choices["activation"] for one in (self.old, self.new))
        if before.name != now.name or before.config != now.config:
            out.append(f"activation: {before.name} there; here {now.name}, or other settings of it")
        if (self.fit.widens or self.fit.adds_layers) and self.new.activation.fixed_size:
            out.append(f"{now.name}: added features compete with the others for k, unless it ranks by decoder norm")
        return out


def _differing(now: Any, before: Any) -> str:
    """The settings of an earlier choice that a new one has otherwise, as a recipe has them."""
    old, new = attrs.asdict(before), attrs.asdict(now)
    return ", ".join(f"{name} = {inline(value)}" for name, value in old.items() if new.get(name) != value)
