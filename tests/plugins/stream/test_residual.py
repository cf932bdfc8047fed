"""What reads the residual stream, against the model: a step in the residual stream moves its logits, and what its MLPs
read, as the rows say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from clt_plugins import Faults
from clt_stream.model import load_model
from clt_stream.residual import Norm, Readers
from clt_stream.sites import find_sites
from tests.support.language_models import COMMON, CONFIGS, save_model

LAYER_NORMS = {"gpt2", "gpt_neox", "untied head with a bias"}
MORE = {
    "scaled logits": lambda: transformers.CohereConfig(**COMMON, logit_scale=0.3),
    "untied head with a bias": lambda: transformers.GPTJConfig(
        vocab_size=320,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        rotary_dim=4,
        initializer_range=0.3,
        tie_word_embeddings=False,
    ),
    "no weights in the norms": lambda: transformers.OlmoConfig(**COMMON),
    "norms after the MLP": lambda: transformers.Olmo2Config(**COMMON),
    "capped logits": lambda: transformers.Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=3.0),
}
FAMILIES = {**CONFIGS, **MORE}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and ("norm" in name or ".ln_" in name):  # norms start at one, which would hide them
            weight.add_(torch.randn_like(weight) * 0.3)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        model.get_output_embeddings().bias.normal_()
    return model.double()


def last_block(model: Any) -> nn.Module:
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next(stack for stack in stacks if len(stack) == 3)[-1]


def sigma(x: Tensor, family: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if is_layer_norm(family) else x
    return centred.square().mean(-1, keepdim=True).sqrt()


def is_layer_norm(family: str) -> bool:
    return family in {*LAYER_NORMS, "scaled logits", "no weights in the norms"}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_follow_from_the_residual_stream_by_the_unembedding(family: str) -> None:
    model = model_of(family)
    unembedding = Readers(model, find_sites(model, None, None, None)).unembedding()
    assert unembedding.shape == (320, 32)
    stream: list[Tensor] = []

    def record(*args: Any) -> None:
        output = args[-1]
        stream.append(output[0] if isinstance(output, tuple) else output)

    handle = last_block(model).register_forward_hook(record)
    logits = model(torch.tensor([[5, 3, 8, 11, 200, 301, 4]]), use_cache=False).logits
    handle.remove()
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        assert (family == "capped logits") == bool(cap == 3)
        logits = cap * (logits / cap).atanh()
    expected = (stream[0] / sigma(stream[0], family)) @ unembedding.double().T
    # What is left is a constant: the same for every token.
    left = logits - expected
    assert (left - left[:, :1]).abs().max() < 2e-5 * logits.abs().max()
    if family in ("llama", "gemma", "qwen2", "capped logits", "scaled logits"):
        assert left.abs().max() < 2e-5 * logits.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_mlp_reads_follows_from_the_residual_stream_by_the_rows(family: str) -> None:
    """A step along a direction at one token: how an encoder's product changes, by the model and by the rows."""
    model = model_of(family)
    sites = find_sites(model, None, None, None)
    readers = Readers(model, sites)
    rows = torch.randn(5, 32, dtype=torch.float64)
    layer = 1
    site = sites[layer][0]
    block = model.get_submodule(site.path.rsplit(".", 1)[0])
    norm = {"gpt2": "ln_2", "untied head with a bias": "ln_1", "gpt_neox": "post_attention_layernorm"}.get(family)
    if norm is None:
        names = [name for name, _ in block.named_children()]
        norm = next(
            (n for n in ("pre_feedforward_layernorm", "post_attention_layernorm", "input_layernorm") if n in names), ""
        )
    if family == "norms after the MLP":
        assert torch.equal(readers.residual_rows(layer, rows), rows), "its MLPs read the residual stream itself"
        return
    module = block.get_submodule(norm)
    x = torch.randn(4, 32, dtype=torch.float64) * 3 + 1
    expected = (x / sigma(x, family)) @ readers.residual_rows(layer, rows).T
    left = module(x) @ rows.T - expected
    assert (left - left[:1]).abs().max() < 1e-4 * expected.abs().max()
    assert not torch.allclose(readers.residual_rows(layer, rows), rows, rtol=0.1)


@pytest.mark.parametrize("width", [6, 7])
def test_a_norm_is_known_by_what_it_computes(width: int) -> None:
    layer_norm, rms = nn.LayerNorm(width), nn.RMSNorm(width)
    for module in (layer_norm, rms):
        for weight in module.parameters():
            nn.init.normal_(weight)
    found, other = Norm.of(layer_norm, width), Norm.of(rms, width)
    assert found is not None and found.is_layer_norm
    assert other is not None and not other.is_layer_norm
    torch.testing.assert_close(found.weight.float(), layer_norm.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.bias.float(), layer_norm.bias.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.weight.float(), rms.weight.detach(), rtol=1e-5, atol=1e-6)
    for module in (nn.GELU(), nn.Identity(), nn.Tanh(), nn.Softmax(-1), nn.Bilinear(width, width, width)):
        assert Norm.of(module, width) is None


def broken(kind: str) -> Any:
    model = model_of("llama").float()
    if kind == "no norm":
        model.model.norm = nn.Identity()
    elif kind == "no matrix":
        model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 320))
    else:
        forward = model.forward

        def changed(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits = output.logits.square()
            return output

        model.forward = changed
    return model


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("no norm", "no LayerNorm or RMSNorm before its LM head"),
        ("no matrix", "no LM head that is one matrix"),
        ("square", "not those of its LM head behind its final norm"),
    ],
)
def test_a_model_that_computes_its_logits_otherwise_is_refused_by_name(kind: str, why: str) -> None:
    model = broken(kind)
    readers = Readers(model, find_sites(model, None, None, None))
    with pytest.raises(Faults, match=rf"LlamaForCausalLM cannot be told: .*{why}"):
        readers.unembedding()


def test_a_model_in_bfloat16_has_the_same_unembedding(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama")
    both = []
    for dtype in ("float32", "bfloat16"):
        settings = SimpleNamespace(path=str(folder), gguf_file=None, tokenizer=None, revision=None, dtype=dtype)
        settings.device = "cpu"
        model, _ = load_model(settings, torch.device("cpu"))
        both.append(Readers(model, find_sites(model, None, None, None)).unembedding())
    assert (both[0] - both[1]).abs().max() < 2**-8 * both[0].abs().max()
