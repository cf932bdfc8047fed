"""What the kit says of the source of a plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from unittest import SkipTest

from clt_plugins.testing import Case, Nonconformance, cases

if TYPE_CHECKING:
    from tests.conftest import Distributions


def installed(distributions: Distributions, source: str, **replaced: str) -> str:
    """The name of a plugin's module, in the place of the last one; words of its source are replaced first."""
    for word, text in replaced.items():
        source = source.replace(word, text)
    distributions.forget("plugin_under_test")
    distributions.module("plugin_under_test", source)
    return "plugin_under_test"


def failures_of(module: str, wanted: Callable[[Case], bool]) -> dict[str, str]:
    """The message of each case that fails, by `choice/check`; those that are skipped do not."""
    found = {}
    for case in cases(module):
        if wanted(case):
            try:
                case.run()
            except Nonconformance as error:
                found[str(case)] = str(error)
            except SkipTest:
                pass
    return found


def by_check(found: dict[str, str]) -> dict[str, str]:
    """The same by the check's name, where one choice was looked at."""
    return {name.rpartition("/")[2]: message for name, message in found.items()}
