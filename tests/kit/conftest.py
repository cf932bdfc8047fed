"""What the kit says of a plugin that is wrong in one way."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import pytest

from clt_plugins.testing import Nonconformance, cases
from tests.support.kit_says import failures_of, installed

if TYPE_CHECKING:
    from tests.conftest import Distributions


IN_PROCESSES = re.compile(r"#[2-9]/(tensor_parallel|data_parallel|tensor_ranks|ranks|other_ranks|other_process)\]$")
"""Checks that start processes, of a choice's second settings and further ones."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each choice is tried in processes with its first settings; with the others in the slow tests."""
    for item in items:
        if IN_PROCESSES.search(item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def failures(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """What the kit says of a plugin, by `choice/check`; source text replaced first."""

    def run(source: str, only: str = "", **replaced: str) -> dict[str, str]:
        module = installed(distributions, source, **replaced)
        # These modules import torch, and much else.
        return failures_of(module, lambda case: only in str(case) and case.slot != "plugin")

    return run


@pytest.fixture
def check(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """What the kit says of a plugin with some texts replaced, by check: `pass`, a failure, or `skip: why`."""

    def run(source: str, only: tuple[str, ...], settings: Any = None, **replaced: str) -> dict[str, str]:
        for word, text in replaced.items():
            assert word in source, word
            source = source.replace(word, text)
        distributions.forget("plugin_under_test")
        distributions.module("plugin_under_test", source)
        found = {}
        for case in cases("plugin_under_test", settings=settings):
            if case.check in only:
                try:
                    case.run()
                    found[case.check] = "pass"
                except Nonconformance as error:
                    found[case.check] = str(error)
                except SkipTest as reason:
                    found[case.check] = f"skip: {reason}"
        return found

    return run
