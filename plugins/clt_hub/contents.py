"""The files that are pushed, as a folder:

| file | |
| --- | --- |
| `README.md` | the model card |
| `recipe.toml`, `versions.json` | of the run |
| `transcoder/` or `converted/` | the transcoder; another tool's files stand at the top |
| `evaluation/`, `circuits/` | scores |
| `exports/NAME/` | the transcoder in other tools' formats |

So the repository is a run's folder, and is read like one. Large files are links to those of the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from clt_hub.card import MARK, card
from clt_hub.facts import OWN, Facts
from clt_hub.public import Neutral, graph_texts, refuse_paths, refuse_paths_in_text, texts
from clt_plugins import Refused, check_regular, has_file, load_json, read_small, toml_text, write_json

MANIFEST = "manifest.json"
FORMAT = 1
"""The version of manifests."""
KINDS = (".safetensors", ".json", ".yaml", ".yml", ".toml")
"""Files of other tools that are pushed."""
REPLACES = ("transcoder/*", "converted/*", "evaluation/*", "circuits/*", "exports/*", "recipe.toml", "versions.json")
"""What an earlier push put there, and this one may not have."""
MARKED = {"README.md": MARK}
PIECE = 2**22
"""Numbers of a tensor that are read at once."""


def write_contents(facts: Facts, folder: Path, *, link: bool) -> list[str]:
    """Write the folder, which is empty; returns its files.

    Args:
        link: large files are links, else copies.

    Raises:
        Refused: a file names a path of this disk, has numbers that are not finite, or cannot be read.
        OSError: it cannot be written.
    """
    if facts.recipe is not None:  # paths are out of it, and what is left in it is no path anywhere else
        (folder / "recipe.toml").write_text(toml_text(facts.recipe), encoding="utf-8")
    for name, data in (("versions.json", facts.versions), ("evaluation/evaluation.json", facts.evaluation)):
        _write_table(folder / name, data, facts)
    _write_table(folder / "circuits/circuits.json", facts.circuits, facts)
    if facts.kept_as:
        names = [path.name for path in facts.folder.iterdir() if any(fnmatch(path.name, own) for own in OWN)]
        _put_folder(facts.folder, folder / facts.kept_as, names, facts.neutral, link)
    else:
        _put_folder(facts.folder, folder, _other_files(facts.folder), facts.neutral, link, lists=True)
    named = _naming_models(facts)
    for export in facts.exports:
        _put_folder(export, folder / "exports" / export.name, _other_files(export), named, link)
    text = card(facts)
    # The recipe in it has no paths any more, but may have prompts that look like one.
    shown = "" if facts.recipe is None else toml_text(facts.recipe).rstrip()
    refuse_paths_in_text(text.replace(shown, "") if shown else text, "README.md")
    (folder / "README.md").write_text(text, encoding="utf-8")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _naming_models(facts: Facts) -> Neutral:
    """Exports name a model of this disk by its folder's last part."""
    if facts.config.base_model is None:
        return facts.neutral
    short = {Path(old).name: new for old, new in facts.neutral.texts.items() if new == facts.config.base_model}
    return Neutral({**short, **facts.neutral.texts})


def _other_files(folder: Path) -> list[str]:
    """Another tool's files: tensors and tables, also in folders."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in KINDS]
    names = [path.relative_to(folder).as_posix() for path in files]
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def _put_folder(
    source: Path, target: Path, names: Iterable[str], neutral: Neutral, link: bool, *, lists: bool = False
) -> None:
    """Put files of a folder into a new one; its manifest is made anew for them.

    Args:
        lists: there is a manifest though the folder has none: the next push replaces what it lists.
    """
    own = load_json(source / MANIFEST) if has_file(source / MANIFEST) else {}
    listed = own.get("files", {} if lists else None)
    files: dict[str, Any] = {}
    for name in sorted(names):
        if name == MANIFEST:
            continue
        path, new = source / name, target / name
        if not path.resolve().is_relative_to(source.resolve()):
            raise Refused(path, "leads out of its folder")
        check_regular(path)
        new.parent.mkdir(parents=True, exist_ok=True)
        data, changed = None, False
        if path.suffix.lower() != ".safetensors":
            data, changed = _table(path, neutral)
        if changed and data is not None:
            new.write_bytes(data)
        elif link:
            new.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, new)
        if path.suffix.lower() == ".safetensors":
            _check_tensors(path)
        if listed is not None:
            entry = listed.get(name)
            if entry is None or changed:
                with new.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                entry = {"bytes": new.stat().st_size, "sha256": digest}
            files[name] = entry
    if listed is not None:
        write_json(target / MANIFEST, {"format": own.get("format", FORMAT), "files": files})


def _table(path: Path, neutral: Neutral) -> tuple[bytes, bool]:
    """A table's content for others, and whether it was changed."""
    content = read_small(path)
    if path.suffix.lower() == ".json":
        data = load_json(path)
        new = neutral(data)
        text = json.dumps(new, indent=2) + "\n"
    elif path.suffix.lower() in (".yaml", ".yml"):
        try:
            data = yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise Refused(path, f"not a readable YAML file: {' '.join(str(error).split())}") from error
        new = neutral(data)
        text = yaml.safe_dump(new, sort_keys=False)
    else:
        refuse_paths_in_text(content.decode(errors="replace"), path)
        return content, False
    refuse_paths(new, path)
    return (content, False) if new == data else (text.encode(), True)


def _check_tensors(path: Path) -> None:
    """Refuse a file of tensors that names a path of this disk, or has numbers that are not finite."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_slice(name)
                shape = tensor.get_shape()
                rows = max(1, PIECE // max(1, math.prod(shape[1:])))
                parts = (tensor[at : at + rows] for at in range(0, shape[0], rows)) if shape else [tensor[...]]
                if not all(bool(part.float().isfinite().all()) for part in parts if part.is_floating_point()):
                    raise Refused(path, f"tensor {name!r} holds numbers that are not finite")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise Refused(path, f"not a readable safetensors file: {error}") from error
    refuse_paths(metadata, path)


def _write_table(path: Path, data: dict[str, Any] | None, facts: Facts) -> None:
    if data is None:
        return
    path.parent.mkdir(exist_ok=True)
    new = facts.neutral(data)
    refuse_paths(new, path.name, but={*texts(facts.recipe), *graph_texts(new)})
    write_json(path, new)
