"""The bytes of each token of a vocabulary.

A tokenizer's own `decode` gives text, and U+FFFD for a token that is a part of a character. Its vocabulary holds bytes
in one of two spellings: byte-level ones (GPT-2, Llama 3, Qwen) have a printable character for each byte; sentencepiece
ones (Llama 2, Gemma) have text with U+2581 for a space, and `<0xE2>` for a byte. Which one it is shows when a text is
tokenized and spelled again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from clt_stream.identity import added_tokens

TRIAL = "a b  c\n\tDéjà 数 👩‍🚀 if x == 1:"
"""Words, spaces, and characters of up to four bytes."""

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def spelling(tokenizer: Any) -> Callable[[Sequence[int]], list[bytes]]:
    """A function that gives the bytes of each token of a tokenizer."""
    # An added token is spelled as it is. But a token of the vocabulary may be listed there too: Gemma's runs of spaces.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.get_vocab(with_added_tokens=False) if backend is not None else {}
    whole: dict[int, str] = {
        number: str(token)
        for number, token in added_tokens(tokenizer).items()
        if token.special or str(token) not in vocabulary
    }

    def speller(spell: Callable[[int, str], bytes]) -> Callable[[Sequence[int]], list[bytes]]:
        def of(ids: Sequence[int]) -> list[bytes]:
            names = tokenizer.convert_ids_to_tokens([int(number) for number in ids])
            return [
                # A model may have more embeddings than its tokenizer has tokens.
                b"<%d>" % number if name is None else (whole.get(number) or "").encode() or spell(number, name)
                for number, name in zip(ids, names, strict=True)
            ]

        return of

    ids = tokenizer(TRIAL, add_special_tokens=False)["input_ids"]
    expected = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    for spell in (_byte_level, _sentencepiece):
        of = speller(spell)
        if b"".join(of(ids)).decode("utf-8", "replace").strip() == expected:
            return of
    return speller(lambda number, name: tokenizer.decode([number]).encode())


def _byte_level(number: int, name: str) -> bytes:
    try:
        return bytes(BYTES[character] for character in name)
    except KeyError:
        return name.encode()


def _sentencepiece(number: int, name: str) -> bytes:
    byte = BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace("\u2581", " ").encode()


def _byte_table() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable ones of Latin-1 for themselves, the
    others for U+0100, U+0101, ... in turn (Radford et al. 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_table()
