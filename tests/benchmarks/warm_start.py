"""A run that begins with the transcoder of a base model, and one that begins anew, for a further trained model.

    python -m tests.benchmarks.warm_start --json

The shipped model is trained further (AdamW, on topics of Python's help), so that its activations change. The base
model's transcoder is the quickstart's. On the further trained model a cold run is the quickstart again; warm runs
(`transcoder.from`) get shares of its tokens. Printed are held-out NMSEs, and the share of the cold run's tokens after
which a warm run is as good. All is kept in --out, and not made again.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from clt_plugins import run

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "quickstart.toml"
MEASUREMENTS = ROOT / "examples" / "measurements" / "warm-start.json"
SHARES = (0.2, 0.4, 0.6)
CONTEXT = 256


def train_further(out: Path, steps: int, lr: float) -> Path:
    """The shipped model after some steps on other text than most of what it was trained on."""
    folder = out / "model"
    if (folder / "config.json").is_file():
        return folder
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped = ROOT / "examples" / "models" / "stdlib-gpt2"
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    ids = torch.tensor(tokenizer("\n".join(topics.values()))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    numbers = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (8, 1), generator=numbers)
        batch = ids[starts + torch.arange(CONTEXT)]
        loss = cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def nmse(folder: Path, model: Path, steps: int, **changes: Any) -> float:
    """The held-out NMSE at the end of a run of the quickstart's recipe."""
    recipe = tomllib.loads(RECIPE.read_text())
    recipe["model"]["path"] = str(model)
    recipe["train"] |= {"steps": steps, **changes.pop("train", {})}
    for table, settings in changes.items():
        recipe[table] |= settings
    if not (folder / "transcoder").is_dir():
        run(recipe, out=folder, resume="latest" if (folder / "checkpoints").is_dir() else None)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/nmse" in line][-1]["eval/nmse"]


def as_table(found: dict[str, Any], steps: int) -> dict[str, Any]:
    """The record that the documents' table is made from."""
    rows = [["begins anew", f"{steps}", f"{found['cold']:.4f}"]]
    rows += [
        ["begins with the base model's", f"{round(share * steps)}", f"{found[f'warm_{share}']:.4f}"] for share in SHARES
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {
        "what": "Transcoders of the shipped model after it was trained further, by the quickstart's recipe; one seed. "
        f"The base model's own has an NMSE of {found['base_on_base']:.4f} on the base model.",
        "date": date.today().isoformat(),
        "machine": f"2 CPU cores ({platform.machine()}), no GPU",
        "command": "python -m tests.benchmarks.warm_start --write",
        "commit": commit.stdout.strip(),
        "columns": ["transcoder", "steps", "held-out NMSE"],
        "rows": rows,
        "runs": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.warm_start", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/warm-start"), help="the folder of model and runs")
    parser.add_argument("--steps", type=int, default=600, help="of the base and the cold run")
    parser.add_argument("--further", type=int, default=200, help="steps that the model is trained further")
    parser.add_argument("--further-lr", type=float, default=1e-4)
    parser.add_argument("--lr", type=float, default=None, help="of warm runs; that of the quickstart if not given")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--write", action="store_true", help=f"write a table into {MEASUREMENTS.relative_to(ROOT)}")
    options = parser.parse_args()
    shipped = ROOT / "examples" / "models" / "stdlib-gpt2"
    further = train_further(options.out, options.further, options.further_lr)
    base = options.out / "base"
    found: dict[str, Any] = {"base_on_base": nmse(base, shipped, options.steps)}
    found["cold"] = nmse(options.out / "cold", further, options.steps)
    # k does not fall again: the features that there are were trained at the final one.
    warm = {"transcoder": {"from": str(base)}, "activation": {"anneal_from": 1}}
    if options.lr is not None:
        warm["train"] = {"lr": options.lr}
    for share in SHARES:
        steps = round(share * options.steps)
        found[f"warm_{share}"] = nmse(options.out / f"warm-{share}", further, steps, **warm)
    reached = [share for share in SHARES if found[f"warm_{share}"] <= found["cold"]]
    found["share_of_tokens"] = min(reached, default=None)
    if options.write:
        MEASUREMENTS.write_text(json.dumps(as_table(found, options.steps), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
