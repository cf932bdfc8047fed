"""What a plugin hands over: a `Spec` for each choice; and what its `build` is told: a `Context`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    import torch

    from clt_plugins.contract.interfaces import Kernels, Parallel
    from clt_plugins.recipe.read import Recipe

API_VERSION = 1
"""The plugin contract's version. A plugin that says `CLT_API = 1` is refused when this is another number."""


@attrs.frozen
class Spec:
    """One choice for one table of a recipe."""

    name: str
    """What the recipe says."""
    config: type
    """A frozen, keyword-only attrs class of plain TOML types, `Path` and `Literal`, documented field by field."""
    build: Callable[..., Any]
    """`build(config, context)` gives the object that the hook's documentation asks for. Import heavy things inside."""
    aliases: tuple[str, ...] = ()
    """Older names that recipes may still use."""


class WrongReturn(TypeError):
    """Something that a plugin built returned what its protocol does not allow."""

    def __init__(self, made: object, text: str):
        super().__init__(text)
        self.made = made


class Broken(Exception):
    """A choice does not keep the contract: its `build` failed, or returned something else."""

    def __init__(self, spec: Spec, text: str):
        super().__init__(text)
        self.spec = spec


@attrs.frozen
class Selected:
    """What a recipe's table becomes: the choice and its typed settings."""

    spec: Spec
    config: Any

    @property
    def name(self) -> str:
        return self.spec.name

    def build(self, context: Context) -> Any:
        """Build the chosen object.

        Raises:
            ValueError, OSError: what the plugin tells the user, unchanged.
            Broken: any other fault in it.
        """
        try:
            return self.spec.build(self.config, context)
        except (ValueError, OSError, MemoryError):
            raise
        except Exception as error:
            raise Broken(self.spec, f"failed in build: {type(error).__name__}: {error}") from error


@attrs.frozen(kw_only=True)
class Context:
    """What is known of the run when a choice is built. New fields may come; none goes without a new API_VERSION."""

    recipe: Recipe | None
    """The whole recipe, typed; None where a saved transcoder is loaded."""
    seed: int
    """The run's seed; derive your own generators from it."""
    device: torch.device
    """Where the transcoder lives."""
    dtype: torch.dtype
    """The type of its parameters."""
    batch_tokens: int
    """B: tokens in a training batch, of all ranks together."""
    steps: int
    """How many training steps the run has."""
    dead_after_tokens: int = 0
    """A feature that was active at none of so many tokens is dead."""
    kernels: Kernels
    """The sparse products for this device."""
    parallel: Parallel
    """How features and tokens are split over ranks."""
    folder: Path | None = None
    """The run's folder; None where nothing is written (`--dry-run`, tests)."""
    layers: int = 0
    """L: 0 while the source, which knows it, is not built."""
    d_model: int = 0
    """D: 0 while the source, which knows it, is not built."""
    features: int = 0
    """F: features per layer, of all ranks together."""
