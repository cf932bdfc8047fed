"""A worker for `tests.benchmarks.quality`: decode-clt trained on stored activations, judged on two held-out sets.

Runs in an environment that has `decode-clt` 0.0.1, alone. Steps are those of its `CLTTrainer.train` (features, total
loss, dead-feature counters, backward, Adam, linear schedule) with what its tutorials turn on (AuxK) and off (sparsity
penalties). Its own store is not used: it drops the tail of every chunk and ends after one epoch. Prints a line of JSON.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from clt.config import CLTConfig, TrainingConfig
from clt.models.clt import CrossLayerTranscoder
from clt.training.losses import LossManager


def main():
    parser = argparse.ArgumentParser()
    for name in ("data", "choose", "report"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("features", "batch", "k", "steps", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--loss", choices=["own", "by-variance"], help="its own, or every layer's error over variance")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    inputs, targets = read(sorted(options.data.glob("train_*.h5")))
    layers, d_model = inputs.shape[1:]
    moments = {side: (x.mean(0), x.std(0) + 1e-6) for side, x in (("inputs", inputs), ("targets", targets))}
    scale = moments["targets"][1]
    if options.loss == "by-variance":
        scale = scale / scale.square().mean(1, keepdim=True).sqrt()
    config = CLTConfig(
        num_features=options.features,
        num_layers=layers,
        d_model=d_model,
        activation_fn="batchtopk",
        batchtopk_k=options.k,
    )
    training = TrainingConfig(
        learning_rate=options.lr,
        training_steps=options.steps,
        train_batch_size_tokens=options.batch,
        normalization_method="mean_std",
        activation_path="unused",
        sparsity_lambda=0.0,
        preactivation_coef=0.0,
        aux_loss_factor=1 / 32,
        dead_feature_window=200,
    )
    model = CrossLayerTranscoder(config, process_group=None, device=torch.device("cpu"))
    zero = torch.zeros(d_model)
    losses = LossManager(
        training, dict.fromkeys(range(layers), zero), {layer: scale[layer] for layer in range(layers)}, config
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=options.steps)
    idle = torch.zeros(layers, options.features, dtype=torch.int64)

    def by_layer(x, side, rows):
        mean, std = moments[side]
        x = (x[rows] - mean) / std
        return {layer: x[:, layer] for layer in range(layers)}

    def step(number, rows):
        optimizer.zero_grad(set_to_none=True)
        x = by_layer(inputs, "inputs", rows)
        features = model.get_feature_activations(x)
        loss, _ = losses.compute_total_loss(
            model,
            x,
            by_layer(targets, "targets", rows),
            number,
            options.steps,
            precomputed_activations=features,
            dead_neuron_mask=idle > training.dead_feature_window,
        )
        with torch.no_grad():
            for layer, acts in features.items():
                idle[layer] += 1
                idle[layer][(acts > 1e-6).any(dim=0)] = 0
        loss.backward()
        optimizer.step()
        schedule.step()

    order = rows_of_batches(len(inputs), options.batch, options.seed)
    seconds = []
    before = time.process_time()
    for number in range(options.steps):
        rows = next(order)
        start = time.perf_counter()
        step(number, rows)
        seconds.append(time.perf_counter() - start)
    cpu_step_s = (time.process_time() - before) / options.steps
    figures = {"step_s": statistics.median(seconds), "cpu_step_s": cpu_step_s, "steps": options.steps}
    figures |= {"batch": options.batch, "lr": options.lr}
    for which in ("choose", "report"):
        scores = score(model, options, getattr(options, which), by_layer, moments)
        figures |= {f"{name}_{which}": value for name, value in scores.items()}
    print(json.dumps(figures))


def read(files):
    """Inputs and targets that are stored in some files, [rows, layers, d_model] float32."""
    sides = []
    for side in ("inputs", "targets"):
        chunks = []
        for path in files:
            with h5py.File(path, "r") as file:
                assert file[side].dtype in ("float32", "float16"), "scaled or packed types are not read here"
                chunks.append(file[side][()].astype(np.float32))
        sides.append(torch.from_numpy(np.concatenate(chunks)))
    return sides


def rows_of_batches(count, batch, seed):
    """Row numbers, every row once per epoch; batches go on across the ends of epochs."""
    random = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(count, generator=random)])
        yield left[:batch]
        left = left[batch:]


@torch.no_grad()
def score(model, options, held_out, by_layer, moments):
    """NMSE (mean over layers of squared error over variance, raw units), L0, and features never active."""
    inputs, targets = read([held_out])
    layers = inputs.shape[1]
    error = torch.zeros(layers, dtype=torch.float64)
    counts = torch.zeros(layers, options.features)
    for begin in range(0, len(inputs), options.batch):
        rows = slice(begin, begin + options.batch)
        x = by_layer(inputs, "inputs", rows)
        acts = model.get_feature_activations(x)
        for layer in range(layers):
            counts[layer] += (acts[layer] != 0).sum(0)
            found = model.decode({source: acts[source] for source in range(layer + 1)}, layer)
            found = found * moments["targets"][1][layer] + moments["targets"][0][layer]
            error[layer] += (found.double() - targets[rows, layer].double()).square().sum()
    variance = targets.double().var(0, correction=0).sum(1) * len(targets)
    return {
        "nmse": float((error / variance).mean()),
        "l0": float(counts.sum()) / len(inputs),
        "dead_fraction": float((counts == 0).float().mean()),
    }


if __name__ == "__main__":
    main()
