"""What each of several tensor ranks does for `tests/plugins/stream/test_ranks.py`: they read a stream together.

Started as `python -m tests.support.stream_ranks MODEL TEXT FOLDER`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch

from clt_parallel import TensorConfig
from clt_parallel.connect import connect
from clt_plugins.distributed.reading import Reading
from clt_stream import StreamConfig, clt_sources
from tests.support.language_models import make_context
from tests.support.streams import CONTEXT, join

STEPS = 15
"""Batches of 32 rows: a block of 320, and a half."""


def stream(model: str, text: str, parallel: Any) -> Any:
    """The source, and how often this rank ran the model."""
    (spec,) = clt_sources()
    config = StreamConfig(text=text, context=CONTEXT, model_batch=3, buffer_tokens=320, held_out=0.3)
    return spec.build(config, attrs.evolve(make_context(model), parallel=parallel))


def main(model: str, text: str, folder: Path) -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    grid = connect(TensorConfig(), cpu)
    source = stream(model, text, grid)
    read, runs = source.reader.read, 0

    def counted(*arguments: Any) -> None:
        nonlocal runs
        runs += 1
        read(*arguments)

    source.reader.read = counted
    results: dict[str, Any] = {"rows": join([source.next() for _ in range(STEPS)]), "runs": runs}
    state = source.state()
    expected = join([source.next() for _ in range(2)])
    source.load_state(state)
    results["resumed"] = torch.equal(expected.inputs, join([source.next() for _ in range(2)]).inputs)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("no memory left")

    def lost() -> None:
        raise OSError("the text is gone")

    with mock.patch("clt_stream.source.reads_ahead", return_value=True):  # as on a GPU
        ahead = stream(model, text, grid)
    for name, tried, there, attribute, instead in (
        ("model", source, source.reader, "read", broken),
        ("text", source, source.packer, "next", lost),
        ("model, ahead", ahead, ahead.reader, "read", broken),
    ):
        tried.load_state(state)
        reading = Reading(tried, grid, cpu)
        reading.next()  # all is well, in the block that is in memory
        reading.check()
        right = getattr(there, attribute)
        if grid.rank == 1:
            setattr(there, attribute, instead)
        try:
            for _ in range(10):  # the next block is among these
                reading.next()
                reading.check()
            results[name] = "nothing"
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        setattr(there, attribute, right)
    source.load_state(state)
    grid.close()
    results["alone"] = torch.equal(expected.inputs, join([source.next() for _ in range(2)]).inputs)
    results["rows"] = [results["rows"].inputs, results["rows"].targets, results["rows"].positions]
    torch.save(results, folder / f"{grid.world}-{grid.rank}.pt")


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
