"""Write random transcoders with clt-training (a fork of sparsify) itself, and what it computes.

Runs in an environment with torch, triton, natsort, einops, simple-parsing and huggingface_hub; of the checkout it uses
the coder and the runner alone. Imports nothing of this repository.

    python write_clt_training.py FOLDER pairs|per_source|concat|alone tuned|plain topk|groupmax CHECKOUT
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

L, D, F, K = 3, 6, 16, 4


def modules(checkout: Path) -> Any:
    """Its modules, on a CPU: its sparse product is a GPU kernel, of which this is the formula."""
    os.environ |= {"SPARSIFY_NO_COMPILE": "1", "TORCHDYNAMO_DISABLE": "1"}
    package = types.ModuleType("sparsify")
    package.__path__ = [str(checkout / "sparsify")]
    sys.modules["sparsify"] = package
    torch.cuda.is_bf16_supported = lambda *_: False
    from sparsify import config, runner, sparse_coder

    sparse_coder.decoder_impl = lambda index, acts, weight: (acts[..., None] * weight[index.long()]).sum(1)
    # At cf9821f it gives `ForwardOutput` more fields than it has, where no loss is wanted.
    real = sparse_coder.ForwardOutput
    sparse_coder.ForwardOutput = lambda *given: real(*(given[:4] + given[-1:] if len(given) > 5 else given))
    return sparse_coder.SparseCoder, config.SparseCoderConfig, runner.CrossLayerRunner


def main(folder: Path, form: str, tuned: str, activation: str, checkout: str) -> None:
    coder_class, config_class, runner_class = modules(Path(checkout))
    torch.manual_seed(3)
    x, y = torch.randn(20, L, D) * 3, torch.randn(20, L, D)
    features, outputs, runner = torch.zeros(20, L, F), [], runner_class()
    for layer in range(L):
        config = config_class(
            activation=activation,
            num_latents=F,
            k=K,
            skip_connection=form in ("concat", "alone"),
            transcode=True,
            n_targets=0 if form == "alone" else L - layer,
            n_sources=0 if form == "alone" else layer + 1,
            normalize_io=True,
            per_source_tied=form == "per_source",
            coalesce_topk="concat" if form == "concat" else "none",
            post_encoder_scale=tuned == "tuned",
        )
        coder = coder_class(D, config, dtype=torch.float32)
        with torch.no_grad():
            for name, value in coder.named_parameters():
                value.copy_(torch.randn_like(value))
                if name.startswith("post_enc") and tuned == "plain":
                    value.zero_()
            coder.in_norm.fill_(2.0 + layer)
            coder.out_norm.fill_(1.0 + layer)
            encoded = coder.encode(x[:, layer])
            features[:, layer].scatter_(1, encoded.top_indices.long(), encoded.top_acts)
            if form == "alone":
                out = coder(x[:, layer], y[:, layer])
            else:
                out = runner.decode(runner.encode(x[:, layer], coder), y[:, layer], f"h.{layer}.mlp")
        outputs.append(out.sae_out)
        inner = folder / "checkpoint" / f"h.{layer}.mlp"
        inner.mkdir(parents=True)
        # Its own `save_to_disk` fails on a CPU, where W_dec and W_decs.0 share memory.
        save_file({name: value.clone() for name, value in coder.state_dict().items()}, inner / "sae.safetensors")
        (inner / "cfg.json").write_text(json.dumps({**config.to_dict(), "d_in": D}))
    tensors = {"inputs": x, "features": features, "outputs": torch.stack(outputs, 1).contiguous()}
    save_file(tensors, folder / "expected.safetensors")
    print(json.dumps({"done": True}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
