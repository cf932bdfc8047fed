"""Geometry for a store that is there already: one without it, or with that of other settings."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from clt_plugins.collected.geometry.compute import Geometry
from clt_plugins.collected.info import RECORD
from clt_plugins.collected.reader import Collected
from clt_plugins.collected.schema import FEATURES
from clt_plugins.collected.writer import CollectedWriter
from clt_plugins.errors import Refused
from clt_plugins.files.folders import atomic_folder


def fill_geometry(
    folder: Path,
    geometry: Geometry,
    spell: Callable[[Sequence[int]], Sequence[bytes]] | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Compute a store's geometry, and replace the store by one that has it; everything else stays as it is.

    Args:
        geometry: of the transcoder that the store was collected with; the caller looks to that.
        spell: gives the bytes of tokens, for those among the logits that are not in the text; None: their ids.
        progress: see `Geometry.layers`.

    Raises:
        Refused: there is no complete store, or the transcoder is of other sizes.
        OSError: it could not be written. The store is then as it was.
    """
    store = Collected.open(folder)
    transcoder, info = geometry.transcoder, store.info
    sizes, expected = (
        (one.n_layers, one.d_model, one.n_features)
        for one in (transcoder, info)  # type: ignore[attr-defined]
    )
    if sizes != expected:
        raise Refused(
            folder / RECORD,
            f"collected with a transcoder of {expected[0]} layers, d_model {expected[1]} and {expected[2]} features, "
            f"not {sizes[0]}, {sizes[1]} and {sizes[2]}: name that transcoder, or collect again",
        )

    def pieces(tokens: Sequence[int]) -> list[bytes]:
        known = dict(zip(store.vocabulary.token.tolist(), store.spell(store.vocabulary.token), strict=True))
        new = [token for token in tokens if token not in known]
        known.update(zip(new, [b"<%d>" % token for token in new] if spell is None else spell(new), strict=True))
        return [known[token] for token in tokens]

    with atomic_folder(folder) as partial:
        writer = CollectedWriter(partial, attrs.evolve(info, geometry=geometry.info))
        writer.text(store.text.ids, store.text.context, store.text.position)
        for layer in range(info.n_layers):
            _link(folder / FEATURES.format(layer), partial)
        for layer, arrays in geometry.layers(progress):
            writer.geometry(layer, arrays)
        writer.finish(pieces)


def _link(file: Path, into: Path) -> None:
    """The same file under another name, without a copy where the file system can do that."""
    try:
        os.link(file, into / file.name)
    except OSError:
        shutil.copyfile(file, into / file.name)
