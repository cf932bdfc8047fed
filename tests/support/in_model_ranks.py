"""What each of several ranks does for `tests/engine/model/test_in_model_ranks.py`: gradients of losses that run the
language model, with features split over two ranks and with contexts split over two.

Started as `python -m tests.support.in_model_ranks FOLDER`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clt_parallel.grid import Grid
from clt_plugins import Single
from clt_plugins.model.assemble import Parts, assemble
from clt_plugins.model.in_model.passes import InModel
from clt_plugins.training.objective import objective
from tests.support.helpers import ACTIVATIONS, ENCODERS, TYINGS, recipe, stir
from tests.support.rank_cases import cut

CONTEXTS = 3
"""Of a step: of two data ranks one has two, the other one."""
CASES = [
    ("jumprelu", "untied-skip", "plain"),
    ("batchtopk-norm", "per_source-affine", "plain"),
    ("topk", "untied", "low_rank"),
    ("relu", "per_source", "tied"),
]
"""Activation, tying, encoder."""


def built(folder: Path, activation: str, tying: str, encoder: str, parallel: Any) -> Parts:
    """Everything of a run, in float64 and with stirred weights; a loss of each kind."""
    source = {"name": "stream", "text": str(folder / "text.jsonl"), "context": 24, "held_out": 0.3, "model_batch": 4}
    found = assemble(
        recipe(
            model={"path": str(folder / "gpt2")},
            source={**source, "buffer_tokens": 64},
            transcoder={"features": 11, "dtype": "float64"},
            normalisation={"name": "none"},
            activation=ACTIVATIONS[activation],
            tying=TYINGS[tying],
            encoder=ENCODERS[encoder],
            losses=[{"name": "kl", "contexts": CONTEXTS}, {"name": "ce", "contexts": 2}],
            kernels={"name": "torch"},
            train={"batch_tokens": 32},
        ),
        parallel=parallel,
    )
    found.source.model.double()
    return found


def gradients(found: Parts, parallel: Any) -> dict[str, torch.Tensor]:
    """Terms and gradients of the second step."""
    run = InModel(found.transcoder, found.losses, found.source)
    wanted = run.wanted(1, 0.0)
    idle = torch.zeros(found.transcoder.shape, dtype=torch.int64)
    run.read(wanted, run.read(wanted, None))
    outcome = objective(found.transcoder, found.losses, found.source.next(), idle, 0.0, run.passes(wanted))
    outcome.total.backward()
    parallel.reduce_gradients(list(found.transcoder.parameters()))
    terms = {
        f"term.{name}": parallel.total(value, over="tokens") / parallel.data_ranks
        for name, value in outcome.terms.items()
    }
    return terms | {name: value.clone() for name, value in cut(found.transcoder, of="grad").items()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank = dist.get_rank()
    alone, both = [dist.new_group([each]) for each in range(2)], dist.new_group([0, 1])
    for name, data, tensor in (("tensor", 1, 2), ("data", 2, 1)):
        groups = {"features": both if tensor == 2 else alone[rank], "tokens": both if data == 2 else alone[rank]}
        grid = Grid(rank, tensor, data, {**groups, "all": both})
        results = {}
        for activation, tying, encoder in CASES:
            whole = built(folder, activation, tying, encoder, Single())
            stir(whole.transcoder)
            part = built(folder, activation, tying, encoder, grid)
            with torch.no_grad():
                for key, value in cut(whole.transcoder, grid).items():
                    cut(part.transcoder)[key].copy_(value)
            results[activation] = gradients(part, grid)
        torch.save(results, folder / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(Path(sys.argv[1]))
