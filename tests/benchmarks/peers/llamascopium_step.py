"""A worker for `tests.benchmarks.step --against llamascopium`: its own loss and CSR decoder, on random activations.

Runs in an environment that has `llamascopium` 2.0.0b34, alone. Its batchtopk counts k in each layer, so k is divided
among the layers; decoder norms are left out of the ranking and the loss has no sparsity term, which is less work.
"""

import argparse
import resource
import sys
import time

import torch
from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder


def main():
    parser = argparse.ArgumentParser()
    for name in ("layers", "d-model", "features", "batch", "k", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_device(options.device)
    torch.manual_seed(0)
    inputs = [f"in.{layer}" for layer in range(options.layers)]
    outputs = [f"out.{layer}" for layer in range(options.layers)]
    config = CLTConfig(
        d_model=options.d_model,
        expansion_factor=options.features / options.d_model,
        hook_points_in=inputs,
        hook_points_out=outputs,
        act_fn="batchtopk",
        top_k=max(1, options.k // options.layers),
        norm_activation="inference",
        sparsity_include_decoder_norm=False,
        decode_with_csr=True,
        device=options.device,
        dtype=torch.float32,
    )
    model = CrossLayerTranscoder(config)
    with torch.no_grad():
        model.init_parameters()
    model.set_current_k(config.top_k)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    batch = {name: torch.randn(options.batch, options.d_model) for name in inputs + outputs}
    batch["tokens"] = torch.zeros(options.batch, dtype=torch.int64)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model.compute_loss(batch, return_aux_data=True)["loss"].backward()
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
