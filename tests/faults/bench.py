"""Where tries happen: a zygote, folders that are prepared once, and what unbroken commands make in them."""

from __future__ import annotations

import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs

from tests.faults.commands import COMMANDS, Command
from tests.faults.folders import FOLDERS, write_recipes
from tests.faults.forking import Ended, Zygote
from tests.faults.inject import COUNT, KILL_BEFORE, Call, calls, library
from tests.faults.oracle import content


@attrs.frozen
class Unbroken:
    """A command without a fault."""

    ended: Ended
    content: dict[str, str]
    """See `oracle.content`."""
    calls: list[Call]
    """Its mutating calls."""
    reads: list[Call]
    """Its calls that open or read a file."""


class Bench:
    """Folders of one campaign; they are deleted by `close`.

    Args:
        thorough: every command ends as an interpreter does; slower.
    """

    def __init__(self, *, thorough: bool = False) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="clt-faults-")).resolve()
        self.outside, self.slot = self.work / "outside", self.work / "slot"
        self.outside.mkdir()
        self.thorough = thorough
        self.library = library()
        self.record = self.outside / "record"
        self._prepared: set[str] = set()
        self._unbroken: dict[str, Unbroken] = {}
        self.cache: dict[str, Any] = {}
        """What families know after they ran once without a fault."""
        self._warm: set[tuple[str, ...]] = set()

    @cached_property
    def zygote(self) -> Zygote:
        return Zygote(self.library, self.outside)

    @cached_property
    def servers(self) -> Zygote:
        """Another zygote, for servers: language model libraries change asyncio when they are imported."""
        outside = self.outside / "servers"
        outside.mkdir()
        return Zygote(self.library, outside)

    def close(self) -> None:
        for name in ("zygote", "servers"):
            if name in self.__dict__:
                getattr(self, name).close()
        shutil.rmtree(self.work, ignore_errors=True)

    def run(self, arguments: tuple[str, ...], **options: Any) -> Ended:
        """Run a command in the slot; options are those of the zygote."""
        self.record.unlink(missing_ok=True)
        if options.get("fault"):
            options["record"] = str(self.record)
        if arguments[:2] not in self._warm:
            self._warm.add(arguments[:2])
            with self._aside():
                self.zygote.warm(list(arguments), self.slot)
        return self.zygote.run(list(arguments), self.slot, thorough=self.thorough, **options)

    def fresh(self, folder: str) -> Path:
        """The slot, as one of the prepared folders."""
        if folder not in self._prepared:
            self._prepare(folder)
        _copy(self.work / "prepared" / folder, self.slot)
        return self.slot

    def unbroken(self, name: str) -> Unbroken:
        """What a command does when nothing fails."""
        if name not in self._unbroken:
            command = COMMANDS[name]
            self.fresh(command.folder)
            reads = self._counted(command, {"kinds": 512}) if self.library else []
            self.fresh(command.folder)
            ended = self.run(command.arguments, fault={"mode": COUNT} if self.library else None)
            assert ended.code == 0, f"{name} fails without a fault: {ended}"
            self._unbroken[name] = Unbroken(ended, content(self.slot, command.makes), calls(self.record), reads)
        return self._unbroken[name]

    def _counted(self, command: Command, options: dict[str, int]) -> list[Call]:
        self.run(command.arguments, fault={"mode": COUNT, **options})
        return calls(self.record)

    def _prepare(self, folder: str) -> None:
        prepared, path = FOLDERS[folder], self.work / "prepared" / folder
        if prepared.after:
            self.fresh(prepared.after)
        else:
            shutil.rmtree(self.slot, ignore_errors=True)
            self.slot.mkdir(parents=True)
            write_recipes(self.slot)
            if prepared.model:
                import transformers  # takes seconds

                from tests.support.language_models import save_model, save_text

                transformers.logging.set_verbosity_error()
                transformers.logging.disable_progress_bar()
                save_model(self.slot / "model")
                save_text(self.slot / "text.jsonl", 60)
            if prepared.other:
                from tests.support.crosslayer_coding import write

                write(self.slot / "other", (150, 90, 160))
        for arguments in prepared.steps:
            if prepared.stop_at and arguments == prepared.steps[-1]:
                self._stopped(arguments, prepared.stop_at)
                continue
            ended = self.run(arguments)
            assert ended.code in (0, -9), f"{folder}: {arguments}: {ended}"
        _copy(self.slot, path)
        self._prepared.add(folder)

    def _stopped(self, arguments: tuple[str, ...], stop_at: str) -> None:
        """Run a command until it is killed at its first call on a path."""
        with self._aside():
            self.run(arguments, fault={"mode": COUNT})
            at = next(call.number for call in calls(self.record) if stop_at in call.path)
        self.run(arguments, fault={"mode": KILL_BEFORE, "at": at})

    def _aside(self) -> _Aside:
        return _Aside(self)


@attrs.frozen
class _Aside:
    """Puts the slot back as it was, for a command that is run to look at it."""

    bench: Bench

    def __enter__(self) -> None:
        _copy(self.bench.slot, self.bench.work / "aside")

    def __exit__(self, *_: object) -> None:
        _copy(self.bench.work / "aside", self.bench.slot)


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
