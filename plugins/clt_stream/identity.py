"""What a stream's rows depend on, as digests of content: the same for a copy elsewhere, another for other content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 2**22
"""Numbers that are added up at a time."""
SAMPLE = 4096
"""Numbers of each parameter that are hashed as they are."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer type of each size in bytes."""
INCIDENTAL = ("transformers_version", "dtype", "torch_dtype", "architectures", "pad_token_id")
"""Settings of a model that change no activation, or that are checked elsewhere. Names with `_` in front are, too."""


def model_identity(model: PreTrainedModel) -> str:
    """A digest of the loaded weights, with their names, shapes and types, and of the model's settings.

    A cryptographic hash of all weights would take minutes. So all bits are added up as integers, at the speed of the
    memory, and some numbers of each parameter are hashed. Another training or another file changes nearly all of them.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_settings(model.config), sort_keys=True, default=str).encode())
    count, sums = 0, []
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(weight.shape)} {weight.dtype};".encode())
        flat = weight.detach().flatten()
        bits = flat.view(BITS[flat.element_size()])
        # Pieces, since adding up may copy them to int64 first. The sums of all are moved to the CPU at once.
        sums += [piece.sum(dtype=torch.int64) for piece in bits.split(PIECE)]
        digest.update(_bytes(bits[:: max(1, bits.numel() // SAMPLE)]))
        count += bits.numel()
    if sums:
        digest.update(_bytes(torch.stack([each.cpu() for each in sums])))
    return f"{count} weights, sha256 {digest.hexdigest()[:32]}"


def special_tokens(tokenizer: Any) -> list[int]:
    """Ids of all special tokens: those that the tokenizer names (BOS, padding), and others that are marked as special,
    such as Llama 3's around a role of a chat."""
    marked = {number for number, token in added_tokens(tokenizer).items() if token.special}
    return sorted({*tokenizer.all_special_ids, *marked})


def added_tokens(tokenizer: Any) -> Mapping[int, Any]:
    """The tokens that are beside the vocabulary, by id; none of a tokenizer without such a table (mistral-common's)."""
    table = tokenizer.added_tokens_decoder
    return table if isinstance(table, Mapping) else {}


def tokenizer_identity(tokenizer: Any) -> str:
    """A digest of what turns text into tokens: vocabulary, merges, normalisation, special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        table: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        table = json.loads(backend.to_str())
        # Set by whoever used the tokenizer last.
        table = {key: value for key, value in table.items() if key not in ("truncation", "padding")}
    special = {"ids": special_tokens(tokenizer), "bos": tokenizer.bos_token_id}
    text = json.dumps([table, special, tokenizer("a")["input_ids"]], sort_keys=True)
    return f"{len(tokenizer)} tokens, sha256 {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def text_identity(texts: Any) -> str:
    """See `Texts.identity`."""
    return texts.identity()


def _settings(config: Any) -> dict[str, Any]:
    """What a model's configuration has that is not a default: defaults that a newer library adds change nothing."""
    settings = config.to_diff_dict()
    return {key: value for key, value in settings.items() if key not in INCIDENTAL and not key.startswith("_")}


def _bytes(x: Tensor) -> bytes:
    return x.cpu().contiguous().numpy().tobytes()
