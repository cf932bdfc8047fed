"""Sizes of well-known language models, for a plan on a machine that has neither the model nor the hub.

They are public facts: the numbers of each model's `config.json` on the Hugging Face hub.
"""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """What a model's configuration says."""

    layers: int
    d_model: int
    queries: int
    """Numbers in the queries of a token, all heads together."""
    keys: int
    """Numbers in its keys; as many in its values."""
    hidden: int
    """Neurons of an MLP."""
    matrices: int
    """Matrices of an MLP: 3 where it is gated, else 2."""
    vocabulary: int
    tied: bool
    """Whether the LM head is the embedding."""

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices of all layers: what each token is multiplied by."""
        attention = 2 * self.d_model * (self.queries + self.keys)
        return self.layers * (attention + self.matrices * self.d_model * self.hidden)

    @property
    def parameters(self) -> int:
        """The same with embedding and LM head; without norms, biases and learned positions, which are below 1 %."""
        return self.layer_parameters + (1 if self.tied else 2) * self.vocabulary * self.d_model


def _plain(layers: int, d_model: int, vocabulary: int, *, tied: bool) -> Sizes:
    """A model of the shape of GPT-2: as many keys as queries, an MLP four times as wide, without a gate."""
    return Sizes(layers, d_model, d_model, d_model, 4 * d_model, 2, vocabulary, tied)


def _gated(layers: int, d_model: int, queries: int, keys: int, hidden: int, vocabulary: int, *, tied: bool) -> Sizes:
    return Sizes(layers, d_model, queries, keys, hidden, 3, vocabulary, tied)


KNOWN: dict[str, Sizes] = {
    # openai-community
    "gpt2": _plain(12, 768, 50257, tied=True),
    "gpt2-medium": _plain(24, 1024, 50257, tied=True),
    "gpt2-large": _plain(36, 1280, 50257, tied=True),
    "gpt2-xl": _plain(48, 1600, 50257, tied=True),
    "distilgpt2": _plain(6, 768, 50257, tied=True),
    # EleutherAI
    "pythia-14m": _plain(6, 128, 50304, tied=False),
    "pythia-31m": _plain(6, 256, 50304, tied=False),
    "pythia-70m": _plain(6, 512, 50304, tied=False),
    "pythia-160m": _plain(12, 768, 50304, tied=False),
    "pythia-410m": _plain(24, 1024, 50304, tied=False),
    "pythia-1b": _plain(16, 2048, 50304, tied=False),
    "pythia-1.4b": _plain(24, 2048, 50304, tied=False),
    "pythia-2.8b": _plain(32, 2560, 50304, tied=False),
    "pythia-6.9b": _plain(32, 4096, 50432, tied=False),
    "pythia-12b": _plain(36, 5120, 50688, tied=False),
    # meta-llama
    "llama-3.2-1b": _gated(16, 2048, 2048, 512, 8192, 128256, tied=True),
    "llama-3.2-3b": _gated(28, 3072, 3072, 1024, 8192, 128256, tied=True),
    "llama-3.1-8b": _gated(32, 4096, 4096, 1024, 14336, 128256, tied=False),
    "llama-3.1-70b": _gated(80, 8192, 8192, 1024, 28672, 128256, tied=False),
    # google
    "gemma-2-2b": _gated(26, 2304, 2048, 1024, 9216, 256000, tied=True),
    "gemma-2-9b": _gated(42, 3584, 4096, 2048, 14336, 256000, tied=True),
    "gemma-2-27b": _gated(46, 4608, 4096, 2048, 36864, 256000, tied=True),
    "gemma-3-270m": _gated(18, 640, 1024, 256, 2048, 262144, tied=True),
    "gemma-3-1b": _gated(26, 1152, 1024, 256, 6912, 262144, tied=True),
    "gemma-3-4b": _gated(34, 2560, 2048, 1024, 10240, 262208, tied=True),
    "gemma-3-12b": _gated(48, 3840, 4096, 2048, 15360, 262208, tied=True),
    "gemma-3-27b": _gated(62, 5376, 4096, 2048, 21504, 262208, tied=True),
    # Qwen
    "qwen2.5-0.5b": _gated(24, 896, 896, 128, 4864, 151936, tied=True),
    "qwen2.5-1.5b": _gated(28, 1536, 1536, 256, 8960, 151936, tied=True),
    "qwen2.5-3b": _gated(36, 2048, 2048, 256, 11008, 151936, tied=True),
    "qwen2.5-7b": _gated(28, 3584, 3584, 512, 18944, 152064, tied=False),
    "qwen2.5-14b": _gated(48, 5120, 5120, 1024, 13824, 152064, tied=False),
    "qwen2.5-32b": _gated(64, 5120, 5120, 1024, 27648, 152064, tied=False),
    "qwen3-0.6b": _gated(28, 1024, 2048, 1024, 3072, 151936, tied=True),
    "qwen3-1.7b": _gated(28, 2048, 2048, 1024, 6144, 151936, tied=True),
    "qwen3-4b": _gated(36, 2560, 4096, 1024, 9728, 151936, tied=True),
    "qwen3-8b": _gated(36, 4096, 4096, 1024, 12288, 151936, tied=False),
    "qwen3-14b": _gated(40, 5120, 5120, 1024, 17408, 151936, tied=False),
    "qwen3-32b": _gated(64, 5120, 8192, 1024, 25600, 151936, tied=False),
    # HuggingFaceTB
    "smollm2-135m": _gated(30, 576, 576, 192, 1536, 49152, tied=True),
    "smollm2-360m": _gated(32, 960, 960, 320, 2560, 49152, tied=True),
    "smollm2-1.7b": _gated(24, 2048, 2048, 2048, 8192, 49152, tied=True),
    # mistralai
    "mistral-7b": _gated(32, 4096, 4096, 1024, 14336, 32000, tied=False),
}
"""By the end of the hub's name, in small letters."""

VARIANTS = ("-deduped", "-instruct", "-it", "-pt", "-base", "-v0.1", "-v0.2", "-v0.3")
"""Ends of names of models of the same shape. (The vocabulary of Mistral's v0.3 has 768 tokens more.)"""


def known(name: str) -> Sizes | None:
    """The sizes of a model by its hub id; None if it is not in the table."""
    short = name.rpartition("/")[2].lower().removeprefix("meta-")
    while short not in KNOWN:
        end = next((end for end in VARIANTS if short.endswith(end)), None)
        if end is None:
            return None
        short = short.removesuffix(end)
    return KNOWN[short]
