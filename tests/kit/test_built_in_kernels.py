"""The conformance kit on the kernels. Numba compiles most of its loops here.

`triton` runs on a GPU only: here its config alone is checked, on a GPU all of it.
"""

from __future__ import annotations

from clt_plugins.testing import Case, parametrize


@parametrize("kernels")
def test_kernels(case: Case) -> None:
    case.run()
