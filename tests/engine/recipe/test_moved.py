"""Settings that have moved: what the message says can be done as it stands, and makes a recipe that is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from clt_plugins.errors import Fault, Faults
from clt_plugins.recipe.read import read_recipe, recipe_data
from clt_plugins.registry.plugins import Plugins
from tests.support.recipes import GOOD, faults

TOP = """name = "x"
source = "synthetic"
activation = "topk"
"""
MAIN = """
[transcoder]
features = 64

[train]
steps = 100
"""


IN_PLACE = r"has moved to \S+: write `(.*)` in place of line (\d+)( and of what else the file says of `(\w+)`)?"


def follow(text: str, found: list[Fault]) -> str:
    """The file, with all that is said to have moved taken out, and what is to be written in its place."""
    lines = text.splitlines()
    remedies = dict.fromkeys(fault.text for fault in found)
    for remedy in remedies:  # numbers of lines are those of the file as it is
        if line := re.fullmatch(IN_PLACE, remedy):
            first = int(line[2]) - 1
            if name := line[4]:  # lines of dotted keys, or a list of several lines
                last = max(n for n, one in enumerate(lines) if one.startswith((f"{name}.", "]")) or n == first)
                lines[first : last + 1] = ["#"] * (last + 1 - first)
            lines[first] = line[1]
    for fault in found:
        first = int(fault.origin.rpartition(":")[2]) - 1
        stop = first + 1
        if lines[first].startswith("["):
            stop = next((n for n in range(stop, len(lines)) if lines[n].startswith("[")), len(lines))
        lines[first:stop] = ["#"] * (stop - first)
    for remedy in remedies:
        if line := re.fullmatch(r"has moved to \S+: write `(.*)` above the first \[table\]", remedy):
            lines.insert(0, line[1])
        elif line := re.fullmatch(r"has moved: write `(.*)` in (\[\w+\])(?: in place of its own `(\w+)`)?", remedy):
            head = lines.index(line[2])
            if line[3]:
                del lines[next(n for n in range(head, len(lines)) if lines[n].startswith(f"{line[3]} = "))]
            lines.insert(head + 1, line[1])
        elif line := re.fullmatch(r"has moved: write at the end (\[\[\w+\]\]) with (.*)", remedy):
            lines += [line[1], *re.findall(r"`(.*?)`", line[2])]
        else:
            assert " in place of line " in remedy
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("top", "below", "path", "value"),
    [
        ("", 'schedule = "cosine"', "schedule.name", "cosine"),
        ("", 'eps = 1e-6\nbetas = [0.8, 0.9]\n[optimizer]\nname = "adamw"', "optimizer.eps", 1e-6),
        ('optimizer = "adamw"', "eps = 1e-6\nbetas = [0.8, 0.9]", "optimizer.betas", [0.8, 0.9]),
        ('optimizer = "adamw"', "eps = 1e-6\nbetas = [0.8, 0.9]", "optimizer.name", "adamw"),
        ("", "eps = 1e-6\nwarmup_steps = 3", "schedule.warmup_steps", 3),
        ("", "[evaluate]\ntokens = 5", "stages.0.tokens", 5),
        ("", '[convert]\nl0 = 3\n[evaluate]\ntokens = 5\n[[exports]]\nname = "safetensors"', "stages.1.tokens", 5),
        ("stages = ['convert']", '[[exports]]\nname = "safetensors"', "stages.1.format.name", "safetensors"),
        ("", '[convert]\nl0 = 3\n[[stages]]\nname = "evaluate"', "stages.1.l0", 3.0),
        ('optimizer.name = "adamw"\noptimizer.weight_decay = 0.1', "eps = 1e-6", "optimizer.eps", 1e-6),
        ('optimizer.name = "adamw"\noptimizer.weight_decay = 0.1', "eps = 1e-6", "optimizer.weight_decay", 0.1),
        ("stages = [\n'evaluate',\n]", "[convert]\nl0 = 3", "stages.1.l0", 3.0),
        ("", 'optimizer = "adam"\n[optimizer]\nname = "adamw"', "optimizer.name", "adam"),
        ("", 'eps = 1e-6\n[optimizer]\nname = "adamw"\neps = 1e-7', "optimizer.eps", 1e-6),
    ],
)
def test_what_the_message_says_can_be_done_as_it_stands(
    plugins: Plugins, tmp_path: Path, top: str, below: str, path: str, value: Any
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"{TOP}{top}{MAIN}{below}\n")
    with pytest.raises(Faults) as caught:
        read_recipe(file, plugins=plugins)
    file.write_text(follow(file.read_text(), caught.value.faults))
    at: Any = recipe_data(read_recipe(file, plugins=plugins))
    for part in path.split("."):
        at = at[int(part) if part.isdecimal() else part]
    assert at == value


def test_the_tokens_of_statistics_are_of_the_training_loop_now(plugins: Plugins, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(TOP + MAIN.replace("features", "normalisation_tokens = 64\nfeatures"))
    line = "transcoder.normalisation_tokens: has moved: write `statistics_tokens = 64` in [train]"
    assert faults(file, plugins) == [f"{file}:6: {line}"]


@pytest.mark.parametrize("flag", ["train.eps=1e-6", "train.schedule=cosine", "evaluate.tokens=5", "convert.l0 = 3"])
def test_a_flag_of_a_setting_that_has_moved_is_told_the_flag_to_write(plugins: Plugins, flag: str) -> None:
    recipe = {**GOOD, "activation": "topk"}
    (line,) = faults(recipe, plugins, flag)
    start, _, instead = line.partition(": has moved: write --set ")
    assert start == f"--set {flag}"
    read_recipe(recipe, [instead], plugins)


def test_a_sweep_of_a_setting_that_has_moved_is_told_its_key(plugins: Plugins) -> None:
    from clt_plugins.recipe.read import read_sweep

    recipe = {**GOOD, "activation": "topk", "sweep": {"train.eps": [1e-6, 1e-8]}}
    with pytest.raises(Faults, match=r'^recipe: sweep\.train\.eps: has moved: write "optimizer\.eps"$'):
        read_sweep(recipe, plugins=plugins)
