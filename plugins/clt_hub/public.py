"""What must not leave this machine: paths of its disk, in any file that is pushed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from clt_plugins import Refused

ABSOLUTE = re.compile(r"(?:/[^/\s]|~[\w]*/|[A-Za-z]:[\\/]|\\\\)")
"""How a path of a disk begins."""
IN_TEXT = re.compile(r"(?<![\w/:.@*)\]>-])(?:/[\w.+-]+){2,}/?|(?<!\w)~/[\w./-]+")
"""A path in the middle of a text."""


SYSTEM = re.compile(r"/(usr|bin|dev(?!/shm/)|proc|sys)/")
"""Folders that say nothing of a machine's users; `/dev/shm` holds anyone's files."""


class Neutral:
    """Puts what others are to read in the place of paths of this disk.

    Args:
        texts: path -> what is written instead.
    """

    def __init__(self, texts: Mapping[str, str]):
        self.texts = dict(texts)

    def __call__(self, value: Any) -> Any:
        """Plain data with every such path replaced, also one that goes on: `PATH/file`."""
        if isinstance(value, Mapping):
            return {key: self(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self(one) for one in value]
        if not isinstance(value, str):
            return value
        for old, new in self.texts.items():
            if value == old:
                return new
            if value.startswith(f"{old}/"):
                return new + value[len(old) :]
        return value


def refuse_paths(value: Any, where: str | Path, but: Collection[str] = ()) -> None:
    """Refuse plain data that still names a path of a disk.

    Args:
        but: texts that are none, though they may begin like one.

    Raises:
        Refused: it does; names the file.
    """
    for text in texts(value):
        if ABSOLUTE.match(text) and text not in but:
            raise Refused(
                where,
                f"names {text[:200]!r}, a path of this disk: say what others are to read, by `instead` (--instead "
                "SETTING=TEXT), or leave the file out",
            )


def refuse_paths_in_text(text: str, where: str | Path) -> None:
    """Refuse a text for people that names a file or folder of this disk.

    Raises:
        Refused: it does; names the file.
    """
    for match in IN_TEXT.finditer(text):
        path = Path(match[0]).expanduser()
        if SYSTEM.match(match[0]):
            continue
        # The folder that it is in counts too; not the first one, which many machines have.
        there = any(one.exists() for one in (path, *path.parents[:-2]))
        if there or match[0].startswith(("/home/", "/Users/", "/root/", str(Path.home()))):
            raise Refused(where, f"names {match[0]!r}, a path of this disk: write it otherwise")


def texts(value: Any) -> Iterator[str]:
    """All texts in plain data, keys too."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)
    elif isinstance(value, str):
        yield value


def graph_texts(data: Mapping[str, Any]) -> Iterator[str]:
    """The prompts and the tokens predicted after them, of a `circuits.json`; a token may be "/>"."""
    for graph in data.get("graphs") or []:
        yield from texts([graph.get("prompt"), graph.get("logits")])
