"""Checkpoints: a transcoder and all that training needs to continue as if it had never stopped.

`checkpoints/step_000100/` holds `transcoder.safetensors` and `.json` (so a checkpoint loads as a transcoder),
`training.safetensors` (optimizer moments, dead-feature counters, torch's generators) and `training.json`. Where
features are split over ranks each rank writes its slices (`...-00000-of-00004.safetensors`); any number of ranks can
read them.

Only folders called `step_` and digits are checkpoints; all other names are the user's, and left alone. If a run goes on
from an earlier checkpoint, later ones are moved to `checkpoints/set_aside/` before it trains (`set_aside`). So the
highest step is always the one written last, and of this history.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.distributed.generators import CPU, DEVICE, generator_states
from clt_plugins.distributed.transformed import load_position
from clt_plugins.files.atomic import flush, remove
from clt_plugins.files.folders import atomic_folder
from clt_plugins.files.records import read_json, write_json
from clt_plugins.files.sliced import SlicedTensors, put_tensors
from clt_plugins.files.steps import step_folders, step_name, step_of
from clt_plugins.model.normalisation.stored import check_stored
from clt_plugins.model.saved.description import put_transcoder
from clt_plugins.model.saved.tensors import copy_tensors
from clt_plugins.model.select.above import CapacityState
from clt_plugins.training.kept import state as state_of
from clt_plugins.training.kept.finite import check_finite
from clt_plugins.training.kept.moments import moments, set_moments

if TYPE_CHECKING:
    from clt_plugins.model.assemble import Parts


logger = logging.getLogger(__name__)

STEERING = "steering"
"""The name of the state of `Steering`."""
NEEDS = ("transcoder.json", "transcoder*.safetensors", "training.json", "training*.safetensors")
"""Files of every checkpoint."""


@attrs.define(eq=False)
class Progress:
    """Where training stands."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens trained on."""
    idle_tokens: Tensor
    """Tokens since each feature was last active, [L, F] int64."""
    recipe: str = ""
    """What it is trained by, as TOML."""
    identity: Mapping[str, str] = attrs.field(factory=dict)
    """What the data are made from, as the source says (`Identified`)."""
    stopped: str = ""
    """Why a callback has ended training before its last step; empty if none has."""
    texts: Any = None
    """How far the texts for losses that run the model are read; see `TrainsInModel.training_text`."""
    steering: Tensor | None = None
    """`Steering.state`, where L0 has a target."""
    generators: dict[str, Tensor] = attrs.field(factory=dict)
    """States of torch's generators in the checkpoint, for the moment at which training goes on."""


@attrs.frozen(kw_only=True)
class TrainingState:
    """`training.json`: what training needs to go on, besides tensors."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens trained on."""
    runs_dense: bool
    """Whether the transcoder ran by matrix products, not by sparse ones."""
    source: dict[str, Any]
    """`Source.state()`: which data come next; with transforms, see `TransformedSource`."""
    recipe: str = ""
    """The recipe that it was trained by, as TOML: what a resumed run is compared with."""
    identity: dict[str, str] = attrs.field(factory=dict)
    """What its data are made from, by setting."""
    capacity: CapacityState | None = None
    """Places for pairs above a threshold, where sizes are fixed."""
    stopped: str = ""
    """Why a callback has ended training; empty if none has."""
    plugins: dict[str, Any] = attrs.field(factory=dict)
    """What `Stateful` plugins keep, by their path in the recipe (`losses[1]`): name and state."""
    texts: Any = None
    """How far texts for losses that run the language model are read."""


