"""A layer of a transcoder as a custom SAE of SAEBench; this file needs nothing but SAEBench.

    from sae_bench_adapter import load
    sae = load("layer_05", device="cuda", dtype=torch.float32)

`load` gives what SAEBench's evaluations take: `selected_saes = [("my_transcoder_layer_5", sae)]`. What the features
write goes to another place than they read from, so that its evaluation `core` means nothing here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from safetensors.torch import load_file


class TranscoderLayer(BaseSAE):
    """x W_enc + b_enc where that is above the threshold, else 0; rows of W_dec have norm 1."""

    def __init__(self, tensors: dict[str, torch.Tensor], described: dict, device: torch.device, dtype: torch.dtype):
        d_in, d_sae = tensors["W_enc"].shape
        layer, hook = described["hook_layer"], described["hook_name"]
        super().__init__(d_in, d_sae, described["model_name"], layer, device, dtype, hook)
        self.threshold = torch.nn.Parameter(torch.zeros(d_sae))
        with torch.no_grad():
            for name, value in tensors.items():
                getattr(self, name).copy_(value)
        self.cfg.architecture = described["architecture"]
        self.to(device=device, dtype=dtype)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre = x @ self.W_enc + self.b_enc
        return pre * (pre > self.threshold)

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TranscoderLayer:
    """The features of one layer.

    Args:
        folder: one of `layer_00`, `layer_01`, ...
    """
    described = json.loads((Path(folder) / "sae_bench.json").read_text())
    tensors = load_file(Path(folder) / "sae.safetensors")
    return TranscoderLayer(tensors, described, torch.device(device), dtype)
