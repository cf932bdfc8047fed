"""The conformance kit: does a plugin keep the contract of `clt_plugins.contract.interfaces`?

With pytest, one test for each (choice, check) of a plugin:

```python
from clt_plugins.testing import parametrize

@parametrize("clt_gated", settings={"gated": {"bandwidth": 0.3}}, expected_failures={"gated/gradient": "why"})
def test_conforms(case):
    case.run()
```

Without: `python -m clt_plugins.testing clt_gated`, or `for case in cases("clt_gated"): case.run()`.

A failure says what was expected, what came, and where to look. `CHECKS` lists the checks of each recipe table.
"""

from __future__ import annotations

from clt_plugins.testing.cases import CHECKS, Case, cases, parametrize
from clt_plugins.testing.report import Nonconformance

__all__ = ["CHECKS", "Case", "Nonconformance", "cases", "parametrize"]
