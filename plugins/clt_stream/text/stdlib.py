"""Real text that every machine already has: Python's own standard library.

Two kinds of documents are given: the ``.py`` sources next to the interpreter (``json/decoder.py``) and
the language-reference topics behind ``help()`` (``topics/assert``). They need no network, no data set
and no licence beyond Python's own (the PSF licence), and there are about ten megabytes of them.

Only text that belongs to the Python version is used: no installed packages, no tests, no file written
for one machine. A system that splits off parts of the library (``tkinter``, ``idlelib``) gives fewer
documents; those it gives are the same, under the same identities.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "test", "tests", "idle_test"}
)
# The topics are given one by one, so the module that holds them all is not a document of its own.
SKIPPED_FILES = frozenset({"pydoc_data/topics.py"})
# Written for one machine: build paths, compiler flags, local start-up code.
MACHINE_FILES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


def python_stdlib() -> list[tuple[str, str]]:
    """Every document as ``(identity, text)``, sorted by identity.

    An identity is a path inside the library or ``topics/<name>``; it is the same on every machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = _sources(root)
    if not sources:
        raise ValueError(f"no Python source files in {root}: this interpreter came without its standard library")
    return sorted(sources + _topics())


def is_held_out(identity: str, share: float) -> bool:
    """Whether a document belongs to the held-out part, which gets about ``share`` of all documents.

    The answer depends on the identity alone, so it is the same in every run, process and machine, and a
    document held out at one share stays held out at every larger one.
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
                with tokenize.open(path) as file:  # honours the encoding a source file declares
                    text = file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue
            if text.strip() and not _is_code_page(identity, text):
                documents.append((identity, text))
    return documents


def _is_code_page(identity: str, text: str) -> bool:
    """Whether this is one of the encodings that are a table of numbers and nothing to read."""
    return identity.startswith("encodings/") and ("decoding_table" in text or "decoding_map" in text)


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return [(f"topics/{name}", text) for name, text in topics.items() if text.strip()]
