"""Tokens per second of the stream source, and of the bare model over the same forward passes.

    python -m tests.benchmarks.stream --json

The bare model is `transformers.AutoModel` (so without a language-model head) under `torch.inference_mode()`, given
the very token ids and positions that the source's model was given, tokenised and packed beforehand. The source's time
has everything in it: reading and tokenising text, packing, tracing, copying, shuffling, batches. Both take turns,
block by block; the ratio is the median over the blocks. Text is tokenised once for several blocks, so the ratio of the
totals stands beside it; and that of core seconds, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from clt_plugins.contract.recipe import ModelConfig
from clt_plugins.registry.plugins import load_plugins
from clt_stream import StreamConfig
from clt_stream.contexts import Contexts

SHIPPED = Path(__file__).parents[2] / "examples" / "models" / "stdlib-gpt2"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stream", description=__doc__)
    parser.add_argument("--model", default=str(SHIPPED), help="folder, hub id or GGUF file")
    parser.add_argument("--text", default="python-stdlib")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--model-batch", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--block", type=int, default=32768, help="rows in a block of the source")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    return parser


def make_source(options: argparse.Namespace) -> Any:
    """The source, with as much of a context as it asks for."""
    model = ModelConfig(path=options.model, dtype=options.dtype, device=options.device)  # type: ignore[arg-type]
    context = SimpleNamespace(
        recipe=SimpleNamespace(model=model),
        seed=0,
        device=torch.device(options.device),
        batch_tokens=options.batch,
        parallel=SimpleNamespace(data_rank=0, data_ranks=1),
    )
    config = StreamConfig(
        text=options.text, context=options.context, model_batch=options.model_batch, buffer_tokens=options.block
    )
    return load_plugins().pick("source", "stream").spec.build(config, context)


class Bare:
    """The model alone, over the passes that each block of the source is made of."""

    def __init__(self, options: argparse.Namespace, mirror: Any):
        from transformers import AutoModel

        dtype = getattr(torch, options.dtype)
        path = Path(options.model)
        gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = str(path.parent) if gguf else options.model
        self.model = AutoModel.from_pretrained(folder, dtype=dtype, **gguf).eval().to(options.device)
        # As the source does: no search for padding at each pass.
        self.model.config.pad_token_id = None
        self.packer, self.block = mirror.packer, mirror.size
        self.rows = self.end = 0

    def passes(self) -> list[Contexts]:
        """The passes of the next block, ready to run."""
        self.end += self.block
        found = []
        while self.rows < self.end:
            contexts = self.packer.next()
            self.rows += len(contexts.rows)
            found.append(contexts)
        return found

    @torch.inference_mode()
    def run(self, passes: list[Contexts]) -> None:
        """Run some passes."""
        device = self.model.device
        for contexts in passes:
            self.model(
                contexts.ids.to(device),
                position_ids=contexts.position_ids.to(device),
                attention_mask=None if contexts.attention_mask is None else contexts.attention_mask.to(device),
                use_cache=False,
            )
        _wait(device)


def run_block(source: Any) -> None:
    """Take a block from the source."""
    for _ in range(source.size // source.batch_tokens):
        source.next()
    _wait(source.reader.device)


def clocked(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call by the wall, and of the process's cores."""
    wall, cores = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cores


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    source = make_source(options)
    bare = Bare(options, make_source(options))
    bare.run(bare.passes()[:4])
    run_block(source)
    tokens: list[int] = []
    stream: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    for _ in range(options.rounds):
        passes = bare.passes()
        tokens.append(sum(contexts.ids.numel() for contexts in passes))
        stream.append(clocked(lambda: run_block(source)))
        alone.append(clocked(lambda passes=passes: bare.run(passes)))  # type: ignore[misc]
    ratios = [mine[0] / whole[0] for mine, whole in zip(alone, stream, strict=True)]
    result = {
        "stream_tokens_per_s": round(statistics.median(n / s[0] for n, s in zip(tokens, stream, strict=True))),
        "bare_tokens_per_s": round(statistics.median(n / s[0] for n, s in zip(tokens, alone, strict=True))),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_of_totals": round(sum(s[0] for s in alone) / sum(s[0] for s in stream), 4),
        "ratio_of_core_seconds": round(sum(s[1] for s in alone) / sum(s[1] for s in stream), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "tokens": sum(tokens),
        "layers": source.n_layers,
        "d_model": source.d_model,
        "context": options.context,
        "model_batch": options.model_batch,
        "block": source.size,
        "threads": options.threads,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(f"stream     {result['stream_tokens_per_s']:>10,} tokens/s")
        print(f"bare model {result['bare_tokens_per_s']:>10,} tokens/s")
        print(f"ratio      {result['ratio']:>10.1%}   median of {options.rounds} blocks (target 85 %)")
        print(f"           {result['ratio_of_totals']:>10.1%}   of all seconds, which has all tokenising in it")
        print(f"           {result['ratio_of_core_seconds']:>10.1%}   of all core seconds")


if __name__ == "__main__":
    main()
