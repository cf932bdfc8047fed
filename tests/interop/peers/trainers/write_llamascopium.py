"""Write a random cross-layer transcoder with llamascopium itself, and what it computes.

Runs in an environment with llamascopium; imports nothing of this repository.

    python write_llamascopium.py FOLDER ACT_FN by-norm|raw
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
from safetensors.torch import save_file


def main(folder: Path, act_fn: str, by_norm: str) -> None:
    torch.manual_seed(1)
    config = CLTConfig(
        d_model=6,
        expansion_factor=2,
        act_fn=act_fn,
        top_k=4,
        hook_points_in=[f"blocks.{i}.ln2.hook_normalized" for i in range(3)],
        hook_points_out=[f"blocks.{i}.hook_mlp_out" for i in range(3)],
        sparsity_include_decoder_norm=by_norm == "by-norm",
        norm_activation="dataset-wise",
        device="cpu",
        dtype=torch.float32,
    )
    clt = CrossLayerTranscoder(config)
    with torch.no_grad():
        for name, value in clt.named_parameters():
            value.copy_(torch.randn_like(value) * 0.3 - 1 if "threshold" in name else torch.randn_like(value))
    norms = {hook: 1.0 + 0.3 * i for i, hook in enumerate(config.associated_hook_points)}
    clt.set_dataset_average_activation_norm(norms)
    clt.save_pretrained(folder / "checkpoint")
    config.save_hyperparameters(folder / "checkpoint")
    x = torch.randn(20, 3, 6) * 3
    with torch.no_grad():
        scaled = clt.normalize_activations({hook: x[:, i] for i, hook in enumerate(config.hook_points_in)})
        features = clt.encode(clt.prepare_input(scaled)[0])
        written = clt.decode(features, batch_first=True)
    factors = [6**0.5 / norms[hook] for hook in config.hook_points_out]
    outputs = written / torch.tensor(factors)[:, None]
    tensors = {"inputs": x, "features": features, "outputs": outputs}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "expected.safetensors")
    print(json.dumps({"done": True}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
