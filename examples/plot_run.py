"""Draw a run's held-out error: over training, and by layer at its end.

It needs matplotlib, the extra `plots`.

python examples/plot_run.py runs/quickstart --out examples/quickstart.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--out", type=Path, required=True, help="the picture (.png, .svg, .pdf)")
    options = parser.parse_args()
    lines = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    training = [(line["tokens"] / 1e6, line["train/nmse"]) for line in lines if "train/nmse" in line]
    held_out = [line for line in lines if "eval/nmse" in line]
    if not held_out:
        raise SystemExit(f"{options.run}: no evaluation in metrics.jsonl yet")

    try:
        import matplotlib
    except ModuleNotFoundError:
        raise SystemExit("plot_run.py needs matplotlib: python -m pip install 'clt-plugins[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = held_out[-1]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(*zip(*training, strict=True), color="0.75", label="training batches")
    left.plot([x["tokens"] / 1e6 for x in held_out], [x["eval/nmse"] for x in held_out], "o-", label="held-out text")
    left.set(xlabel="million tokens", ylabel="NMSE", yscale="log")
    left.legend()
    by_layer = last["eval/nmse_by_layer"]
    right.bar(range(len(by_layer)), by_layer)
    right.set(xlabel="layer", ylabel="held-out NMSE at the end", xticks=range(len(by_layer)))
    figure.suptitle(f"{options.run.name}: held-out NMSE {last['eval/nmse']:.4f} at L0 {last['eval/l0']:.0f}")
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
