"""Members of a sweep that share a stream, trained in turns: each step of each of them is that of a run alone.

The member that is furthest behind in the stream goes first. So all stand at the same batch, or wait until those that
were resumed from an earlier step have come there. A member that fails leaves; one that is done waits for its stages
until all are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch
from tqdm import tqdm

from clt_plugins.distributed.transformed import transformed
from clt_plugins.errors import ExitCode, Fault, Faults, Refused, Stopped
from clt_plugins.files.untrusted import has_file
from clt_plugins.finished.stages import check_stages
from clt_plugins.model.assemble import Parts, assemble_around, build_source, make_context
from clt_plugins.model.in_model.passes import check_losses
from clt_plugins.model.normalisation.fit import fit_to_source
from clt_plugins.recipe.read import recipe_data
from clt_plugins.registry.build import naming_plugins
from clt_plugins.toml import inline
from clt_plugins.training.between.steering import check_steering
from clt_plugins.training.prepared import Prepared
from clt_plugins.training.saved.folder import run_folder
from clt_plugins.training.sweep.draws import Draws, Own
from clt_plugins.training.sweep.stream import Stream
from clt_plugins.training.sweep.turn import Turn, scorer

if TYPE_CHECKING:
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.distributed.signals import Signals
    from clt_plugins.recipe.sweep import Member
    from clt_plugins.registry.plugins import Plugins


class Together:
    """Members on one stream, built, checked, and at the steps where they begin.

    Args:
        stack: what is opened here is closed by it.
        root: the sweep's folder.
        resume: go on from the latest checkpoint of each member that has one.
        scoring: whether members whose recipe has no stage for it are scored; see `Turn.scorer`.

    Raises:
        Faults: of all members.
    """

    def __init__(
        self,
        stack: ExitStack,
        members: Sequence[Member],
        root: Path,
        parallel: Parallel,
        plugins: Plugins,
        *,
        resume: bool = False,
        accepted: Collection[str] = (),
        scoring: bool = True,
    ):
        first = members[0].recipe
        with naming_plugins(plugins.infos, first):
            # As in a run alone: what a plugin draws from torch's generators while the source is built comes first.
            torch.manual_seed(first.seed)
            device = make_context(first, parallel=parallel).device
            before = Draws.now(device)
            self.stream = Stream(build_source(first, parallel), device)
        stack.callback(self.stream.close)
        built = Draws.now(device)
        self.turns: list[Turn] = []
        faults: list[Fault] = []
        for member in members:
            torch.manual_seed(member.recipe.seed)
            if before == built:
                built = before = Draws.now(device)
            elif member.recipe.seed != first.seed:
                text = "the source draws from torch's own generators when it is built, so seeds cannot share a stream"
                raise Refused("sweep.seed", f"{text}: leave out data_seed")
            turn = Turn(
                member=member,
                folder=root / member.label,
                own=Own(built),
                reader=self.stream.reader(),
                plugins=plugins,
            )
            self.turns.append(turn)
            there = resume and has_file(turn.folder / "recipe.toml")
            stack.push(turn.opened)
            start = turn.opened.enter_context(
                run_folder(parallel, member.recipe, turn.folder, "latest" if there else None, accepted)
            )
            try:
                with turn.taken():
                    parts = _parts(start.recipe, start.folder, device, parallel, turn)
                    check_losses(start.recipe, parts.losses, parts.source, parallel.data_ranks)
                    check_steering(parts)
                    stages = check_stages(parts, start.recipe, plugins)
                    turn.scorer = scorer(parts, start.recipe, plugins, stages) if scoring else None
                    turn.one = Prepared(parts, start, accepted, plugins, stages)
            except Faults as error:
                faults += [attrs.evolve(one, text=f"{one.text} (member {member.label})") for one in error.faults]
        if faults:
            raise Faults(faults)
        self._begin()

    def _begin(self) -> None:
        """Load checkpoints, or fit statistics: those of members that read the same are estimated once."""
        fresh: dict[str, list[Turn]] = {}
        for turn in self.turns:
            assert turn.one is not None
            recipe = turn.one.recipe
            if turn.one.begins:
                key = inline([recipe_data(recipe)["transforms"], recipe.train.statistics_tokens])
                fresh.setdefault(key, []).append(turn)
            else:
                with turn.taken():
                    turn.one.load()
        for turns in fresh.values():
            unfitted = [turn for turn in turns if turn.one is not None and turn.one.needs_statistics]
            several = [turn.one for turn in unfitted if turn.one is not None]
            if not several:
                continue
            train = several[0].recipe.train
            with unfitted[0].taken():
                fit_to_source(
                    [one.parts.transcoder for one in several],
                    several[0].parts.source,
                    train.statistics_tokens,
                    train.batch_tokens,
                )
        for turn in self.turns:
            assert turn.one is not None
            with turn.taken():
                if turn.one.begins:
                    turn.one.begin()
                turn.one.ready()

    def train(self, stack: ExitStack, signals: Signals) -> None:
        """Train all of them to their ends.

        Raises:
            Stopped: interrupted; every member has a checkpoint.
            Exception: the source failed.
        """
        for turn in self.turns:
            assert turn.one is not None
            turn.steps = steps = turn.one.steps(partial(self._stops, turn, signals), silent=True)
            stack.callback(steps.close)
            with turn.taken():
                next(steps)
        active = list(self.turns)
        left = sum(turn.one.recipe.train.steps - turn.one.progress.step for turn in active if turn.one is not None)
        with signals.in_loop(), tqdm(total=left, unit="step", dynamic_ncols=True) as bar:
            while active:
                turn = min(active, key=lambda turn: turn.at)
                bar.set_postfix_str(f"{len(active)} members", refresh=False)
                if self._step(turn, bar):
                    continue
                active.remove(turn)
                self.stream.leave([turn.reader])
        interrupted = [turn for turn in self.turns if turn.interrupted]
        if interrupted:
            at_steps = sorted({turn.one.progress.step for turn in interrupted if turn.one is not None})
            at = " to ".join(map(str, dict.fromkeys((at_steps[0], at_steps[-1]))))
            text = f"interrupted at step {at}, {len(interrupted)} checkpoints written: go on with --resume"
            raise Stopped(ExitCode.INTERRUPTED, text)

    def _stops(self, turn: Turn, signals: Signals) -> bool:
        """Whether a member is to stop now: one that had no turn yet with a batch that others have read takes it."""
        return signals.asked and all(other.one is None or other.at != turn.at + 1 for other in self.turns)

    def finish(self) -> Iterator[Turn]:
        """The stages of each member that is trained, and its scores; yields those that succeeded, one by one."""
        for turn in self.turns:
            if turn.one is None:
                continue
            try:
                with turn.taken():
                    turn.one.together()
                    turn.one.alone()
                    if turn.scorer is not None:
                        turn.score()
            except (KeyboardInterrupt, Stopped):
                raise
            except Exception as error:
                turn.fail(error)
                continue
            yield turn
            turn.one = None  # its memory is the next one's
            turn.opened.close()

    def _step(self, turn: Turn, bar: tqdm) -> bool:
        """A step of a member; whether it goes on."""
        assert turn.one is not None
        before = turn.one.progress.step
        try:
            with turn.taken():
                next(turn.steps)
        except StopIteration:
            return False
        except Stopped as stop:
            if stop.code == ExitCode.INTERRUPTED:
                turn.interrupted = True
            else:
                turn.fail(stop)
            return False
        except Exception as error:
            if self.stream.failure is not None:
                raise
            turn.fail(error)
            return False
        bar.update(turn.one.progress.step - before)
        return True


def _parts(recipe: Recipe, folder: Path, device: torch.device, parallel: Parallel, turn: Turn) -> Parts:
    """What a run of the recipe builds, around the member's reader."""
    context = attrs.evolve(make_context(recipe, folder, device, parallel), label=turn.member.label)
    parts = assemble_around(turn.reader, context)
    return attrs.evolve(parts, source=transformed(parts.source, parts.transforms, parts.context))
