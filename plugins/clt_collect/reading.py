"""The pass over text: batches of the source, encoded, into the log of each rank.

Held-out batches are dealt to the data ranks in turn, whole, so that a selection over a batch is the same for any number
of ranks. Tensor ranks encode the same batch, each its features. After each round the ranks agree on whether to write a
shard, so that their commits are those of the same batches.

Shapes: B rows of a batch, L layers, F features per layer, N pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clt_collect.log import SHARD, Commit, Log, disk_bytes, free_bytes
from clt_collect.written import Written
from clt_plugins import Refused

if TYPE_CHECKING:
    from clt_collect import CollectConfig
    from clt_plugins import Batch, CrossLayerTranscoder, Features, Parallel, Source

Array = np.ndarray[Any, Any]
T = TypeVar("T")


@torch.no_grad()
def read(
    transcoder: CrossLayerTranscoder, source: Source, config: CollectConfig, folder: Path, key: Any, store_bytes: float
) -> list[Written]:
    """Read the text, or go on with it; returns the complete logs of all ranks, in their order.

    Args:
        folder: where the logs are. It is made if it is not there.
        key: what the logs are of, as plain data.
        store_bytes: what the result will take on the same disk.

    Raises:
        Refused: the source does not know its tokens, or has none; or the disk is too small.
        OSError: a log cannot be written.
    """
    parallel = transcoder.context.parallel
    folder.mkdir(parents=True, exist_ok=True)
    n_layers, own = transcoder.n_layers, transcoder.own
    ranks = [parallel.tensor_ranks, parallel.data_ranks]
    log = Log(folder, parallel.rank, n_layers * len(own), [key, ranks])
    try:
        rounds = _Rounds(transcoder, source, config, log, store_bytes)
        rounds.run()
        commits = _gathered(parallel, log)
    finally:
        log.close()
    if not sum(commit.rows for commit in commits):
        raise Refused("source", f"has no {config.text.replace('_', '-')} text to collect from")
    shards = [range(first, last) for first, last in exchange(parallel, [own.start, own.stop])]
    return [Written.open(log, commit, rank, shards[rank], n_layers) for rank, commit in enumerate(commits)]


class _Rounds:
    """A pass over text in rounds: one batch for each data rank."""

    def __init__(
        self, transcoder: CrossLayerTranscoder, source: Source, config: CollectConfig, log: Log, store_bytes: float
    ):
        self.transcoder, self.source, self.config, self.log = transcoder, source, config, log
        self.parallel = transcoder.context.parallel
        self.store_bytes = store_bytes
        self.checked = False
        """Whether the disk was looked at."""

    def run(self) -> None:
        common = set.intersection(*(set(one) for one in exchange(self.parallel, [c.batches for c in self.log.commits])))
        start = self.log.begin(max(common))
        if start.complete:
            return
        held_out = self.config.text == "held_out"
        batches = self._held_out(start.batches) if held_out else self._training(start.batches, start.source)
        done = sum(rows for (rows,) in exchange(self.parallel, [start.rows])) // self.parallel.tensor_ranks
        quiet = None if self.parallel.rank == 0 else True
        with (
            # A selection over a batch is over this rank's own batch, not over those of all data ranks.
            self.parallel.apart() if held_out else nullcontext(),
            tqdm(
                total=self.config.tokens, initial=done, desc="reading", unit="tok", unit_scale=True, disable=quiet
            ) as bar,
        ):
            number = start.batches
            for number, tokens, batch in batches:
                self._round(number, batch)
                bar.update(tokens)
            self.log.write(number, None, complete=True)

    def _held_out(self, first: int) -> Iterator[tuple[int, int, Batch | None]]:
        """Rounds: the number of batches read after each, their tokens, and the batch of this rank."""
        ranks = self.parallel.data_ranks
        number, tokens, mine = first, 0, None
        for batch in islice(self.source.held_out(self.config.tokens), first, None):
            if number % ranks == self.parallel.data_rank:
                mine = batch
            number, tokens = number + 1, tokens + batch.tokens
            if number % ranks == 0:
                yield number, tokens, mine
                tokens, mine = 0, None
        if number % ranks:
            yield number, tokens, mine

    def _training(self, first: int, state: dict[str, Any] | None) -> Iterator[tuple[int, int, Batch | None]]:
        if state is not None:
            self.source.load_state(state)
        number, left = first, self.config.tokens - self.log.commit.rows
        while left > 0:
            batch = self.source.next()
            number, left = number + 1, left - batch.tokens
            yield number, batch.tokens, batch

    def _round(self, number: int, batch: Batch | None) -> None:
        error: Exception | None = None
        try:
            if batch is not None:
                self._encode(batch)
        except (Refused, OSError) as wrong:
            error = wrong
        # Written together, so that all can go on from the same batch.
        told = exchange(self.parallel, [int(self.log.full), int(error is not None), *self.log.size])
        if error is None and any(failed for _, failed, _, _ in told):
            error = OSError("")  # another rank says why
        if error is not None:
            raise error
        if not self.checked:
            self._check_disk([(rows, pairs) for _, _, rows, pairs in told])
        if any(full for full, _, _, _ in told):
            state = None if self.config.text == "held_out" else self.source.state()
            self.log.write(number, state)

    def _encode(self, batch: Batch) -> None:
        """Encode a batch, and add it to the log."""
        if batch.token_ids is None or batch.positions is None:
            raise Refused("source", "does not say which tokens its activations belong to: use a source that reads text")
        features = self.transcoder.encode(batch.inputs.to(self.transcoder.device))
        ids, positions = _array(batch.token_ids), _array(batch.positions)
        own, n_features = self.transcoder.own, self.transcoder.n_features
        for first, last, token, number, value in _pieces(features):
            if not np.isfinite(value).all():
                raise Refused("transcoder", "has features that are not finite: the run that wrote it has failed")
            rows = {
                "ids": ids[first:last],
                "context": positions[first:last, 0],
                "position": positions[first:last, 1],
                "count": np.bincount(token, minlength=last - first),
            }
            layer, feature = np.divmod(number, len(own))
            self.log.add(rows, (layer * n_features + own.start + feature).astype(np.int32), number, value)

    def _check_disk(self, sizes: list[tuple[int, int]]) -> None:
        """Refuse what will not fit on the disk, as the first batch lets expect."""
        rows, pairs = (sum(one[n] for one in sizes) for n in (0, 1))
        if not rows:
            return
        self.checked = True
        left = max(0, self.config.tokens * self.parallel.tensor_ranks - rows)
        features = self.transcoder.n_layers * self.transcoder.n_features
        needed = disk_bytes(left, left * pairs / rows, features) + self.store_bytes
        free = free_bytes(self.log.folder)
        if needed > free:
            raise Refused(
                "stages.collect.tokens",
                f"{self.config.tokens:,} tokens with {pairs / rows * self.parallel.tensor_ranks:.0f} active features "
                f"need about {needed / 1e9:.1f} GB beside the result, and the disk has {free / 1e9:.1f} GB free: read "
                "fewer, or write to another disk",
            )


def _pieces(features: Features) -> Iterator[tuple[int, int, Array, Array, Array]]:
    """Active features of some rows at a time, no more than a shard's: first row, last row, and for each pair its row
    (counted from the first), its number among the features of this rank, and its value."""
    tokens, n_layers, n_features = features.shape
    pairs = features.pairs
    if pairs is None:
        step = max(1, SHARD // (n_layers * n_features))
        for first in range(0, tokens, step):
            values = features.values[first : first + step].flatten(1)
            token, number = (values > 0).nonzero(as_tuple=True)
            yield first, first + len(values), _array(token), _array(number), _floats(values[token, number])
        return
    on = features.values > 0
    tokens_on, numbers, values_on = _array(pairs.token[on]), _array(pairs.feature[on]), _floats(features.values[on])
    starts = np.searchsorted(tokens_on, np.arange(tokens + 1))
    first = 0
    while first < tokens:
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + SHARD, side="right")) - 1)
        part = slice(starts[first], starts[last])
        yield first, last, tokens_on[part] - first, numbers[part], values_on[part]
        first = last


def _array(x: Tensor) -> Array:
    return x.detach().cpu().numpy()


def _floats(x: Tensor) -> Array:
    return x.detach().float().cpu().numpy()


def exchange(parallel: Parallel, numbers: list[int]) -> list[list[int]]:
    """Numbers of all ranks."""
    if parallel.world == 1:
        return [numbers]
    return [[int(one) for one in text.split()] for text in parallel.gather(" ".join(map(str, numbers)))]


def together(parallel: Parallel, action: Callable[[], T]) -> T:
    """Do something that all ranks must succeed in; none of them may exchange anything meanwhile.

    Raises:
        Refused, OSError: what it raised here; an OSError without a text where another rank failed, which says why.
    """
    error: Exception | None = None
    try:
        done = action()
    except (Refused, OSError) as wrong:
        error = wrong
    failed = any(one for (one,) in exchange(parallel, [int(error is not None)]))
    if failed:
        raise error or OSError("")
    return done


def _gathered(parallel: Parallel, log: Log) -> list[Commit]:
    """The commits of all ranks."""
    if parallel.world == 1:
        return [log.commit]
    texts = parallel.gather(json.dumps(attrs.asdict(attrs.evolve(log.commit, source=None))))
    return [Commit(**json.loads(text)) for text in texts]
