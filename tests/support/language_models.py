"""Tiny random language models of each family, with a tokenizer, saved as folders; and plain hooks on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from clt_plugins import Context, HubOrPath, Single
from clt_plugins.contract.recipe import ModelConfig

WORDS = "a feature of layer writes to each later one and the model reads what stands before it in its own text".split()

COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}

CONFIGS: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=320, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "gemma": lambda: transformers.GemmaConfig(**COMMON, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, head_dim=8, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=8),
    "granite": lambda: transformers.GraniteConfig(**COMMON, residual_multiplier=0.22),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**COMMON, head_dim=8, sliding_window=8),
}

MLPS = {"gpt2": "transformer.h.{}.mlp", "gpt_neox": "gpt_neox.layers.{}.mlp"}
"""Where each family keeps its MLPs, if not at `model.layers.{}.mlp`: read from the models' sources."""

WRITTEN = dict.fromkeys(["gemma2", "gemma3"], "model.layers.{}.post_feedforward_layernorm")
"""Where each family has what its MLPs add to the residual, if that is not the MLP's output."""


def save_model(folder: Path, family: str = "gpt2", *, adds_bos: bool = False) -> Path:
    """A random model and a byte-level tokenizer; with the tokens <bos> 0, <eos> 1 and <pad> 2."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    wrapped.save_pretrained(folder)
    return folder


def save_text(path: Path, documents: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to `longest` words, as JSON lines."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def make_context(
    folder: Path | str, *, batch_tokens: int = 32, rank: int = 0, ranks: int = 1, seed: int = 3, **model: Any
) -> Context:
    """What a source is told.

    Args:
        model: settings of `[model]` besides `path`.
    """
    return Context(
        recipe=SimpleNamespace(  # type: ignore[arg-type]
            model=ModelConfig(path=HubOrPath(str(folder)), **model), train=SimpleNamespace(eval_tokens=100)
        ),
        seed=seed,
        device=torch.device("cpu"),
        dtype=torch.float32,
        batch_tokens=batch_tokens,
        steps=1,
        parallel=Single(rank, ranks),
    )


class Hooked:
    """The truth: a model of transformers, run on one piece of text alone, its MLPs read by forward hooks."""

    def __init__(self, folder: Path, template: str, written: str = ""):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.written = [
            self.model.get_submodule((written or template).format(n))
            for n in range(self.model.config.num_hidden_layers)
        ]
        self.mlps = [self.model.get_submodule(template.format(n)) for n in range(self.model.config.num_hidden_layers)]

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """MLP inputs and outputs, [T, L, D] each."""
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []

        def keep_input(_: Any, args: Any) -> None:
            inputs.append(args[0][0])

        def keep_output(_: Any, args: Any, output: torch.Tensor) -> None:
            outputs.append(output[0] * getattr(self.model.config, "residual_multiplier", 1.0))

        hooks = [mlp.register_forward_pre_hook(keep_input) for mlp in self.mlps]
        hooks += [module.register_forward_hook(keep_output) for module in self.written]
        self.model(torch.tensor([tokens]))
        for hook in hooks:
            hook.remove()
        return torch.stack(inputs, 1), torch.stack(outputs, 1)
