"""A run that is resumed again and again on other numbers of data ranks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from clt_plugins import Batch, Closable

WORLDS = [1, 2, 3, 4, 6]
"""Numbers of data ranks; a batch of 24 tokens can be divided among them."""
BATCH = 24


def chain(
    build: Callable[[int, int], Any], resumes: int, seed: int, *, worlds: list[int] = WORLDS, fresh: bool = True
) -> Iterator[list[Batch]]:
    """The batches of all ranks, step by step; after some steps the run goes on with another number of ranks.

    Each resume has its number of ranks from `worlds` at random, and 0 to 3 steps. The states of all ranks are the same.

    Args:
        build: makes the source of (rank, number of ranks).
        fresh: build new sources at each resume; otherwise those that were built for as many ranks.
    """
    draw = random.Random(seed)
    built: dict[int, list[Any]] = {}
    state, world = None, 0
    for _ in range(resumes + 1):
        world = draw.choice([other for other in worlds if other != world])
        if fresh or world not in built:
            built[world] = [build(rank, world) for rank in range(world)]
        sources = built[world]
        for source in sources:
            if state is not None:
                source.load_state(json.loads(state))
        for _ in range(draw.randrange(4)):
            yield [source.next() for source in sources]
        (state,) = {json.dumps(source.state()) for source in sources}
        assert len(state) < 2000
        if fresh:
            close(sources)
    close(source for sources in built.values() for source in sources)


def close(sources: Any) -> None:
    for source in sources:
        if isinstance(source, Closable):
            source.close()
