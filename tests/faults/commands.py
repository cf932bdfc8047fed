"""The commands under test: each in a folder of its own, with what it needs, how a user goes on, and what counts."""

from __future__ import annotations

from pathlib import Path

import attrs

RECIPE = """
name = "small"
[source]
name = "synthetic"
layers = 3
d_model = 16
features = 24
active = 2.0
[transcoder]
features = 32
device = "cpu"
[activation]
name = "batchtopk"
k = 5
[kernels]
name = "torch"
[[losses]]
name = "mse"
[[loggers]]
name = "jsonl"
[[loggers]]
name = "tensorboard"
[train]
statistics_tokens = 64
steps = 12
batch_tokens = 32
lr = 1e-2
log_every = 2
eval_every = 6
eval_tokens = 64
checkpoint_every = 3
keep_checkpoints = 2
dead_after_tokens = 64
"""
"""A run of half a second."""

STAGES = """
[[stages]]
name = "convert"
tokens = 256
calibration_tokens = 256
tolerance = 0.5
[[stages]]
name = "evaluate"
tokens = 128
[[stages]]
name = "export"
format = "safetensors"
[[stages]]
name = "export"
format = { name = "saelens", model_name = "synthetic" }
"""
"""Everything after training."""

SOURCE = RECIPE[RECIPE.index('name = "synthetic"') : RECIPE.index("[transcoder]")]


def with_source(text: str) -> str:
    """The recipe with another source."""
    return RECIPE.replace(SOURCE, text)


RECIPES = {
    "r.toml": RECIPE,
    "stages.toml": RECIPE + STAGES,
    "remote.toml": with_source(
        'name = "remote"\nurl = "http://127.0.0.1:1"\ndataset = "d"\nbuffer_tokens = 64\npatience_s = 6\n'
    ),
    "other.toml": with_source('name = "crosslayer-coding"\npath = "other"\nbuffer_tokens = 64\nheld_out_tokens = 64\n'),
    "stored.toml": with_source('name = "local"\npath = "d"\nbuffer_tokens = 64\n'),
    "stream.toml": with_source(
        'name = "stream"\ntext = "text.jsonl"\ncontext = 24\nmodel_batch = 4\nbuffer_tokens = 128\nheld_out = 0.3\n'
        '[model]\npath = "model"\ndevice = "cpu"\n'
    ),
}
"""The files that every folder has."""

RUN = ("run", "r.toml", "--out", "r")
STORE = ("--tokens", "300", "--held-out", "64", "--chunk-mb", "0.05", "--block-rows", "16")
CONVERT = (
    "--set",
    "stages.convert.tokens=256",
    "--set",
    "stages.convert.calibration_tokens=256",
    "--set",
    "stages.convert.tolerance=0.5",
)
GENERATE = ("generate", "r.toml", "--out", "d", *STORE)
INTERRUPT = ("-p", "tests.support.interrupting", "--set", "loggers.2.name=interrupt", "--set", "loggers.2.kind=SIGKILL")


@attrs.frozen(kw_only=True)
class Prepared:
    """A folder in which commands are tried: another one, and what was run in it."""

    after: str = ""
    """The folder that it begins as; "" for one with the recipes only."""
    steps: tuple[tuple[str, ...], ...] = ()
    """Commands that were run in it."""
    stop_at: str = ""
    """The last of them was killed at the first call on a path that contains this."""
    model: bool = False
    """It has a language model and text."""
    other: bool = False
    """It has data of another tool."""


FOLDERS: dict[str, Prepared] = {
    "new": Prepared(),
    "killed": Prepared(steps=((*RUN, *INTERRUPT, "--set", "loggers.2.at=8"),)),
    "finished": Prepared(steps=((*RUN, "--set", "train.keep_checkpoints=9"),)),
    "stages": Prepared(steps=(("run", "stages.toml", "--out", "r"),)),
    "report": Prepared(after="finished", steps=(("evaluate", "r", "--set", "stages.evaluate.tokens=64"),)),
    "half": Prepared(steps=(GENERATE,), stop_at="train_00002"),
    "data": Prepared(steps=(GENERATE,)),
    "other": Prepared(other=True),
    "language": Prepared(model=True),
    "language killed": Prepared(
        model=True, steps=(("run", "stream.toml", "--out", "r", *INTERRUPT, "--set", "loggers.2.at=8"),)
    ),
}


@attrs.frozen(kw_only=True)
class Command:
    """A command, the folder in which it is tried, and how to go on after a fault."""

    folder: str
    arguments: tuple[str, ...]
    go_on: tuple[tuple[str, ...], ...] = ()
    """What a user tries after a fault, in this order, until something succeeds; the same command if empty."""
    makes: tuple[str, ...]
    """Folders whose content must be that of an unbroken command in the end."""
    keeps: tuple[str, ...] = ()
    """Folders that were there: they must be whole at every moment, old or new."""
    writes: bool = True
    """Whether it writes anything."""


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


def write_recipes(folder: Path) -> None:
    """Put the recipes into a folder."""
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
