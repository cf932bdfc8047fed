"""The house stands: who may import whom, and what is listed where."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import attrs
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import clt_plugins
from clt_plugins.contract.hooks import Hooks
from clt_plugins.contract.recipe import Recipe
from clt_plugins.contract.slots import OF_RECIPE, SLOTS

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "clt_plugins"
PLUGINS = ROOT / "plugins"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILT_IN = sorted(
    path.name for path in PLUGINS.iterdir() if path.is_dir() and path.name not in ("__pycache__", "guide")
)
PACKAGES = [PLUGINS / name for name in BUILT_IN]
THIRD_PARTY = sorted((ROOT / "examples" / "third_party").glob("clt-*"))

FLOORS = [
    "errors",
    "toml",
    "data",
    "contract",
    "registry",
    "recipe",
    "distributed",
    "files",
    "rows",
    "model",
    "finished",
    "collected",
    "training",
    "cli",
    "templates",
    "testing",
]
"""The engine's folders (and its two modules on the ground), from the ground up: each imports only from those above it
in this list, and from itself. Annotations count."""

FRONT = {"__init__", "__main__"}
"""The public API and the command: they import from everywhere, and nothing imports from them."""

ALLOWED = {
    # `--check` tries plugins out; the kit is imported where that is asked for.
    ("cli", "testing"),
}


def imports(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Every import, (module, names), wherever it stands; those for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide where a name comes from"
            yield node.module or "", [alias.name for alias in node.names]


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def targets(file: Path) -> Iterator[str]:
    """The modules that a file imports, `from package import module` told apart from a name in the package."""
    for module, names in imports(file):
        yield module
        yield from (f"{module}.{name}" for name in names)


def test_every_file_of_the_engine_is_on_a_floor() -> None:
    on_disk = {
        path.stem for path in ENGINE.iterdir() if path.suffix == ".py" or (path.is_dir() and path.stem[0] != "_")
    }
    assert on_disk == {*FLOORS, *FRONT}


def test_a_folder_imports_only_from_folders_above_it_in_the_list() -> None:
    wrong = []
    for number, floor in enumerate(FLOORS):
        files = modules(ENGINE / floor) if (ENGINE / floor).is_dir() else [ENGINE / f"{floor}.py"]
        for file in files:
            for module, names in imports(file):
                parts = module.split(".")
                if parts[0] != "clt_plugins":
                    continue
                if len(parts) == 1:
                    # Templates are plugins; the kit is used beside them. Both may use the public API.
                    if floor not in ("templates", "testing"):
                        wrong.append(f"{file.relative_to(ENGINE)} imports the public API, {names}")
                elif FLOORS.index(parts[1]) > number and (floor, parts[1]) not in ALLOWED:
                    wrong.append(f"{file.relative_to(ENGINE)} imports {module}")
    assert not wrong


@pytest.mark.parametrize("root", ["clt_plugins", "plugins"])
def test_there_are_no_import_circles(root: str) -> None:
    """Counting imports inside functions and annotations; the front and a package's own `__init__` aside."""
    base = ROOT if root == "clt_plugins" else PLUGINS
    files = {
        ".".join(file.relative_to(base).with_suffix("").parts): file
        for file in modules(ROOT / root)
        if file.name != "__init__.py" and file.stem not in FRONT
    }
    graph = {name: {target for target in targets(file) if target in files} for name, file in files.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


OTHER_HOOKS = {"clt_check", "clt_commands", "clt_formats", "clt_inspectors"}
"""Hooks that offer no choice for a recipe."""


def test_no_folder_of_the_engine_has_more_than_ten_files() -> None:
    folders = [
        path for path in ENGINE.iterdir() if path.is_dir() and path.name not in ("testing", "templates", "__pycache__")
    ]
    assert len(folders) <= 12
    assert {
        folder.name: len(list(folder.glob("[!_]*.py"))) for folder in folders if len(list(folder.glob("[!_]*.py"))) > 10
    } == {}


def test_the_engine_imports_no_plugin_package() -> None:
    wrong = [
        f"{file.name} imports {module}"
        for file in modules(ENGINE)
        for module, _ in imports(file)
        if module.split(".")[0] in BUILT_IN
    ]
    assert not wrong


@pytest.mark.parametrize("package", [*PACKAGES, *THIRD_PARTY], ids=lambda path: path.name)
def test_a_plugin_package_imports_public_names_of_the_engine_and_no_other_plugin(package: Path) -> None:
    """Also for type checkers, also in the tests of third-party examples."""
    wrong = []
    for file in modules(package):
        for module, names in imports(file):
            top = module.split(".")[0]
            if top in BUILT_IN and top != package.name:
                wrong.append(f"{file.name} imports {module}, another plugin")
            if top == "clt_plugins" and module != "clt_plugins.testing":
                private = [name for name in names if module != "clt_plugins" or name not in clt_plugins.__all__]
                wrong += [f"{file.name} imports {name} of {module}, not public" for name in private]
                wrong += [f"{file.name} imports {module} whole"] * (not names)
    assert not wrong


def test_public_names_exist() -> None:
    assert len(set(clt_plugins.__all__)) == len(clt_plugins.__all__)
    for name in clt_plugins.__all__:
        assert getattr(clt_plugins, name) is not None
    assert set(clt_plugins.__all__) <= set(dir(clt_plugins))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        clt_plugins.nothing  # noqa: B018


def test_type_checkers_see_the_public_names() -> None:
    seen = {
        name for module, names in imports(ENGINE / "__init__.py") for name in names if module.startswith("clt_plugins")
    }
    assert seen == set(clt_plugins.__all__)


def test_folders_entry_points_and_wheel_packages_agree() -> None:
    entry_points = PYPROJECT["project"]["entry-points"]["clt_plugins"]
    assert sorted(entry_points.values()) == BUILT_IN
    assert all(module == f"clt_{name}" for name, module in entry_points.items())
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(wheel) == ["clt_plugins", *(f"plugins/{package}" for package in BUILT_IN)]


def test_plugins_is_a_folder_and_no_package() -> None:
    # As an import package called `plugins` it would overwrite others' of that name, and they it.
    assert not (PLUGINS / "__init__.py").exists()
    assert all((package / "__init__.py").is_file() for package in PACKAGES)


def test_version_stands_once() -> None:
    assert PYPROJECT["project"]["version"] == clt_plugins.__version__


def test_every_dependency_is_pinned_within_its_bounds_in_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["browser"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name]), text


def test_the_lowest_versions_are_those_of_the_constraints_they_are_tested_with() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = PYPROJECT["project"]
    stated = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    lowest = {each.name: next(bound.version for bound in each.specifier if bound.operator == ">=") for each in stated}
    assert {name: Version(version) for name, version in lowest.items()} == {
        name: Version(version) for name, version in tested.items()
    }


def test_every_hook_is_documented_and_every_slot_is_a_recipe_table() -> None:
    declared = {name: hook for name, hook in vars(Hooks).items() if name.startswith("clt_")}
    assert all(hook.__doc__ for hook in declared.values())
    assert declared.keys() - {f"clt_{slot.hook}" for slot in SLOTS} == OTHER_HOOKS
    assert {slot.table for slot in OF_RECIPE} <= {a.name for a in attrs.fields(Recipe)}
