"""Write a random transcoder with CLT-Forge itself, and what it computes.

Runs in an environment with jaxtyping, pydantic and safetensors; of CLT-Forge's checkout it uses the model and its
configuration alone, without the packages that its training needs. Imports nothing of this repository.

    python write_clt_forge.py FOLDER crossing|alone CHECKOUT
"""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file


def packages(source: Path) -> None:
    """Its packages, without what their `__init__` imports."""
    for name in ("clt_forge", "clt_forge.config", "clt_forge.training"):
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.modules["clt_forge"].logger = logging.getLogger("clt_forge")
    from clt_forge.config.clt_config import CLTConfig

    sys.modules["clt_forge.config"].CLTConfig = CLTConfig


def main(folder: Path, crossing: str, checkout: str) -> None:
    packages(Path(checkout) / "src")
    from clt_forge.clt import CLT
    from clt_forge.config import CLTConfig

    config = CLTConfig(
        device="cpu",
        dtype="float32",
        seed=0,
        model_name="some/model",
        d_in=6,
        d_latent=10,
        n_layers=3,
        jumprelu_bandwidth=1.0,
        jumprelu_init_threshold=0.1,
        normalize_decoder=False,
        dead_feature_window=10,
        cross_layer_decoders=crossing == "crossing",
        context_size=8,
        l0_coefficient=1.0,
    )
    clt = CLT(config)
    with torch.no_grad():
        for value in clt.parameters():
            value.add_(0.3 * torch.randn_like(value))
        clt.estimated_norm_scaling_factor_in.copy_(torch.tensor([0.5, 2.0, 1.5]))
        clt.estimated_norm_scaling_factor_out.copy_(torch.tensor([1.5, 0.7, 0.9]))
    clt.save_model(str(folder / "checkpoint"))
    clt = CLT.load_from_pretrained(folder / "checkpoint")
    x = torch.randn(20, 3, 6) * 3
    with torch.no_grad():
        features, _ = clt.encode(x * clt.estimated_norm_scaling_factor_in.view(1, -1, 1))
        outputs = clt.decode(features) / clt.estimated_norm_scaling_factor_out.view(1, -1, 1)
    tensors = {"inputs": x, "features": features, "outputs": outputs}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "expected.safetensors")
    print(json.dumps({"done": True}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
