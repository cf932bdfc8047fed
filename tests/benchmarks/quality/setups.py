"""What is trained on what: two language models, each with a number of tokens, features and active features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).parents[3]


@attrs.frozen(kw_only=True)
class Setup:
    """A model, a text, and the size of the transcoder that every run of it has unless its recipe says otherwise."""

    name: str
    about: str
    """For tables."""
    model: dict[str, Any]
    """The recipe's table."""
    source: dict[str, Any]
    """The recipe's table of the stream that the activations are stored from."""
    tokens: int
    """To train on, each once."""
    choose_tokens: int
    """Held out, to choose settings by."""
    report_tokens: int
    """Held out in other documents, to report figures of what was chosen."""
    model_tokens: int
    """Of the latter, those that the language model reads with the transcoder in the place of its MLPs; 0: none."""
    features: int
    k: int
    batch: int
    n_layers: int
    d_model: int
    lrs: tuple[float, ...]
    """Learning rates tried of ours."""
    peer_lrs: tuple[float, ...]
    """Learning rates tried of decode-clt."""
    longer: tuple[tuple[int, int], ...] = ()
    """Pairs (batch, n): with this batch, learning rates are compared at n times the tokens too, read from the model."""

    def tables(self, batch: int | None = None, steps: int | None = None) -> dict[str, Any]:
        """A recipe's tables with the project's defaults, for all that a run needs but its source."""
        batch = batch or self.batch
        return {
            "name": "quality",
            "loggers": ["jsonl"],
            "transcoder": {"features": self.features},
            "activation": {"name": "batchtopk", "k": self.k},
            "train": {"batch_tokens": batch, "steps": steps or self.tokens // batch},
        }

    def stream(self, held_out: float | None = None) -> dict[str, Any]:
        """The tables of a recipe that reads the model itself.

        Args:
            held_out: another share of the documents.
        """
        source = self.source if held_out is None else {**self.source, "held_out": held_out}
        return {"model": self.model, "source": source}


def shipped(**changes: Any) -> Setup:
    """The model in examples/models: a GPT-2 with 6 layers, trained on the standard library."""
    setup = Setup(
        name="shipped",
        about="shipped model",
        model={"path": str(ROOT / "examples" / "models" / "stdlib-gpt2")},
        source={
            "name": "stream",
            "text": "python-stdlib",
            "context": 256,
            "held_out": 0.05,
            "buffer_tokens": 32768,
        },
        tokens=409_600,
        choose_tokens=16_384,
        report_tokens=16_384,
        model_tokens=4_096,
        features=1024,
        k=96,
        batch=1024,
        n_layers=6,
        d_model=128,
        lrs=(1.6e-3, 3.2e-3, 4.5e-3, 6.4e-3, 9e-3),
        peer_lrs=(4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
        longer=((1024, 4), (4096, 4), (1024, 16)),
    )
    return attrs.evolve(setup, **changes)


def smollm2(file: Path, **changes: Any) -> Setup:
    """Layers 12 to 17 of SmolLM2-135M, from a GGUF file."""
    setup = Setup(
        name="smollm2",
        about="SmolLM2-135M, layers 12 to 17",
        model={"path": str(file.resolve()), "layers": list(range(12, 18))},
        source={
            "name": "stream",
            "text": "python-stdlib",
            "context": 256,
            "held_out": 0.02,
            "buffer_tokens": 16384,
        },
        tokens=204_800,
        choose_tokens=8_192,
        report_tokens=16_384,
        model_tokens=2_048,
        features=2048,
        k=100,
        batch=512,
        n_layers=6,
        d_model=576,
        lrs=(1.2e-3, 2.3e-3, 3.2e-3, 4.6e-3),
        peer_lrs=(1e-3, 2e-3, 4e-3, 8e-3),
    )
    return attrs.evolve(setup, **changes)
