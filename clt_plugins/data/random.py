"""Random numbers by key: a generator that depends on a seed and names only, never on what was drawn before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def digest(*key: Any) -> int:
    """56 random bits that depend on the key only; the same in every process and on every machine."""
    # Not Python's `hash`: it differs from process to process.
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest(), "big")


def generator(seed: int, *key: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose: `generator(context.seed, "dropout", step)`.

    Args:
        seed: the run's.
        key: names and numbers of what is drawn; any other key gives other numbers.
    """
    import torch

    return torch.Generator(device).manual_seed(digest(seed, *key))
