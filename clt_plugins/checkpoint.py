"""Checkpoints: a transcoder and all that training needs to go on as if it had never stopped.

`checkpoints/step_000100/` holds `transcoder.safetensors` and `.json` (so a checkpoint loads as a transcoder),
`training.safetensors` (optimizer moments, dead-feature counters, random state) and `training.json`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.store import (
    put_transcoder,
    read_json,
    read_tensors,
    take_tensors,
    verify,
    whole_folder,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from clt_plugins.interfaces import Source
    from clt_plugins.transcoder import CrossLayerTranscoder


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
    place = folder / f"step_{progress.step:06}"
    with whole_folder(place) as partial:
        put_transcoder(transcoder, partial)
        tensors = _moments(transcoder, optimizer)
        tensors["idle_tokens"] = progress.idle_tokens
        tensors["torch_rng"] = torch.get_rng_state()
        write_tensors(partial / "training.safetensors", tensors)
        state = {
            "step": progress.step,
            "tokens": progress.tokens,
            "runs_dense": transcoder.runs_dense,
            "source": source.state(),
        }
        write_json(partial / "training.json", state)
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
    with torch.no_grad():
        take_tensors(transcoder, read_tensors(place / "transcoder.safetensors"), place)
    state: dict[str, Any] = read_json(place / "training.json")
    tensors = read_tensors(place / "training.safetensors")
    idle_tokens = tensors.pop("idle_tokens").to(transcoder.W_enc.device)
    torch.set_rng_state(tensors.pop("torch_rng"))
    _set_moments(transcoder, optimizer, tensors, place)
    transcoder.runs_dense = state["runs_dense"]
    source.load_state(state["source"])
    return Progress(state["step"], state["tokens"], idle_tokens)


def _moments(transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, cut like the parameters (`exp_avg/W_enc`); its counts by parameter (`step of b_enc`)."""
    parameters = dict(transcoder.named_parameters())
    out = {}
    for name, (owner, view, _) in transcoder.views().items():
        for key, value in optimizer.state.get(parameters[owner], {}).items():
            if value.dim() == 0:
                out[f"{key} of {owner}"] = value
            else:
                out[f"{key}/{name}"] = view(value)
    return out


def _set_moments(
    transcoder: CrossLayerTranscoder, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], place: Path
) -> None:
    parameters = dict(transcoder.named_parameters())
    views = transcoder.views()
    for full, saved in tensors.items():
        key, count, owner = full.partition(" of ")
        name = owner
        if not count:
            key, _, name = full.partition("/")
            owner = views[name][0] if name in views else ""
        parameter = parameters.get(owner)
        if parameter is None:
            raise ValueError(f"{place}: unknown training state {full!r}")
        state = optimizer.state[parameter]
        if count:
            # Fused optimizers keep the count of steps beside the parameter.
            state[key] = saved.to(parameter.device)
            continue
        if key not in state:
            state[key] = torch.zeros_like(parameter, dtype=saved.dtype)
        views[name][1](state[key]).copy_(saved)
