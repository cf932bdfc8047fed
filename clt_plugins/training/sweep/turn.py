"""A member of a sweep: where it is, how it is scored, and what becomes of it when it fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from clt_plugins.contract.reading.source import HasModel
from clt_plugins.distributed.transformed import TransformedSource
from clt_plugins.finished.series import Series
from clt_plugins.finished.stages import check_stages
from clt_plugins.model.sparse import release_gradients
from clt_plugins.recipe.structure import structure_choice
from clt_plugins.registry.build import naming_plugins
from clt_plugins.training import learned
from clt_plugins.training.prepared import Prepared
from clt_plugins.training.sweep.draws import Own
from clt_plugins.training.sweep.labelled import labelled
from clt_plugins.training.sweep.stream import Reader

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.finished.stages import Chosen
    from clt_plugins.model.assemble import Parts
    from clt_plugins.recipe.sweep import Member
    from clt_plugins.registry.plugins import Plugins

logger = logging.getLogger(__name__)

SCORER = "evaluate"
"""The stage whose report has NMSE, L0 and what the language model loses."""
REPORTS = "evaluations"
"""The folder of the reports on members whose recipe has no such stage."""


@attrs.define(eq=False, kw_only=True)
class Turn:
    """A member, and where it is."""

    member: Member
    folder: Path
    own: Own
    reader: Reader
    plugins: Plugins
    opened: ExitStack = attrs.field(factory=ExitStack)
    """What is its own until it has failed or is done: its folder."""
    one: Prepared | None = None
    """None before it is built, and after it has failed."""
    steps: Iterator[None] = attrs.field(factory=lambda: iter(()))
    scorer: Chosen | None = None
    """The stage that scores it for the frontier, where its recipe has none."""
    error: str = ""
    """Why it failed."""
    interrupted: bool = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A block in which it has its turn: torch draws for it, messages have its label, errors its plugin."""
        with labelled(self.member.label), self.own.turn(), naming_plugins(self.plugins.infos, self.member.recipe):
            yield

    @property
    def at(self) -> int:
        """How many batches of the stream it has read."""
        assert self.one is not None
        source = self.one.parts.source
        return source.number if isinstance(source, TransformedSource) else self.one.progress.step

    def score(self) -> None:
        """Score the transcoder as its stages have left it; the report goes beside the member's folder, which stays what
        a run alone makes."""
        one, scorer = self.one, self.scorer
        assert one is not None and one.series is not None and scorer is not None
        series = Series(
            root=self.report.parent.parent,
            path=one.series.path,
            transcoder=one.series.transcoder,
            parts=one.parts,
            recipe=one.recipe,
            plugins=self.plugins,
            log=lambda metrics: None,
            quiet=True,
        )
        series.run(scorer)

    @property
    def report(self) -> Path:
        """The file with its scores."""
        if self.scorer is not None:
            info = self.scorer.info
            return self.folder.parent / REPORTS / self.member.label / info.folder / info.record
        assert self.one is not None
        of_recipe = [chosen.info for chosen in self.one.stages if chosen.selected.name == SCORER]
        return self.folder / of_recipe[-1].folder / of_recipe[-1].record if of_recipe else Path()

    def fail(self, error: Exception) -> None:
        """It is over for this member; what it holds is released."""
        # The text alone: an exception holds the frames that it went through, and so the transcoder.
        self.error, self.steps = " ".join(str(error).split()), iter(())
        logger.error("%s: %s; other members go on", self.member.label, self.error)
        logger.debug("%s", self.member.label, exc_info=error)
        if self.one is not None:
            release_gradients(learned.parameters(self.one.parts).values())
            self.one.optimizer.state.clear()
            self.one = None
        self.reader.stream.leave([self.reader])
        self.opened.__exit__(type(error), error, error.__traceback__)  # the folder's records say why


def scorer(parts: Parts, recipe: Recipe, plugins: Plugins, stages: Sequence[Chosen]) -> Chosen | None:
    """That stage on the held-out tokens that training is evaluated on, checked; None where the recipe has one, or no
    plugin offers it."""
    if any(chosen.selected.name == SCORER for chosen in stages) or SCORER not in plugins.choices("stages"):
        return None
    # As many as are in memory already.
    known = {"tokens", *(["model_tokens"] if isinstance(parts.source, HasModel) else [])}
    known &= attrs.fields_dict(plugins.pick("stages", SCORER).spec.config).keys()
    settings = dict.fromkeys(known, recipe.train.eval_tokens)
    changed: dict[str, Any] = {"stages": [structure_choice(plugins, "stages", {"name": SCORER, **settings})]}
    alone = attrs.evolve(recipe, **changed)
    return check_stages(attrs.evolve(parts, context=attrs.evolve(parts.context, recipe=alone)), alone, plugins)[0]
