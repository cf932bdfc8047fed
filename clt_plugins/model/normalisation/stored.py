"""A normalisation in files: what it may hold, which stored numbers are refused, and what another tool's amount to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clt_plugins.errors import PluginError, Refused
from clt_plugins.model.normalisation.affine import AffineNormalisation
from clt_plugins.model.normalisation.statistics import unusable

if TYPE_CHECKING:
    from clt_plugins.contract.results.exporter import Imported
    from clt_plugins.contract.spec import Selected


def check_buffers(normaliser: Any, chosen: Selected) -> None:
    """Whether all numbers of a normalisation are buffers, under names that files can hold.

    Raises:
        PluginError: they are not.
    """
    if not isinstance(normaliser, nn.Module):
        text = f"is {type(normaliser).__name__}, not a torch.nn.Module: its statistics would not be saved"
    elif trained := next((name for name, _ in normaliser.named_parameters()), None):
        text = f"has a parameter {trained!r}: a normalisation is fitted, not trained; make it a buffer"
    elif "target_variance" in dict(normaliser.named_buffers()):
        text = "has a buffer 'target_variance', which is a name of the engine's in files: rename it"
    else:
        return
    raise PluginError(f"normalisation: {chosen.name!r} of {chosen.choice}: {text}", where=("normalisation",))


def check_stored(transcoder: Any, origin: str | Path) -> None:
    """Refuse statistics from a file that no activation can be normalised with.

    Args:
        transcoder: a `CrossLayerTranscoder`; this module stands below it.
        origin: the file.

    Raises:
        Refused: a number is not finite, or a scale is not positive; names layer and dimension.
    """
    wrongs = {name: not_finite(value) for name, value in transcoder.statistics().items()}
    # A layer that writes nothing has a variance of 0 in other tools' files.
    wrongs["target_variance"] = unusable(transcoder.target_variance, negative=False)
    for name, wrong in wrongs.items():
        if wrong:
            raise Refused(origin, f"normaliser.{name}: {wrong}: the file is damaged, or was written by a broken run")
    if isinstance(transcoder.normaliser, AffineNormalisation):
        transcoder.normaliser.check_stored(origin)


def not_finite(value: Tensor) -> str:
    """Where a buffer is not finite; "" where it is, or has no floating-point numbers."""
    return unusable(value, negative=True) if value.is_floating_point() else ""


def detected_normalisation(imported: Imported) -> str:
    """The normalisation that the shifts and scales of another tool amount to: "none" or "mean_std"."""
    for side in ("input", "target"):
        for name, first in (("shift", 0), ("scale", 1)):
            value = imported.tensor(f"normaliser.{side}_{name}")
            if value is not None and bool((value != first).any()):
                return "mean_std"
    return "none"
