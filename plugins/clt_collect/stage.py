"""The stage `collect`: reads the text, and writes the store.

Memory: the pairs of one shard, 60 bytes each; 100 bytes for each token of the text; M and X numbers for each feature of
a layer; what the source needs. Disk: see `log`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch
from tqdm import tqdm

from clt_collect.layers import Layers, edges
from clt_collect.reading import read, together
from clt_collect.rows import Array, equal_windows, sort_rows
from clt_collect.written import Written
from clt_plugins import (
    CollectedWriter,
    CollectionInfo,
    CollectionSettings,
    CrossLayerTranscoder,
    Geometry,
    HasModel,
    Identified,
    ReadsResidual,
    Refused,
    SpellsBytes,
    StageInfo,
    Thresholded,
    generator,
)

if TYPE_CHECKING:
    from clt_collect import CollectConfig
    from clt_plugins import Job, LanguageModel, Parallel

logger = logging.getLogger(__name__)

LARGEST = 2**31 - 1
"""Tokens, and features of all layers: they are numbered in 32 bits."""


class Collect:
    """Writes a store."""

    def __init__(self, config: CollectConfig):
        self.config = config
        self.info = StageInfo(folder=config.folder, every=config.every, ranks=config.ranks, record="collected.json")

    def check(self, job: Job) -> None:
        config, transcoder = self.config, job.transcoder
        features = transcoder.n_layers * transcoder.n_features
        if max(config.tokens, features) > LARGEST:
            raise Refused("stages.collect.tokens", f"{max(config.tokens, features):,} is more than {LARGEST:,}")
        ranks = job.context.parallel.data_ranks
        if config.text == "training" and ranks > 1:
            raise Refused(
                "stages.collect.text",
                f'"training" is for one data rank, and there are {ranks}, each of which reads other tokens: use '
                '"held_out", or the command `collect`',
            )
        if job.source is not None:
            first = next(iter(job.source.held_out(2)), None)
            if first is not None and (first.token_ids is None or first.positions is None):
                raise Refused(
                    "stages.collect",
                    "the source does not say which tokens its activations belong to: use one that reads text",
                )

    def run(self, job: Job) -> None:
        config, transcoder = self.config, job.transcoder
        self.check(job)
        parallel = transcoder.context.parallel
        model = job.source.language_model() if isinstance(job.source, HasModel) else None
        settings = _settings(config, job.context.seed)
        geometry = self._geometry(job, model) if config.geometry else None
        logs = read(transcoder, job.source, config, job.work, _key(job), _store_bytes(transcoder, config))
        rows = sort_rows(logs, parallel.tensor_ranks)
        text = rows.text
        threshold = _threshold(transcoder)
        bounds = [one for log in logs for one in (log.commit.lowest, log.commit.highest) if one is not None]
        bins = edges(min(bounds, default=None), max(bounds, default=None), config.bins)
        info = CollectionInfo(
            tokens=len(text.ids),
            contexts=len(np.unique(text.context)),
            n_layers=transcoder.n_layers,
            d_model=transcoder.d_model,
            n_features=transcoder.n_features,
            settings=settings,
            edges=bins.tolist(),
            activation=transcoder.choices["activation"].name,
            thresholds=threshold is not None,
            spelled=model is not None,
            model=transcoder.model_described() or None,
            geometry=geometry.info if geometry is not None else None,
            made_from=job.made_from,
        )
        writer = CollectedWriter(job.folder, info)
        layers = Layers(
            logs,
            parallel.tensor_ranks,
            transcoder.n_features,
            rows,
            None if config.distinct is None else equal_windows(text, config.distinct),
            settings,
            _salts(settings.seed),
            bins,
            _joined(logs, job.work, parallel),
        )
        quiet = None if parallel.rank == 0 else True
        mine = range(parallel.rank, transcoder.n_layers, parallel.world)
        for layer in tqdm(mine, desc="examples", unit="layer", disable=quiet):
            arrays = layers.arrays(layer)
            if threshold is not None:
                arrays["threshold"] = threshold[layer]
            writer.features(layer, arrays)
        if parallel.rank > 0:
            return
        writer.text(text.ids, text.context, text.position)
        if geometry is not None:
            with tqdm(total=100, desc="geometry", unit="%", disable=quiet) as bar:
                for layer, computed in geometry.layers(lambda share: bar.update(int(100 * share) - bar.n)):
                    writer.geometry(layer, computed)
        writer.finish(_spell(model))
        job.show(_summary(info, layers.active), info)

    def _geometry(self, job: Job, model: LanguageModel | None) -> Geometry | None:
        """What computes the geometry; of several ranks, on rank 0 alone.

        Raises:
            Refused: it cannot be computed.
        """
        config, transcoder, parallel = self.config, job.transcoder, job.transcoder.context.parallel
        split = parallel.tensor_ranks > 1
        if split:
            transcoder.save(job.work / "transcoder")

        def make() -> Geometry | None:
            if parallel.rank > 0:
                return None
            complete = transcoder
            if split:
                complete = CrossLayerTranscoder.load(
                    job.work / "transcoder", device=str(transcoder.device), plugins=job.plugins
                )
            reads = model if isinstance(model, ReadsResidual) else None
            geometry = Geometry(complete, reads, similar=config.similar, virtual=config.virtual, logits=config.logits)
            minutes = geometry.seconds() / 60
            if minutes > LONG:
                text = "the geometry takes about %.0f minutes here: stages.collect.geometry = false leaves it out"
                logger.warning(text, minutes)
            return geometry

        try:
            return together(parallel, make)
        except Refused as refused:
            fault = refused.faults[0]
            if config.logits and fault.where[:1] == ("model",):
                raise Refused("stages.collect.logits", f"{fault.text}: set it to 0") from refused
            raise


LONG = 10.0
"""Minutes of geometry that are worth a warning."""


def _settings(config: CollectConfig, seed: int) -> CollectionSettings:
    names = attrs.fields_dict(CollectionSettings).keys() - {"seed"}
    return CollectionSettings(seed=seed, **{name: getattr(config, name) for name in names})


def _key(job: Job) -> Any:
    """What a log is of: it is gone on with only for the same transcoder, settings and data."""
    # The folder of another tool may have nothing to tell it by.
    unknown = uuid.uuid4().hex if job.made_from.transcoder.sha256 is None else ""
    data = dict(job.source.identity()) if isinstance(job.source, Identified) else {}
    return [attrs.asdict(job.made_from), unknown, data]


def _store_bytes(transcoder: CrossLayerTranscoder, config: CollectConfig) -> float:
    """About what the store takes on disk, without the text."""
    layers = transcoder.n_layers
    examples = config.top + config.groups * config.per_group
    # Four active tokens in the window of each example.
    one = (12 + 4 * 6) * examples + 8 * (config.bins + config.coactive)
    if config.geometry:
        one += 4 * layers * (layers + 2) + 8 * (config.similar + 2 * config.virtual) + 16 * (layers + 1) * config.logits
    return float(layers * transcoder.n_features * one)


def _salts(seed: int) -> tuple[int, int]:
    groups, tokens = (
        int(torch.randint(2**62, (1,), generator=generator(seed, "collect", name))) for name in ("groups", "tokens")
    )
    return groups, tokens


def _threshold(transcoder: CrossLayerTranscoder) -> Array | None:
    """The thresholds of all features, [L, F] float32; None if the activation has none."""
    if not isinstance(transcoder.activation, Thresholded):
        return None
    own = transcoder.own
    threshold = torch.zeros(transcoder.n_layers, transcoder.n_features)
    threshold[:, own.start : own.stop] = transcoder.activation.threshold().detach().float().cpu()
    out: Array = transcoder.context.parallel.total(threshold, over="features").numpy()
    return out


def _joined(logs: Sequence[Written], folder: Path, parallel: Parallel) -> Array:
    """The active features of all rows, of all ranks."""
    if len(logs) == 1:
        return logs[0].columns["feature"]
    file = folder / "feature.bin"

    def join() -> None:
        if parallel.rank == 0:
            with file.open("wb") as out:
                for log in logs:
                    log.columns["feature"].tofile(out)

    together(parallel, join)
    count = sum(len(log.columns["feature"]) for log in logs)
    return np.memmap(file, np.int32, "r", shape=(count,)) if count else np.empty(0, np.int32)


def _spell(model: LanguageModel | None) -> Callable[[Sequence[int]], Sequence[bytes]] | None:
    if model is None or isinstance(model, SpellsBytes):
        return None if model is None else model.spell_bytes
    return lambda ids: [text.encode() for text in model.spell(list(ids))]


def _summary(info: CollectionInfo, active: Array) -> str:
    """A line for people."""
    dead, pairs = (active == 0).mean(), active.sum()
    return (
        f"{info.tokens:,} tokens in {info.contexts:,} contexts, {pairs / info.tokens:.1f} active features per token; "
        f"{active.size:,} features, {dead:.1%} of them never active"
    )
