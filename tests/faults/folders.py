"""The folders in which commands are tried: recipes, and what was run before."""

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
    "sweep.toml": RECIPE + '[sweep]\n"activation.k" = [4, 5]\n',
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
SWEEP = ("sweep", "sweep.toml", "--out", "w")
COLLECT = ("collect", "r", "--set", "stages.collect.tokens=300", "--set", "stages.collect.top=3")
REPORT = ("report", "r", "--out", "site")
PUSH = ("push", "r", "user/name", "--license", "mit", "--out", "p")
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
    "language finished": Prepared(model=True, steps=(("run", "stream.toml", "--out", "r"),)),
    "half collected": Prepared(after="language finished", steps=(COLLECT,), stop_at="features_01"),
    "collected": Prepared(after="language finished", steps=(COLLECT,)),
    "reported": Prepared(after="collected", steps=(REPORT,)),
    "sweep killed": Prepared(steps=((*SWEEP, *INTERRUPT, "--set", "loggers.2.at=8"),)),
}


def write_recipes(folder: Path) -> None:
    """Put the recipes into a folder."""
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
