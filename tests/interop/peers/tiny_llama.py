"""Write a Llama of random weights, six layers of 128, with another model's tokenizer: for tools that cannot read GPT-2.

Runs in the tool's environment, so that its own version of transformers writes what it reads.

    python tiny_llama.py FOLDER TOKENIZER
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main(folder: str, tokenizer: str) -> None:
    torch.manual_seed(0)
    named = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=256,
        head_dim=32,
        bos_token_id=named.bos_token_id,
        eos_token_id=named.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    named.save_pretrained(folder)
    print("{}")


if __name__ == "__main__":
    main(*sys.argv[1:])
