"""Which parts of an earlier transcoder can be taken exactly, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from clt_plugins.contract.model.tying import Shifted
from clt_plugins.errors import Fault, Faults, Refused

if TYPE_CHECKING:
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.model.warm_start.fit import Fit

UNTIED = re.compile(r"W_dec\.\d+|b_dec|W_skip")
"""The names in files of a decoder that has a row for each target."""
PLAIN = {"W_enc", "b_enc"}
"""Those of an encoder that is a matrix and a bias."""


@attrs.frozen
class Ways:
    """How each part gets its weights."""

    keeps_statistics: bool
    """Whether statistics are those of the earlier transcoder; else they are new, and weights are converted to them."""
    copied: Mapping[str, bool]
    """By part: whether tensors are taken as they are, by name; else they are computed from its matrices."""


def ways(new: CrossLayerTranscoder, old: CrossLayerTranscoder, fit: Fit, *, keep_statistics: bool) -> Ways:
    """Compare the choices of two transcoders.

    Raises:
        Faults: a part of the earlier one has no exact counterpart; says which and what to do.
    """
    same = {part: new.choices[part].name == old.choices[part].name for part in new.choices}
    equal = new.choices["normalisation"].config == old.choices["normalisation"].config
    keeps = keep_statistics and same["normalisation"] and equal
    has, had = _names(new), _names(old)
    copied = {"activation": True, "encoder": same["encoder"] and keeps, "tying": same["tying"] and keeps}
    computed = {"encoder": has["encoder"] == PLAIN, "tying": all(map(UNTIED.fullmatch, has["tying"]))}
    faults: list[Fault] = []
    for part in has:
        lost = sorted(had[part] - has[part]) if copied[part] else []
        if lost:
            text = f"transcoder.from has {', '.join(lost)}, which this {part} lacks: choose the {part} that it has"
            faults.append(Fault((part,), text))
        elif not copied[part] and not computed[part]:
            faults.append(Fault((part,), _inexact(new, old, part, same[part])))
    if not copied["tying"] and computed["tying"]:
        faults += _lost_by_rows(new, old)
    # Decoder rows of added features begin at 0: an encoder that is made of them would be 0 too, and stay so.
    axes, tensors = new.feature_axes(), new.tensors()
    rows = [name for name in has["encoder"] if axes[name] is not None and tensors[name].dim() > 2]
    if fit.widens and not rows:
        name = new.choices["encoder"].name
        text = f"features can be added only to an encoder with rows of its own, and {name!r} has none"
        faults.append(Fault(("encoder",), text))
    if faults:
        raise Faults(faults)
    return Ways(keeps, copied)


def _names(transcoder: CrossLayerTranscoder) -> dict[str, set[str]]:
    """The names in files of each part's parameters."""
    out = {"encoder": set(transcoder.encoder.views()), "tying": set(transcoder.tying.views())}
    return out | {"activation": transcoder.views().keys() - out["encoder"] - out["tying"]}


def _inexact(new: CrossLayerTranscoder, old: CrossLayerTranscoder, part: str, same: bool) -> str:
    name = new.choices[part].name
    if same:
        return (
            f"{name!r} cannot be converted to other statistics of the normalisation: choose the normalisation of "
            'transcoder.from, and leave transcoder.statistics at "kept"'
        )
    before, any_ = old.choices[part].name, '"plain"' if part == "encoder" else '"untied"'
    return f"{name!r} cannot hold exactly what {before!r} of transcoder.from computes: choose {before!r}, or {any_}"


def _lost_by_rows(new: CrossLayerTranscoder, old: CrossLayerTranscoder) -> list[Fault]:
    """What a decoder has besides its rows, and the new one has no parameter for."""
    faults = []
    if "W_skip" in old.tying.views() and "W_skip" not in new.tying.views():
        faults.append(Fault(("tying",), "transcoder.from has a skip path: set tying.skip = true"))
    if isinstance(old.tying, Shifted) and _shifts(old.tying, old.n_layers):
        name = old.choices["tying"].name
        text = f"transcoder.from adds offsets to features, which decoder rows cannot hold: choose {name!r}"
        faults.append(Fault(("tying",), text))
    return faults


def _shifts(tying: Shifted, n_layers: int) -> bool:
    """Whether something is added to active features before the rows."""
    try:
        return any(tying.shift(layer) is not None for layer in range(n_layers))
    except Refused:  # it differs between targets
        return True
