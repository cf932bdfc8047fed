"""What all tests of loggers share: the context of a small run."""

from __future__ import annotations

import pytest

from clt_plugins import Context
from tests.support.helpers import parts


@pytest.fixture(scope="package")
def context() -> Context:
    return parts().context
