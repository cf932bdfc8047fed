"""Text that every machine has: Python's standard library, about ten megabytes, under the licence of Python (PSF).

There are two kinds of documents: the `.py` sources (`json/decoder.py`), and the topics of the language reference that
`help()` shows (`topics/assert`).

Only text that belongs to the Python version is used: no installed packages, no tests, no file written for one machine.
Some systems install parts of the library separately (`tkinter`, `idlelib`). Without them there are fewer documents; the
others are the same, with the same identities.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Sequence
from pathlib import Path

from clt_plugins import Refused

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test"}
)
# The topics are documents, one by one, so the module that holds them all is not one.
SKIPPED_FILES = frozenset({"pydoc_data/topics.py"})
# Files written for one machine: build paths, compiler flags, local start-up code.
MACHINE_FILES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


class StandardLibrary:
    """The documents by number.

    Raises:
        Refused: as `python_stdlib`.
    """

    def __init__(self) -> None:
        self.texts = python_stdlib()
        self.count = len(self.texts)

    def identity(self) -> str:
        digest, size = hashlib.sha256(), 0
        for identity, text in self.texts:
            data = text.encode("utf-8", "replace")
            digest.update(f"{identity}\0{len(data)}\0".encode())
            digest.update(data)
            size += len(data)
        return f"sha256 {digest.hexdigest()} of {self.count} documents, {size} bytes"

    def fetch(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        return [self.texts[number] for number in numbers]


def python_stdlib() -> list[tuple[str, str]]:
    """Every document as (identity, text), sorted by identity.

    An identity is a path inside the library, or `topics/<name>`; it is the same on every machine.

    Raises:
        Refused: this Python has no standard library in source form.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = _sources(root)
    if not sources:
        raise Refused("source.text", f"no Python source files in {root}: this Python has no standard library to read")
    return sorted(sources + _topics())


def is_held_out(identity: str, share: float) -> bool:
    """Whether a document belongs to the held-out part, which gets about `share` of all documents.

    The answer depends on the identity only, so it is the same in every run, process and machine. A document that is
    held out at one share is held out at every larger one.
    """
    digest = hashlib.blake2b(identity.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < share


def _sources(root: Path) -> list[tuple[str, str]]:
    documents = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            identity = path.relative_to(root).as_posix()
            if identity in SKIPPED_FILES or identity.startswith(MACHINE_FILES):
                continue
            try:
                with tokenize.open(path) as file:  # in the encoding that the source file declares
                    text = file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue
            if text.strip() and not _is_code_page(identity, text):
                documents.append((identity, text))
    return documents


def _is_code_page(identity: str, text: str) -> bool:
    """Whether this is one of the encodings that consist of a table of numbers."""
    return identity.startswith("encodings/") and ("decoding_table" in text or "decoding_map" in text)


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [(f"topics/{name}", text) for name, text in topics.items() if text.strip()]
