"""What a stage is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.reading.source import Source
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.finished.provenance import Provenance
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.registry.plugins import Plugins


@attrs.frozen(eq=False, kw_only=True)
class Job:
    """What a stage works with."""

    transcoder: CrossLayerTranscoder
    """In eval mode: with all features, or of a stage on all ranks with this rank's. `step` and `tokens` say how far it
    is trained."""
    source: Source = None  # type: ignore[assignment]
    """Its activations; None where the stage needs nothing but the transcoder, and in a plan."""
    recipe: Recipe | None
    """The run's; None where a transcoder without a recipe is exported."""
    context: Context
    """As `build` got it; `folder` is this result's."""
    plugins: Plugins
    """All choices that there are."""
    folder: Path
    """Where the result is written: empty, and under a temporary name until it is complete. On all ranks the same. In
    `check` nothing is there."""
    root: Path | None = None
    """The folder that results of stages go below, where those that it `reads` are: the run's, or at a checkpoint
    `stages/step_N` in it. None where the transcoder is in no run. `folder` may be elsewhere."""
    work: Path = Path()
    """A folder beside the result, for what a stage goes on from after it was killed; the stage makes it. It is removed
    when the result is complete, and stays after an error. The stage itself has to look whether it is of the same
    `made_from`. In `check` it is not set."""
    made_from: Provenance
    """The transcoder, and the settings that the result depends on."""
    show: Callable[[str, Any], None]
    """`show(text, record)`: tell the user the result. The record, attrs or plain data, is what a command shows with
    `--json`."""
    log: Callable[[Mapping[str, Any]], None]
    """Metrics by `group/name`, for the recipe's loggers, at the transcoder's step: during training those of the run;
    afterwards loggers of their own, which write into `folder`. Rank 0 logs."""
