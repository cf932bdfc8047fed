"""The house stands: who may import whom, and what is listed where."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from packaging.requirements import Requirement

import clt_plugins
from clt_plugins.contract import hooks as hookspecs
from clt_plugins.recipe.read import Recipe

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "clt_plugins"
PLUGINS = ROOT / "plugins"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = sorted(path.name for path in PLUGINS.iterdir() if path.is_dir() and path.name != "__pycache__")

GROUPS = {
    "data": ["batch", "features", "normalise", "shuffle", "room", "stored", "toml"],
    "contract": ["spec", "hookspecs", "interfaces", "kinds", "exits"],
    "recipe": ["discovery", "structure", "overrides", "settings", "lines", "loading", "recipe", "blame"],
    "model": [
        "agreement",
        "together",
        "slices",
        "sparse",
        "selection",
        "initial",
        "encode",
        "transcoder",
        "store",
        "setup",
        "objective",
    ],
    "judging": ["metrics", "replacement", "evaluate", "convert"],
    "training": ["rounding", "optim", "checkpoint", "train"],
    "front": [
        "plan",
        "trained",
        "stages",
        "after",
        "run",
        "options",
        "listing",
        "starter",
        "new",
        "templates",
        "testing",
        "cli",
        "__main__",
        "__init__",
    ],
}
"""The engine's rooms, from the ground up: a room imports from the groups above its own in this list, and its own."""


FOLDERS = {"templates", "testing"}
"""The rooms that are packages."""


def files_of(room: str) -> list[Path]:
    return sorted((ENGINE / room).rglob("*.py")) if room in FOLDERS else [ENGINE / f"{room}.py"]


def imports(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Every import that can run, (module, names), wherever it stands; not those for the type checker alone."""

    def below(node: ast.AST) -> Iterator[tuple[str, list[str]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, []) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative imports hide where a name comes from"
                yield child.module or "", [alias.name for alias in child.names]
            else:
                yield from below(child)

    return below(ast.parse(file.read_text()))


def test_every_room_is_in_one_group() -> None:
    listed = [room for rooms in GROUPS.values() for room in rooms]
    assert sorted(listed) == sorted([*(path.stem for path in ENGINE.glob("*.py")), *FOLDERS])
    assert {path.name for path in ENGINE.iterdir() if path.is_dir()} - {"__pycache__"} == FOLDERS


def test_a_room_imports_only_from_its_own_group_and_those_below_it_in_the_house() -> None:
    level = {room: number for number, rooms in enumerate(GROUPS.values()) for room in rooms}
    wrong = []
    for room, file in [(each, file) for each in level for file in files_of(each)]:
        for module, names in imports(file):
            # `from clt_plugins import x` is the public front, for the front's rooms; __version__ is for all.
            wanted = module.split(".")[1:2] if "." in module else ["__init__"] * (names not in ([], ["__version__"]))
            if module.split(".")[0] == "clt_plugins":
                wrong += [f"{file.name} imports {other}" for other in wanted if level[other] > level[room]]
    assert not wrong


def test_the_engine_imports_no_plugin_package() -> None:
    wrong = [
        f"{file.name} imports {module}"
        for file in ENGINE.rglob("*.py")
        for module, _ in imports(file)
        if module.split(".")[0] in PACKAGES
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_a_plugin_package_imports_public_names_of_the_engine_and_no_other_plugin(package: str) -> None:
    wrong = []
    for file in (PLUGINS / package).rglob("*.py"):
        for module, names in imports(file):
            top = module.split(".")[0]
            if top in PACKAGES and top != package:
                wrong.append(f"{file.name} imports {module}, another plugin")
            if top == "clt_plugins":
                private = [name for name in names if module != "clt_plugins" or name not in clt_plugins.__all__]
                wrong += [f"{file.name} imports {name} of {module}, not public" for name in private]
                wrong += [f"{file.name} imports {module} whole"] * (not names)
    assert not wrong


def test_public_names_exist() -> None:
    assert len(set(clt_plugins.__all__)) == len(clt_plugins.__all__)
    for name in clt_plugins.__all__:
        assert getattr(clt_plugins, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clt_plugins.nothing  # noqa: B018


def test_run_is_the_function_whatever_was_imported_first() -> None:
    import clt_plugins.training.run
    from clt_plugins import run

    assert callable(run)
    assert clt_plugins.run is run


def test_folders_entry_points_and_wheel_packages_agree() -> None:
    entry_points = PYPROJECT["project"]["entry-points"]["clt_plugins"]
    assert sorted(entry_points.values()) == PACKAGES
    assert all(module == f"clt_{name}" for name, module in entry_points.items())
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(wheel) == ["clt_plugins", *(f"plugins/{package}" for package in PACKAGES)]


def test_plugins_is_a_folder_and_no_package() -> None:
    # As an import package called `plugins` it would overwrite others' of that name, and they it.
    assert not (PLUGINS / "__init__.py").exists()
    assert all((PLUGINS / package / "__init__.py").is_file() for package in PACKAGES)


def test_version_stands_once() -> None:
    assert PYPROJECT["project"]["version"] == clt_plugins.__version__


def test_every_dependency_is_pinned_within_its_bounds_in_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = PYPROJECT["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name]), text


def test_every_hook_is_documented_and_every_slot_is_a_recipe_table() -> None:
    hooks = {name: hook for name, hook in vars(hookspecs.Hooks).items() if name.startswith("clt_")}
    assert all(hook.__doc__ for hook in hooks.values())
    slots = {f"clt_{name}" for name in hookspecs.SLOTS}
    assert hooks.keys() - slots == {"clt_commands", "clt_check"}
    assert set(hookspecs.SLOTS.values()) <= {a.name for a in attrs.fields(Recipe)}
