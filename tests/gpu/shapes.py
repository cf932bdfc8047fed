"""The shapes at which a step is counted, compiled for and modelled.

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, cast

import attrs
import torch

from clt_losses.auxk import AuxK
from clt_plugins.contract.recipe import Recipe
from clt_plugins.model.assemble import Parts
from clt_plugins.registry.plugins import Plugins
from tests.gpu.absent import absent_gpu
from tests.gpu.count import Count
from tests.gpu.steps import Ranks, Sizes, assembled, joined, recipe, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@attrs.frozen
class Shape:
    """A training step: its recipe, and what the language model adds."""

    about: str
    tables: dict[str, Any]
    sizes: Sizes
    ranks: Ranks = attrs.field(factory=Ranks)
    done: float = 0.5
    """The share of all steps that went before."""


def _example(name: str) -> dict[str, Any]:
    tables = tomllib.loads((EXAMPLES / f"{name}.toml").read_text())
    return {key: value for key, value in tables.items() if key not in ("source", "model")}


def shapes() -> dict[str, Shape]:
    """G, M/8, J and S by name."""
    gpt2, llama, small = (_example(name) for name in ("gpt2", "llama-3.2-1b", "quickstart"))
    bf16 = torch.bfloat16
    wide = {
        "transcoder": {"features": 32_768, "dtype": "bfloat16"},
        "activation": {"name": "batchtopk", "k": 256, "anneal_from": 1},
        "losses": [{"name": "mse"}, {"name": "auxk"}],
        "train": {"steps": 10_000, "batch_tokens": 8192, "lr": 1e-4, "clip_norm": 1.0},
        "optimizer": {"name": "adam", "states": "bf16"},
    }
    return {
        "G k 200": Shape("examples/gpt2.toml, the last fifth", gpt2, Sizes(12, 768, bf16), done=0.9),
        "G k 600": Shape("examples/gpt2.toml, the first step", gpt2, Sizes(12, 768, bf16), done=0.0),
        "M/8": Shape(
            "16 layers of 2048, F 32,768, k 256, one of 8 tensor ranks", wide, Sizes(16, 2048, bf16), Ranks(8)
        ),
        "J": Shape("examples/llama-3.2-1b.toml", llama, Sizes(16, 2048, bf16)),
        "S": Shape("examples/quickstart.toml", small, Sizes(6, 128)),
    }


@attrs.frozen
class Counted:
    """A steady step at a shape; without dead features, if not said otherwise."""

    count: Count
    peak: int
    """Bytes at the peak, without the rows of the source."""
    dtype: torch.dtype
    """Of the weights."""
    parts: Parts
    recipe: Recipe
    pairs: int
    """Active pairs on this rank, on average."""

    @property
    def tokens(self) -> int:
        return self.parts.context.batch_share()

    @property
    def n_layers(self) -> int:
        return self.parts.context.n_layers

    @property
    def n_features(self) -> int:
        """Of this rank."""
        return self.parts.transcoder.shape[1]

    @property
    def empty(self) -> frozenset[int]:
        """Lengths of lists of pairs that have none, since no feature is dead in a step that is counted."""
        return frozenset(loss.k * self.tokens for loss in self.parts.losses if isinstance(loss, AuxK))

    def bytes(self) -> dict[str, int]:
        """By part, of torch's operations."""
        return {name: part.bytes for name, part in self.count.parts.items()}

    def launches(self) -> dict[str, int]:
        """By part, Triton's among them."""
        out = {name: part.launches for name, part in self.count.parts.items()}
        for launch in self.count.launched:
            out[launch.part] = out.get(launch.part, 0) + 1
        return out


def counted(shape: Shape, plugins: Plugins, *, all_dead: bool = False) -> Counted:
    """Count a step. Takes a second or two: nothing is computed.

    Args:
        all_dead: AuxK looks at all features, as it does where all of them may be dead.
    """
    with absent_gpu(Count(), dead=None if all_dead else [0, 0]) as mode, joined(shape.ranks) as parallel:
        count = cast(Count, mode)
        chosen = recipe(plugins, shape.tables)
        parts = assembled(chosen, shape.sizes, parallel)
        rows = sum(x.untyped_storage().nbytes() for x in parts.source.rows)
        count.kept = int(0.02 * chosen.train.batch_tokens * chosen.transcoder.features)
        run(parts, chosen, count, count.begin, done=shape.done)
    activation = parts.transcoder.activation
    # Thresholds keep as many as they keep: as many as the examples' sparsity ends at.
    kept = sum(getattr(activation, "training_k", [200])) * parts.context.batch_share()
    pairs = kept // shape.ranks.tensor
    return Counted(count, count.peak - rows, parts.context.dtype, parts, chosen, pairs)
