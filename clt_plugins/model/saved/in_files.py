"""What of a transcoder stands in files, and under which names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from clt_plugins.contract.context import Context
from clt_plugins.contract.spec import Selected
from clt_plugins.model.parameters import View, joined_views, own_views, saved_buffers
from clt_plugins.model.saved.description import save_transcoder
from clt_plugins.model.saved.load import load_transcoder
from clt_plugins.recipe.structure import plain

if TYPE_CHECKING:
    from clt_plugins.contract.model.activation import Activation
    from clt_plugins.contract.model.encoder import Encoder
    from clt_plugins.contract.model.normalisation import Normalisation
    from clt_plugins.contract.model.tying import Tying
    from clt_plugins.registry.plugins import Plugins


class InFiles(nn.Module):
    """The part of a transcoder that is about its files."""

    context: Context
    choices: dict[str, Selected]
    encoder: Encoder
    activation: Activation
    tying: Tying
    normaliser: Normalisation
    described_model: dict[str, Any] | None

    def views(self) -> dict[str, View]:
        """How parameters are cut for files: name in files -> (parameter, view of it, feature axis of the view)."""
        assert isinstance(self.activation, nn.Module)
        parts = {"encoder": self.encoder.views(), "tying": self.tying.views(), "activation": own_views(self.activation)}
        return joined_views(parts, self.choices)

    def model_described(self) -> dict[str, Any]:
        """The language model whose activations it was trained on, as the recipe names it; empty if unknown."""
        if self.described_model is None and self.context.recipe is not None:
            return plain(self.context.recipe.model) if self.context.recipe.model is not None else {}
        return self.described_model or {}

    def tensors(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Everything that a saved transcoder holds, by its name in files: views, not copies.

        Args:
            without: parameters that are left out, by their names in files.
        """
        parameters = dict(self.named_parameters())
        views = {name: view for name, view in self.views().items() if name not in without}
        out = {name: view(parameters[owner].detach()) for name, (owner, view, _) in views.items()}
        # Statistics, and what plugins keep in buffers: by module, `normaliser.input_shift`, `activation.mean`.
        return out | {_in_files(name): value for name, value, _ in saved_buffers(self)}

    def statistics(self) -> dict[str, Tensor]:
        """The normalisation's numbers, by name; in files `normaliser.` stands before it."""
        assert isinstance(self.normaliser, nn.Module)
        return dict(self.normaliser.named_buffers())

    def feature_axes(self) -> dict[str, int | None]:
        """Which axis of each of `tensors` counts features; None if every rank has all of it."""
        axes = {name: axis for name, (_, _, axis) in self.views().items()}
        return axes | {_in_files(name): axis for name, _, axis in saved_buffers(self)}

    def save(self, folder: str | Path) -> None:
        """Write `transcoder.safetensors` (of several ranks: a slice each) and `transcoder.json`; see `load`."""
        save_transcoder(self, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        plugins: Plugins | None = None,
        kernels: str = "auto",
        lazy: bool | None = None,
    ) -> Self:
        """A saved transcoder (a run's `transcoder/`, or a checkpoint), ready for raw activations, in eval mode.

        Also reads the formats of other tools that an exporter recognises (a circuit-tracer folder, a checkpoint of
        crosslayer-coding), and logs which it found.

        Args:
            folder: on this disk, or on the Hugging Face hub: `user/name[/folder][@revision]`, with `hf://` before it or
                not. A local one of that name wins. Of a run on the hub it is the converted transcoder where there is
                one.
            lazy: leave the decoder of another tool's folder on disk, and read the rows of active features as they are
                needed, where the format can; by default if it is over 2 GiB. Such a transcoder cannot be trained.

        Raises:
            Refused: the folder is not a complete transcoder, or needs a plugin that is not installed; says which. Of
                the hub: there is no such repository or revision, it may not be read, or what it holds is refused.
            OSError: the hub does not answer.
        """
        return load_transcoder(cls, Path(folder), device=device, plugins=plugins, kernels=kernels, lazy=lazy)


def _in_files(name: str) -> str:
    """A buffer's name in files: the targets' variance stands among the normalisation's numbers."""
    return f"normaliser.{name}" if name == "target_variance" else name