def save_checkpoint(
    folder: Path,
    progress: Progress,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> Path:
    """Write `folder/step_XXXXXX` atomically, then remove all but the `keep` newest.

    Raises:
        OSError: it could not be written; earlier checkpoints are untouched.
    """
    transcoder, parallel = parts.transcoder, parts.context.parallel
    path = folder / step_name(progress.step)
    generators = generator_states(parallel, parts.context.device)
    plugins = state_of.data(parts)
    capacity = transcoder.capacity.state(parallel)  # asks all ranks, which those that write must not
    with atomic_folder(path, parallel) as partial:
        # A checkpoint is a transcoder too: `evaluate` and `load` read it like a finished one.
        put_transcoder(transcoder, partial)
        tensors, axes = moments(parts, optimizer)
        kept, their_axes = state_of.tensors(parts)
        tensors, axes = tensors | kept, axes | their_axes
        tensors["idle_tokens"], axes["idle_tokens"] = progress.idle_tokens, 1
        tensors, axes = tensors | generators, axes | dict.fromkeys(generators)
        if progress.steering is not None:
            tensors[STEERING], axes[STEERING] = progress.steering, None
        put_tensors(partial, "training", tensors, axes, parallel, transcoder.n_features)
        state = TrainingState(
            step=progress.step,
            tokens=progress.tokens,
            runs_dense=transcoder.runs_dense,
            source=parts.source.state(),
            recipe=progress.recipe,
            identity=dict(progress.identity),
            texts=progress.texts,
            capacity=capacity,
            stopped=progress.stopped,
            plugins=plugins,
        )
        if parallel.rank == 0:
            write_json(partial / "training.json", state)
    if parallel.rank == 0:
        # By number the oldest; but never the one just written, whatever else lies there.
        for old in [one for one in step_folders(folder) if one != path][: -(keep - 1) or None]:
            _prune(old)
    return path


def _prune(path: Path) -> None:
    """Remove a checkpoint. Under its own name it is complete or not there, also if this is interrupted."""
    if path.is_symlink():
        remove(path)
        return
    doomed = path.with_name(f".{path.name}.old-0")
    if doomed.exists():
        remove(doomed)
    try:
        path.rename(doomed)
    except OSError as error:
        logger.warning("%s: could not be removed: %s", path, error.strerror)
        return
    remove(doomed)


def set_aside(folder: Path, step: int, what: str = "checkpoints") -> list[Path]:
    """Move checkpoints (or results of stages) later than a step to `set_aside/N/`, the latest first; they are of a
    history that is left.

    Interrupted, it leaves the earlier ones of them: those are still of one history.

    Raises:
        OSError: one cannot be moved; names it.
    """
    later = [path for path in step_folders(folder) if step_of(path) > step]
    if not later:
        return []
    aside = folder / "set_aside"
    numbers = [int(path.name) for path in aside.glob("*") if re.fullmatch(r"\d+", path.name)]
    target = aside / str(max(numbers, default=0) + 1)
    moved = []
    for path in reversed(later):
        try:
            target.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():  # a relative link would lead elsewhere from there
                (target / path.name).symlink_to(path.resolve(), target_is_directory=True)
                path.unlink()
            else:
                path.rename(target / path.name)
            flush(target)
            flush(folder)
        except OSError as error:
            raise OSError(f"{path}: could not be set aside in {target}: {error.strerror or error}") from error
        moved.append(target / path.name)
    names = ", ".join(path.name for path in later)
    logger.warning("going back to step %s: later %s are set aside in %s: %s", step, what, target, names)
    return moved


def state_in(path: Path) -> TrainingState:
    """What a checkpoint says of itself."""
    return read_json(path / "training.json", TrainingState)


def load_checkpoint(
    path: Path,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    *,
    accepted: Collection[str] = (),
    source_anew: bool = False,
) -> Progress:
    """Continue from a checkpoint that is verified: everything in the arguments is set to it, but for the
    state of plugins (`load_plugins_state`), which callbacks may only now make room for.

    Args:
        accepted: choices of the recipe that may be others than the checkpoint's. With callbacks among them, a run that
            one had ended goes on.
        source_anew: leave the source at its beginning, since it reads other data.

    Raises:
        Refused: a number in it is not finite, or a scale is not positive.
    """
    transcoder = parts.transcoder
    copy_tensors(SlicedTensors.find(path, "transcoder"), transcoder)
    check_stored(transcoder, path / "transcoder.safetensors")
    state = state_in(path)
    stored = SlicedTensors.find(path, "training")
    idle_tokens = stored.read_part("idle_tokens", 1, transcoder.own).to(transcoder.device)
    others = {"idle_tokens", CPU, DEVICE, STEERING}
    of_optimizer = [name for name in stored.shapes if name not in others and not state_of.OF_PLUGIN.match(name)]
    set_moments(parts, optimizer, stored, of_optimizer, accepted)
    check_finite(path / "training.safetensors", transcoder, optimizer)
    # Where the recipe, perhaps another than before, or the activation does not say it.
    if transcoder.path == "auto" and not transcoder.activation.fixed_size:
        transcoder.runs_dense = state.runs_dense
    if not transcoder.runs_dense:
        transcoder.capacity.load_state(state.capacity)
    transcoder.step, transcoder.tokens = state.step, state.tokens
    if not source_anew:
        load_position(parts.source, state.source)
    generators = {name: stored.read(name) for name in (CPU, DEVICE) if name in stored.shapes}
    ended = "" if any(one.startswith("callbacks") for one in accepted) else state.stopped
    texts = None if source_anew else state.texts
    steering = stored.read(STEERING) if STEERING in stored.shapes else None
    return Progress(
        state.step,
        state.tokens,
        idle_tokens,
        stopped=ended,
        texts=texts,
        steering=steering,
        generators=generators,
    )


def load_plugins_state(path: Path, parts: Parts, accepted: Collection[str]) -> None:
    """Set what plugins outside the transcoder keep to what a checkpoint holds; see `state.load`."""
    state = state_in(path)
    state_of.load(parts, SlicedTensors.find(path, "training"), state.plugins, accepted)
