"""What `[[stages]]` builds: something that is done with a transcoder after training, or at checkpoints during it."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import attrs
from attrs import Attribute, field, validators

OURS = ("transcoder", "checkpoints", "stages", "evaluations", "tensorboard")
"""Folders of a run that other things are in."""


def _below_run(_: Any, attribute: Attribute[Any], value: str) -> None:
    path = PurePosixPath(value)
    named = all(part[0] != "." for part in path.parts) and path.parts and path.parts[0] not in OURS
    if path.is_absolute() or not named or str(path) != value or "\\" in value:
        raise ValueError(f"must name a folder below the run's, other than {', '.join(OURS)}: {value!r}")


@attrs.frozen(kw_only=True)
class StageInfo:
    """What the engine must know of a stage to run it."""

    folder: str = field(validator=_below_run)
    """Where its result goes, below the run's folder: "evaluation", "exports/safetensors"."""
    needs: Literal["transcoder", "source", "language_model"] = "source"
    """What it reads besides files of its own: nothing but the transcoder; held-out or training activations; or also
    the language model of the source. What is not there is refused before training."""
    returns_transcoder: bool = False
    """Whether `run` returns another transcoder. It is saved in the folder, and later stages get it."""
    every: int | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Also run it every so many steps during training, on the checkpoint just written."""
    ranks: Literal["one", "all"] = "one"
    """Which processes run it: rank 0 alone, with all features, after the others have left; or all, with their shares
    of the features, before that. Stages for all ranks come first in a recipe."""
    record: str = "stage.json"
    """The JSON file in the folder that says what the result was made from, as `made_from`. The engine writes it, unless
    the stage has: then with `job.made_from` under that key."""
    keeps_older: bool = False
    """Whether an older result on another transcoder is moved aside (`NAME-<digest>`), and not replaced."""
    reads: tuple[str, ...] = ()
    """Folders of other stages' results that it reads, below the run's. A stage before it must write each, and it runs
    again when one of them has changed."""
    may_read: tuple[str, ...] = ()
    """Such folders that need not be there."""


class Stage(Protocol):
    """Something that is done with a transcoder: converted, judged, written in another form, sent.

    A result that is complete, and was made from the same transcoder with the same settings, is not made again. So
    `run --resume` does what is missing.
    """

    info: StageInfo

    def check(self, job: Any) -> Any:
        """Before training: refuse what would make `run` fail.

        Args:
            job: a `Job`. The transcoder is as `run` will get it, but its values mean nothing, and it may be on the
                device "meta". `source` is None in a plan, which builds none. `folder` does not exist.

        Returns:
            With `returns_transcoder`, such a transcoder as `run` will return; else None.

        Raises:
            Faults: settings that cannot work; a setting of its own is `stages.NAME.setting`.
        """

    def run(self, job: Any) -> Any:
        """Do it, and write the result into `job.folder`, which is empty.

        If this fails, or is broken off, the folder goes, and an older result stays. The job's transcoder must be as it
        was afterwards. It is in eval mode.

        Args:
            job: a `Job`.

        Returns:
            With `returns_transcoder`, the transcoder for later stages; else None.

        Raises:
            Refused: this transcoder or these data do not do; says why and what to do.
            Unreachable: the settings ask for what the transcoder cannot give.
        """
