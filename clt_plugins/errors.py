"""What is raised on purpose, and how a command ends.

| raised | means | exit code |
| --- | --- | --- |
| `Faults`, `Refused` | what the user gave is wrong: a recipe, an option, a file; a line for each fault | 2 |
| `Stopped` | a run ended early on purpose | its own |
| `Unreachable` | the recipe asks for what the trained transcoder cannot give | 1 |
| `DamagedError`, `OSError` | a file or the network failed | 1 |
| `PluginError` | a plugin is broken; names plugin, distribution and line | 1 |
| `MemoryError` and what else `exhausted` knows | the machine's memory or threads are used up | 1 |

Any other exception is an error of the engine.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from typing import Any

import attrs


class ExitCode(IntEnum):
    """The same on every rank; the text comes from rank 0."""

    OK = 0
    FAILED = 1
    """The run failed, or a plugin is broken."""
    USAGE = 2
    """The command line, the recipe or a file it names is wrong."""
    GUARD = 3
    """A guard stopped the run: the loss was not finite."""
    INTERRUPTED = 130
    """Stopped by the user, after a checkpoint."""


class Stopped(Exception):
    """A run that ended early on purpose: by the user, or by a guard."""

    def __init__(self, code: ExitCode, message: str):
        super().__init__(message)
        self.code = code


Where = tuple[str | int, ...]
"""The path of a setting: `("losses", 0, "weight")`."""


LONGEST = 1000
"""Characters of a fault that are shown: what is wrong in a file may be millions of them."""


@attrs.frozen
class Fault:
    """One thing that is wrong: where, and what."""

    where: Where
    """The setting, or the file as a single part; empty if there is neither."""
    text: str
    """What is wrong, and what to do."""
    origin: str = ""
    """Where the setting was written: `recipe.toml:3`, or `--set train.steps=x`."""

    @property
    def path(self) -> str:
        """The setting as users write it: `losses[0].layers[1]`."""
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.where)
        return dotted.removeprefix(".") if self.where and isinstance(self.where[0], str) else dotted

    def __str__(self) -> str:
        text = self.text if len(self.text) <= LONGEST else f"{self.text[:LONGEST]}..."
        return ": ".join(part for part in (self.origin, self.path, text) if part)


class Faults(ValueError):
    """All that is wrong with what the user gave."""

    def __init__(self, faults: Iterable[Fault]):
        self.faults = list(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "\n".join(map(str, self.faults))


class Refused(Faults):
    """One setting or file of the user that cannot be accepted; how plugins speak to users.

    `raise Refused("activation.k", "larger than transcoder.features (64)")`. Any other exception that leaves a plugin
    counts as an error of the plugin.

    Args:
        where: the setting's path in the recipe, the option, or the file.
        text: what is wrong and what to do, in one line.
    """

    def __init__(self, where: str | Path, text: str):
        super().__init__([Fault(parse_path(str(where)), text)])
        self.args = (where, text)  # so that it can be pickled


class PluginError(Exception):
    """A plugin is broken, or two exclude each other; the text names plugin and distribution."""

    def __init__(self, text: str, *, where: Where = ()):
        super().__init__(text)
        self.where = where
        """The recipe's setting that the text begins with, if it does."""


class Unreachable(Exception):
    """A target that the trained transcoder cannot reach; the text names it, and the settings to change."""


class DamagedError(OSError):
    """Stored rows are not what was written; the text names file, chunk and rows."""


class WrongReturn(TypeError):
    """Something that a plugin built returned what its protocol does not allow."""

    def __init__(self, returned_by: object, text: str):
        super().__init__(text)
        self.returned_by = returned_by


def parse_path(text: str) -> Where:
    """`losses[0].weight` -> `("losses", 0, "weight")`; what is no such path (a file, an option) stays one part."""
    if not re.fullmatch(r"\w+(\.\w+|\[\d+\])*", text):
        return (text,) if text else ()
    parts = text.replace("[", ".").replace("]", "").split(".")
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def names(paths: Iterable[str], setting: str) -> bool:
    """Whether a setting, or a table that it is in, is among some paths."""
    return any(setting == one or setting.startswith((f"{one}.", f"{one}[")) for one in paths)


def fault(text: str, *where: str | int) -> Faults:
    """A single fault, to be raised."""
    return Faults([Fault(where, text)])


def did_you_mean(word: Any, known: Iterable[str], quote: str = "'") -> str:
    """ ", did you mean 'x'?", or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f", did you mean {quote}{near[0]}{quote}?" if near else ""


def exhausted(error: BaseException) -> str | None:
    """What of the machine is used up, if that is what an error means, as one line; None for all other errors.

    Python and torch have no class of their own for threads and for a processor's memory. That of a GPU's memory is
    known by its name: torch is not imported here.
    """
    text = " ".join(str(error).split())
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return f"out of memory: {text}".removesuffix(": ")
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return f"{text}: the limit of memory or of threads is too low (`ulimit -v`, `ulimit -u`)"
    return None
