"""A sweep of several k's against the same runs one by one, and whether their files are the same.

    python -m tests.benchmarks.sweep --json

The language model is a random one of GPT-2's shape, with the shipped tokenizer: what it predicts does not matter here,
only what its pass costs. One of its layers is transcribed, so the pass dominates. Each run, and the sweep, is a process
of its own, as a user starts it; all of it is timed: start, statistics, training, evaluation, files.

Then all files of each member are compared with those of the run alone by their SHA-256; of metrics.jsonl, which has
times in it, all other numbers; history.jsonl and versions.json say when and by which command, and are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clt_plugins import toml_text

SHIPPED = Path(__file__).parents[2] / "examples" / "models" / "stdlib-gpt2"
UNLIKE = ("history.jsonl", "versions.json")
"""Files that say when and by which command a run was made."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sweep", description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="of the language model")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--batch", type=int, default=512, help="tokens in a batch")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    return parser


def make_model(folder: Path, layers: int, d_model: int) -> None:
    """A random model with the shipped tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shipped = json.loads((SHIPPED / "config.json").read_text())
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shipped["vocab_size"], n_positions=256, n_embd=d_model, n_layer=layers, n_head=d_model // 64
    )
    config.bos_token_id = config.eos_token_id = 0
    GPT2LMHeadModel(config).save_pretrained(folder)
    for file in SHIPPED.glob("tokenizer*"):
        shutil.copy(file, folder)


def tables(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """The recipe, without what is swept."""
    return {
        "name": "bench",
        "model": {"path": str(model), "layers": [options.layers - 1]},
        "source": {"name": "stream", "context": 128, "model_batch": 4, "buffer_tokens": 4 * options.batch},
        "transcoder": {"features": options.features},
        "activation": {"name": "batchtopk", "k": options.k[0]},
        "loggers": ["jsonl"],
        "train": {
            "steps": options.steps,
            "batch_tokens": options.batch,
            "statistics_tokens": 2 * options.batch,
            "log_every": 4,
            "eval_every": options.steps,
            "eval_tokens": 1024,
            "checkpoint_every": options.steps,
        },
        "stages": [{"name": "evaluate", "tokens": 1024, "model_tokens": 0}],
    }


def timed(*words: str) -> float:
    """Seconds of a command."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "clt_plugins", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-1000:]}")
    return time.perf_counter() - start


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a run; of metrics, of all but times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in UNLIKE:
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in one.items() if not k.startswith("time/")} for one in lines]).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def main() -> None:
    options = arguments().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_model(place / "model", options.layers, options.d_model)
        recipe = tables(options, place / "model")
        (place / "run.toml").write_text(toml_text(recipe))
        (place / "sweep.toml").write_text(toml_text({**recipe, "sweep": {"activation.k": options.k}}))
        # Kernels are compiled once per machine, modules are read from disk once.
        timed("run", str(place / "run.toml"), "--out", str(place / "first"), "--set", "train.steps=1")
        together = timed("sweep", str(place / "sweep.toml"), "--out", str(place / "sweep"))
        alone, equal, compared = [], True, 0
        for k in options.k:
            out = place / f"k={k}"
            alone.append(timed("run", str(place / "run.toml"), "--out", str(out), "--set", f"activation.k={k}"))
            own, member = digests(out), digests(place / "sweep" / f"k={k}")
            equal, compared = equal and own == member, compared + len(own)
    result = {
        "sweep_s": together,
        "alone_s": alone,
        "ratio": together / sum(alone),
        "members": len(options.k),
        "files": compared,
        "equal": equal,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"sweep of {len(options.k)} k's     {together:.1f} s")
    print(f"{len(options.k)} runs one by one  {sum(alone):.1f} s: {', '.join(f'{one:.1f}' for one in alone)}")
    print(f"ratio               {result['ratio']:.2f}")
    print(f"files compared      {compared}: {'all the same' if equal else 'NOT the same'}")


if __name__ == "__main__":
    main()
