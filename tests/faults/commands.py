"""The commands under test: each in a folder of its own, with what it needs, how a user goes on, and what counts."""

from __future__ import annotations

import attrs

from tests.faults.folders import COLLECT, CONVERT, GENERATE, PUSH, REPORT, RUN, SWEEP


@attrs.frozen(kw_only=True)
class Command:
    """A command, the folder in which it is tried, and how to go on after a fault."""

    folder: str
    arguments: tuple[str, ...]
    go_on: tuple[tuple[str, ...], ...] = ()
    """What a user tries after a fault, in this order, until something succeeds; the same command if empty."""
    makes: tuple[str, ...]
    """Folders whose content must be that of an unbroken command in the end."""
    whole: tuple[str, ...] = ()
    """Folders that must be whole wherever they are shown; those of `makes` if empty."""
    keeps: tuple[str, ...] = ()
    """Folders that were there: they must be whole at every moment, old or new."""
    writes: bool = True
    """Whether it writes anything."""

    @property
    def shows(self) -> tuple[str, ...]:
        return self.whole or self.makes


RESUME = (*RUN, "--resume")

COMMANDS: dict[str, Command] = {
    "run": Command(folder="new", arguments=RUN, go_on=(RUN, RESUME), makes=("r",)),
    "run with stages": Command(
        folder="new",
        arguments=("run", "stages.toml", "--out", "r"),
        go_on=(("run", "stages.toml", "--out", "r"), ("run", "stages.toml", "--out", "r", "--resume")),
        makes=("r",),
    ),
    "run --resume": Command(folder="killed", arguments=RESUME, makes=("r",)),
    "run --resume EARLIER": Command(
        folder="finished", arguments=(*RESUME, "step_000003"), go_on=(RESUME,), makes=("r",), keeps=("r/transcoder",)
    ),
    "run --resume of a finished run": Command(
        folder="stages",
        arguments=("run", "stages.toml", "--out", "r", "--resume"),
        makes=("r",),
        keeps=("r/transcoder", "r/converted", "r/evaluation", "r/exports/safetensors", "r/exports/saelens"),
    ),
    "run on stored data": Command(
        folder="data",
        arguments=("run", "stored.toml", "--out", "r"),
        go_on=(("run", "stored.toml", "--out", "r"), ("run", "stored.toml", "--out", "r", "--resume")),
        makes=("r",),
        keeps=("d",),
    ),
    "convert": Command(
        folder="finished",
        arguments=("convert", "r", "--out", "c", *CONVERT),
        makes=("c",),
        keeps=("r/transcoder",),
    ),
    "evaluate": Command(
        folder="report",
        arguments=("evaluate", "r", "--set", "stages.evaluate.tokens=128"),
        makes=("r/evaluation",),
        keeps=("r/transcoder", "r/evaluation"),
    ),
    "export": Command(
        folder="stages",
        arguments=("export", "r", "--format", "safetensors", "--out", "e"),
        makes=("e",),
        keeps=("r/transcoder", "r/converted"),
    ),
    "generate": Command(folder="new", arguments=GENERATE, makes=("d",)),
    "generate, resumed": Command(folder="half", arguments=GENERATE, makes=("d",)),
    "scramble": Command(folder="data", arguments=("scramble", "d", "s"), makes=("s",), keeps=("d",)),
    "run on text": Command(
        folder="language",
        arguments=("run", "stream.toml", "--out", "r"),
        go_on=(("run", "stream.toml", "--out", "r"), ("run", "stream.toml", "--out", "r", "--resume")),
        makes=("r",),
    ),
    "run --resume on text": Command(
        folder="language killed", arguments=("run", "stream.toml", "--out", "r", "--resume"), makes=("r",)
    ),
    "sweep": Command(folder="new", arguments=SWEEP, go_on=(SWEEP, (*SWEEP, "--resume")), makes=("w",)),
    "sweep --resume": Command(folder="sweep killed", arguments=(*SWEEP, "--resume"), makes=("w",)),
    "collect": Command(folder="language finished", arguments=COLLECT, makes=("r/collected",), keeps=("r/transcoder",)),
    "collect, resumed": Command(
        folder="half collected", arguments=COLLECT, makes=("r/collected",), keeps=("r/transcoder",)
    ),
    "report": Command(folder="collected", arguments=REPORT, makes=("site",), keeps=("r/transcoder", "r/collected")),
    "report, over an older one": Command(
        folder="reported", arguments=(*REPORT, "--set", "shard=8"), makes=("site",), keeps=("r/collected", "site")
    ),
    "push --out": Command(
        folder="stages",
        arguments=PUSH,
        makes=("p",),
        whole=("p/converted", "p/exports"),
        keeps=("r/transcoder", "r/converted", "r/evaluation"),
    ),
    "stage evaluate": Command(
        folder="stages",
        arguments=("stage", "evaluate", "r", "--set", "tokens=100"),
        makes=("r/evaluation",),
        keeps=("r/transcoder", "r/converted", "r/evaluation"),
    ),
    "run on another tool's data": Command(
        folder="other",
        arguments=("run", "other.toml", "--out", "r"),
        go_on=(("run", "other.toml", "--out", "r"), ("run", "other.toml", "--out", "r", "--resume")),
        makes=("r",),
    ),
    "inspect --verify": Command(folder="data", arguments=("inspect", "d", "--verify"), makes=("d",), writes=False),
}


@attrs.frozen(kw_only=True)
class Reads:
    """Files that a command reads, to be damaged."""

    files: tuple[str, ...]
    """Patterns."""
    sealed: bool = True
    """A checksum protects them: a changed file is refused, or changes nothing. Otherwise a change may be meant."""
    arguments: tuple[str, ...] = ()
    """Of the command; those of `COMMANDS` if empty."""


DAMAGED: dict[str, list[Reads]] = {
    "run": [Reads(files=("r.toml",), sealed=False)],
    "run --resume": [
        Reads(files=("r/checkpoints/step_000006/*",)),
        Reads(files=("r/recipe.toml", "r/metrics.jsonl", "r/versions.json"), sealed=False),
    ],
    "convert": [Reads(files=("r/transcoder/*",)), Reads(files=("r/recipe.toml",), sealed=False)],
    "evaluate": [Reads(files=("r/transcoder/*",)), Reads(files=("r/evaluation/*",), sealed=False)],
    "export": [Reads(files=("r/converted/*",))],
    "collect": [Reads(files=("r/transcoder/*",))],
    "collect, resumed": [Reads(files=("r/.collected*/*", "r/.collected*/*/*"))],
    "report": [Reads(files=("r/collected/*",))],
    "push --out": [Reads(files=("r/converted/*", "r/exports/*/*"))],
    "sweep --resume": [
        Reads(files=("w/*/checkpoints/*/*",)),
        Reads(files=("w/*.json", "w/*/recipe.toml"), sealed=False),
    ],
    "generate, resumed": [Reads(files=("d/*.h5", "d/.*.json"))],
    "run on stored data": [Reads(files=("d/*",))],
    "scramble": [Reads(files=("d/*",))],
    "inspect --verify": [Reads(files=("d/*",))],
    "run on text": [
        Reads(files=("model/*.json",), sealed=False),
        Reads(files=("model/model.safetensors",), sealed=False),
        Reads(files=("text.jsonl",), sealed=False),
    ],
    "run --resume on text": [Reads(files=("model/*", "text.jsonl"), sealed=False)],
    "run on another tool's data": [Reads(files=("other/*",), sealed=False)],
}
"""Commands and what is damaged before them."""
