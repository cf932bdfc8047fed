"""Checkpoints: a transcoder and all that training needs to go on as if it had never stopped.

`checkpoints/step_000100/` holds `transcoder.safetensors` and `.json` (so a checkpoint loads as a transcoder),
`training.safetensors` (optimizer moments, dead-feature counters, random state) and `training.json`. Where features are
split over ranks each rank writes its slices (`...-00000-of-00004.safetensors`); any number of ranks can read them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.files.folders import put_transcoder, read_json, take_tensors, verify, whole_folder, write_json
from clt_plugins.files.sliced import Stored, put_tensors

if TYPE_CHECKING:
    from clt_plugins.contract.interfaces import Source
    from clt_plugins.model.transcoder import CrossLayerTranscoder


@attrs.define(eq=False)
class Progress:
    """Where training stands."""

    step: int
    """Steps done."""
    tokens: int
    """Tokens trained on."""
    idle_tokens: Tensor
    """Tokens since each feature was last active, [L, F] int64."""


def save_checkpoint(
    folder: Path,
    progress: Progress,
    transcoder: CrossLayerTranscoder,
    optimizer: torch.optim.Optimizer,
    source: Source,
    keep: int,
) -> Path:
    """Write `folder/step_XXXXXX` whole, then drop all but the `keep` newest.

    Raises:
        OSError: it could not be written; earlier checkpoints are untouched.
    """
    place, parallel = folder / f"step_{progress.step:06}", transcoder.context.parallel
    with whole_folder(place, parallel) as partial:
        put_transcoder(transcoder, partial)
        tensors, axes = _moments(transcoder, optimizer)
        tensors["idle_tokens"], axes["idle_tokens"] = progress.idle_tokens, 1
        tensors["torch_rng"], axes["torch_rng"] = torch.get_rng_state(), None
        put_tensors(partial, "training", tensors, axes, parallel, transcoder.features)
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "runs_dense": transcoder.runs_dense,
            "source": source.state(),
        }
        if parallel.rank == 0:
            write_json(partial / "training.json", state)
    if parallel.rank == 0:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = folder.glob("step_*") if folder.is_dir() else []
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.removeprefix("step_")))


def find_checkpoint(folder: Path, wanted: str) -> Path:
    """The checkpoint to resume from: "latest", or a name such as "step_000100" or "100"; verified.

    Raises:
        ValueError: there is none, or it is damaged; then the newest whole one before it is offered.
    """
    known = checkpoints(folder)
    if not known:
        raise ValueError(f"{folder}: no checkpoint to resume from")
    if wanted == "latest":
        place = known[-1]
    else:
        number = wanted.removeprefix("step_")
        matching = [path for path in known if number.isdigit() and int(path.name.removeprefix("step_")) == int(number)]
        if not matching:
            raise ValueError(f"{folder}: no checkpoint {wanted!r} (there are: {', '.join(p.name for p in known)})")
        place = matching[0]
    try:
        verify(place)
    except ValueError as error:
        raise ValueError(f"{error}; {_offer(known[: known.index(place)])}") from error
    return place


def _offer(earlier: list[Path]) -> str:
    for path in reversed(earlier):
        try:
            verify(path)
        except ValueError:
            continue  # damaged too: look further back
        return f"the one before it is whole: --resume {path.name}"
    return "no earlier checkpoint is whole"


def load_checkpoint(
    place: Path, transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer, source: Source
) -> Progress:
    """Continue from a checkpoint that `find_checkpoint` gave: everything in the arguments is set to it."""
    take_tensors(transcoder, Stored.find(place, "transcoder"))
    state: dict[str, Any] = read_json(place / "training.json")
    stored = Stored.find(place, "training")
    idle_tokens = stored.read("idle_tokens", 1, transcoder.own).to(transcoder.W_enc.device)
    torch.set_rng_state(stored.read("torch_rng"))
    _set_moments(transcoder, optimizer, stored)
    transcoder.runs_dense = state["runs_dense"]
    source.load_state(state["source"])
    return Progress(state["step"], state["tokens"], idle_tokens)


def _moments(
    transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """The optimizer's state, cut like the parameters (`exp_avg/W_enc`), its counts by parameter (`step of b_enc`);
    and the feature axis of each."""
    parameters = dict(transcoder.named_parameters())
    out: dict[str, Tensor] = {}
    axes: dict[str, int | None] = {}
    for name, (owner, view, axis) in transcoder.views().items():
        for key, value in optimizer.state.get(parameters[owner], {}).items():
            full = f"{key} of {owner}" if value.dim() == 0 else f"{key}/{name}"
            out[full], axes[full] = (value, None) if value.dim() == 0 else (view(value), axis)
    return out, axes


@torch.no_grad()
def _set_moments(transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer, stored: Stored) -> None:
    parameters = dict(transcoder.named_parameters())
    views = transcoder.views()
    for full in stored.shapes.keys() - {"idle_tokens", "torch_rng"}:
        key, count, owner = full.partition(" of ")
        name = owner
        if not count:
            key, _, name = full.partition("/")
            owner = views[name][0] if name in views else ""
        parameter = parameters.get(owner)
        if parameter is None:
            raise ValueError(f"{stored.folder}: unknown training state {full!r}")
        state = optimizer.state[parameter]
        if count:
            # Fused optimizers keep the count of steps beside the parameter.
            state[key] = stored.read(full).to(parameter.device)
            continue
        _, view, axis = views[name]
        saved = stored.read(full, axis, transcoder.own)
        if key not in state:
            state[key] = torch.zeros_like(parameter, dtype=saved.dtype)
        view(state[key]).copy_(saved)
