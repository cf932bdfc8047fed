"""`[transcoder] from`: the transcoder that a run begins with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from clt_plugins.errors import Faults, Refused
from clt_plugins.finished.find import find_trained
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.model.warm_start.weights import WarmStart

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.model.assemble import Parts
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)


def warm_start(parts: Parts, recipe: Recipe, plugins: Plugins) -> WarmStart | None:
    """Load the transcoder that a recipe begins with, and compare it with the run's; None if it names none.

    Of a run it is the final one before any conversion. Each rank loads all of it into the host's memory.

    Raises:
        Faults: there is none, or it does not fit; says why and what to do.
    """
    settings = recipe.transcoder
    if settings.from_ is None:
        if settings.statistics != "kept":
            raise Refused("transcoder.statistics", 'is for a transcoder that begins `from` another: leave it at "kept"')
        return None
    try:
        folder = find_trained(Path(settings.from_), plugins, converted=False).folder
        old = CrossLayerTranscoder.load(folder, plugins=plugins, lazy=False)
    except Faults as refused:
        raise Refused("transcoder.from", str(refused)) from refused
    logger.info("transcoder.from: %s, %s layers of %s features", folder, old.n_layers, f"{old.n_features:,}")
    return WarmStart(parts.transcoder, old, keep_statistics=settings.statistics == "kept")
