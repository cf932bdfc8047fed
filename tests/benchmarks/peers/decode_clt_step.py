"""A worker for `tests.benchmarks.step --against decode-clt`: its trainer's own step, on random activations.

Runs in an environment that has `decode-clt` 0.0.1, alone. The step is what its `CLTTrainer.train` does between two
batches (features, total loss, dead-feature counters, backward, Adam), with penalties that cost it extra passes off.
"""

import argparse
import resource
import sys
import time

import torch
from clt.config import CLTConfig, TrainingConfig
from clt.models.clt import CrossLayerTranscoder
from clt.training.losses import LossManager


def main():
    parser = argparse.ArgumentParser()
    for name in ("layers", "d-model", "features", "batch", "k", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    config = CLTConfig(
        num_features=options.features,
        num_layers=options.layers,
        d_model=options.d_model,
        activation_fn="batchtopk",
        batchtopk_k=options.k,
    )
    training = TrainingConfig(
        learning_rate=1e-4,
        training_steps=1000,
        train_batch_size_tokens=options.batch,
        normalization_method="none",
        activation_path="unused",
        sparsity_lambda=0.0,
        preactivation_coef=0.0,
    )
    model = CrossLayerTranscoder(config, process_group=None, device=torch.device(options.device))
    losses = LossManager(training)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    shape = options.batch, options.d_model
    inputs = {layer: torch.randn(shape) for layer in range(options.layers)}
    targets = {layer: torch.randn(shape) for layer in range(options.layers)}
    idle = torch.zeros(options.layers, options.features, dtype=torch.int64)

    def step():
        optimizer.zero_grad(set_to_none=True)
        features = model.get_feature_activations(inputs)
        loss, _ = losses.compute_total_loss(model, inputs, targets, 10, 1000, precomputed_activations=features)
        with torch.no_grad():
            for layer, acts in features.items():
                idle[layer] += 1
                idle[layer][(acts > 1e-6).any(dim=0)] = 0
        loss.backward()
        optimizer.step()

    for line in sys.stdin:
        if line.strip() == "end":
            break
        start = time.perf_counter()
        step()
        if options.device != "cpu":
            torch.cuda.synchronize()
        print("seconds", time.perf_counter() - start, flush=True)
    print("peak_rss_gb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, flush=True)


if __name__ == "__main__":
    main()
