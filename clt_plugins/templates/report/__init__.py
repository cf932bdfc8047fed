"""The report `example`: a table of all features, one line each, with the token at which each is most active."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Collected, Context, Facts


@frozen(kw_only=True)
class ExampleConfig:
    """`features.jsonl`, and the run's name in `run.json`."""

    dead: bool = True
    """Whether features that were never active are listed."""


class Example:
    """A `Report`. All that it needs is in the store: no model is run."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.config = config

    def write(self, collected: Collected, facts: Facts, folder: Path) -> None:
        """Write into an empty folder, layer by layer: a store may be larger than memory.

        Raises:
            Refused: the store has no examples.
        """
        info = collected.info
        if not info.settings.top:
            raise Refused("reports.example", 'needs the strongest examples: set "top" of the stage `collect` above 0')
        # Every member of `facts` may be empty: a transcoder of another tool has no run.
        run = {"name": facts.name, "evaluated": facts.evaluation is not None, "tokens": info.tokens}
        (folder / "run.json").write_text(json.dumps(run, sort_keys=True) + "\n", encoding="utf-8")
        with (folder / "features.jsonl").open("w", encoding="utf-8") as file:
            for layer in range(info.n_layers):
                arrays = collected.layer(layer)  # numpy arrays [F, ...] by name, mapped from disk
                for feature in range(info.n_features):
                    active = int(arrays["active"][feature])
                    if active or self.config.dead:
                        line = self._line(collected, layer, feature, active, float(arrays["maximum"][feature]))
                        file.write(json.dumps(line, ensure_ascii=True) + "\n")

    def _line(self, collected: Collected, layer: int, feature: int, active: int, maximum: float) -> dict[str, object]:
        top = [one.row for one in collected.examples(layer, feature).top[:1]]
        # Tokens are bytes: an emoji may be split over several. Nothing in them may be taken for markup.
        tokens = [piece.decode("utf-8", "backslashreplace") for piece in collected.spell(collected.ids[top])]
        density = active / collected.info.tokens
        return {"layer": layer, "feature": feature, "density": density, "maximum": maximum, "token": tokens}


@hookimpl
def clt_reports() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
