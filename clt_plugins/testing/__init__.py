"""The conformance kit: does a plugin keep the contract, the protocols that `clt_plugins` publishes?

With pytest, one test for each (choice, check) of a plugin:

```python
from clt_plugins.testing import parametrize

@parametrize("clt_gated", settings={"gated": {"bandwidth": 0.3}}, expected_failures={"gated/gradient": "why"})
def test_conforms(case):
    case.run()
```

Without pytest: `python -m clt_plugins.testing clt_gated`, or `for case in cases("clt_gated"): case.run()`.

A failure says what was expected, what came, and where to look. `CHECKS` lists the checks of each recipe table; besides
these, every choice has `config` and `default`. `make_store` writes a random store of collected features, for tests of a
report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clt_plugins.testing.case import Case
from clt_plugins.testing.cases import cases, parametrize
from clt_plugins.testing.report import Nonconformance

if TYPE_CHECKING:
    from clt_plugins.testing.stores import make_store as make_store

    CHECKS: Mapping[str, tuple[str, ...]]

__all__ = ["CHECKS", "Case", "Nonconformance", "cases", "make_store", "parametrize"]


def __getattr__(name: str) -> Any:
    if name == "make_store":
        from clt_plugins.testing.stores import make_store

        return make_store
    if name != "CHECKS":
        raise AttributeError(f"module 'clt_plugins.testing' has no attribute {name!r}")
    # At first use only: the modules of checks need torch.
    from clt_plugins.testing.registry import checks_by_table

    globals()[name] = checks_by_table()
    return globals()[name]
