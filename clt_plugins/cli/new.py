"""`clt_plugins new`: a small installable plugin of one kind, or with a command, and its tests.

The code is a copy of the kind's template in `clt_plugins.templates`, under the plugin's own names.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from clt_plugins.contract.slots import SLOTS, Slot
from clt_plugins.contract.spec import __version__
from clt_plugins.errors import Refused

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"

COMMAND = "command"
KINDS = [*(slot.kind for slot in SLOTS), COMMAND]
"""What can be written: a choice for a recipe, or a command."""

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "The {kind} `{choice}` for clt-plugins"
readme = "README.md"
requires-python = ">=3.11"
# The plugin contract holds within a minor version: widen this when your tests pass with the next.
dependencies = ["clt-plugins>={version},<{next_version}"]

[project.optional-dependencies]
dev = ["pytest>=8.3"]

[project.entry-points.clt_plugins]
{choice} = "{module}"

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
"""

TEST = '''\
"""Whether the plugin keeps the contract: one test for each check of the conformance kit."""

from clt_plugins.testing import parametrize


@parametrize("{module}")
def test_conforms(case):
    case.run()


# The kit knows the contract, not what the {kind} `{choice}` should compute: a wrong factor, or a mask in another order,
# keeps the contract. Test that in a file beside this one, against numbers worked out by hand.
'''

FORMULAS = {
    "schedule": """
from pytest import approx

from clt_plugins.templates.schedule import Example, ExampleConfig


def test_formula():
    schedule = Example(ExampleConfig(warmup=0.5), context=None)
    assert [schedule(step, 4, peak=2.0) for step in range(4)] == approx([1.0, 2.0, 1.632993, 1.414214])
""",
    "loss": """
from types import SimpleNamespace

import torch

from clt_plugins.templates.loss import Example, ExampleConfig


def test_formula():
    values = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])  # of 2 tokens, 1 layer, 2 features
    features = SimpleNamespace(values=values, shape=values.shape)
    forward = SimpleNamespace(features=features, sum_features=lambda x: x)
    loss = Example(ExampleConfig(weight=2.0), context=None)
    assert loss(forward)["example"] == 2.0 * (9 + 16) / 2
""",
    "transform": """
import torch

from clt_plugins import Batch
from clt_plugins.templates.transform import Example, ExampleConfig


def test_formula():
    x = torch.tensor([[[0.0, 0.0, 0.0, -8.0]]])  # 1 token, 1 layer; its root mean square is 4
    transform = Example(ExampleConfig(limit=1.5), context=None)
    assert transform(Batch(x, x), number=0).inputs.tolist() == [[[0.0, 0.0, 0.0, -6.0]]]
""",
}
"""A test of the template's own formula, where it needs no model around it."""

COMMAND_TEST = '''\
"""What the command prints."""

from click.testing import CliRunner

from {module} import {choice}

RECIPE = """
name = "try"
source = "synthetic"
activation = "topk"
transcoder = {{ features = 64 }}
train = {{ steps = 20, batch_tokens = 256 }}
"""


def test_it_prints_the_tokens_of_a_run(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    done = CliRunner().invoke({choice}, [str(recipe)])
    assert done.output == "5120\\n"
    assert CliRunner().invoke({choice}, [str(recipe), "--per-feature"]).output == "80\\n"
'''

README = """\
# {distribution}

The {kind} `{choice}` for clt-plugins.

```bash
pip install -e '.[dev]'
pytest                                  # the conformance kit
python -m clt_plugins {shown}
```
"""

IN_RECIPES = """
In a recipe:

```toml
requires = ["{distribution}>=0.1"]
{usage}
```
"""


def usage(slot: Slot, choice: str) -> str:
    """How a recipe names the choice."""
    if slot.table == "exports":
        return f'stages = [{{ name = "export", format = "{choice}" }}]'
    if slot.table == "reports":
        return f'stages = ["collect", {{ name = "report", format = "{choice}" }}]'
    if not slot.many:
        return f'{slot.table} = "{choice}"'
    # A recipe's list must not be empty, and a new loss alone would train nothing.
    others = '"mse", ' if slot.needs_one else ""
    return f'{slot.table} = [{others}"{choice}"]'


def new(name: str, kind: str, out: Path | None = None, *, reserved: Collection[str] = ()) -> Path:
    """Write a plugin's package; returns its folder.

    Args:
        name: the distribution's name, such as `clt-gated`; the module is then `clt_gated`, the choice `gated`.
        kind: one of `KINDS`.
        out: the folder; `./NAME` if not given.
        reserved: names that a command must not have.

    Raises:
        Refused: the name is not allowed or in use; or the folder is not empty.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise Refused(repr(name), "a plugin's name is lower-case words with '-' between them, such as clt-gated")
    module = name.replace("-", "_")
    choice = module.removeprefix("clt_")
    if keyword.iskeyword(module) or keyword.iskeyword(choice) or choice in ("example", "testing", "plugins"):
        raise Refused(repr(name), f"{choice!r} has another meaning in Python or here: choose another name")
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        raise Refused(repr(name), f"there is a module {module!r} already: choose another name, such as clt-{name}")
    if kind == COMMAND and choice in reserved:
        raise Refused(repr(name), f"{choice!r} is a command of clt-plugins itself: choose another name")
    folder = out or Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(folder, "already there: give another folder with --out")
    words = {
        "distribution": name.replace("_", "-"),
        "module": module,
        "choice": choice,
        "kind": kind,
        "version": ".".join(__version__.split(".")[:2]),
        "next_version": _next_minor(__version__),
        "shown": f"{choice} --help" if kind == COMMAND else f"plugins {choice}  # its settings",
    }
    (folder / module).mkdir(parents=True)
    (folder / "tests").mkdir()
    for file in sorted((TEMPLATES / kind).glob("*.py")):
        text = renamed(file.read_text(encoding="utf-8"), kind, module, choice)
        (folder / module / file.name).write_text(text, encoding="utf-8")
    (folder / "pyproject.toml").write_text(PYPROJECT.format(**words))
    (folder / "tests" / "test_conformance.py").write_text(TEST.format(**words))
    if kind in FORMULAS:
        text = renamed(FORMULAS[kind].lstrip(), kind, module, choice)
        (folder / "tests" / "test_formula.py").write_text(f'"""What the {kind} computes, by hand."""\n\n{text}')
    readme = README.format(**words)
    if kind == COMMAND:
        (folder / "tests" / f"test_{choice}.py").write_text(COMMAND_TEST.format(**words))
    else:
        slot = next(slot for slot in SLOTS if slot.kind == kind)
        readme += IN_RECIPES.format(**words, usage=usage(slot, choice))
    (folder / "README.md").write_text(readme)
    return folder


def renamed(source: str, kind: str, module: str, choice: str) -> str:
    """A template's code with the plugin's names."""
    title = "".join(word.capitalize() for word in choice.split("_"))
    source = source.replace(f"clt_plugins.templates.{kind}", module)
    return re.sub(r"\bExample", title, re.sub(r"\bexample\b", choice, source))


def _next_minor(version: str) -> str:
    major, minor = version.split(".")[:2]
    return f"{major}.{int(minor) + 1}"
