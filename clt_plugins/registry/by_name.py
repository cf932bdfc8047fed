"""Plugins that `-p` names: an importable module, or a Python file."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clt_plugins.errors import Refused, did_you_mean


def is_file(name: str) -> bool:
    """Whether a name is that of a file or folder, not of a module."""
    return name.endswith(".py") or "/" in name or os.sep in name


def module_name(name: str) -> str:
    """The module that a name means; of a file, what it is imported as. Its folder is then on the path of imports.

    A file in a package is imported as a part of it, so that its relative imports work.

    Raises:
        Refused: there is no such file, or Python would import something else by that name; says what to do.
    """
    if not is_file(name):
        return name
    file = Path(name).expanduser().resolve()
    if file.is_dir():
        file = file / "__init__.py"
    if not file.is_file():
        folder = file.parent
        near = did_you_mean(file.name, [path.name for path in folder.glob("*.py")]) if folder.is_dir() else ""
        raise Refused("-p", f"there is no file {name!r}: give a .py file, or the name of a module{near}")
    parts = [] if file.name == "__init__.py" else [file.stem]
    root = file.parent
    while (root / "__init__.py").is_file():
        parts.insert(0, root.name)
        root = root.parent
    module = ".".join(parts)
    wrong = next((part for part in parts if not part.isidentifier()), None)
    if wrong is not None:
        raise Refused("-p", f"{name}: Python cannot import {wrong!r}: rename it, with letters, digits and '_' only")
    before = list(sys.path)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    found = _origin(module)
    if found is None or Path(found).resolve() != file:
        sys.path[:] = before
        raise Refused("-p", f"{name}: another module is called {module!r} ({found or 'built in'}): rename the file")
    return module


def _origin(module: str) -> str | None:
    """The file that Python imports by a name."""
    if module in sys.modules:
        return getattr(sys.modules[module], "__file__", None)
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        return None
    return spec.origin if spec is not None else None


def imported(name: str) -> Any:
    """The module of a name; see `module_name`.

    Raises:
        Refused: there is none.
    """
    module = module_name(name)
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # something that it imports
        near = did_you_mean(name, [path.stem for path in Path.cwd().glob("*.py")])
        text = f"there is no module {name!r}: give one that Python finds, or a file such as ./{name}.py{near}"
        raise Refused("-p", text) from error
