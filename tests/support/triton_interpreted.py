"""Triton's kernels under its interpreter; run by `test_kernels`, with TRITON_INTERPRET=1.

The interpreter runs kernels with NumPy, on the CPU, thousands of times slower than a GPU. So the largest of the kit's
problems and `gradcheck`, which take minutes, are left out.
"""

from __future__ import annotations

import attrs
import pytest
import torch

from clt_plugins import Layout
from clt_plugins.contract.interfaces import Kernels
from clt_plugins.model.devices import make_kernels
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing.checks.kernel import EDGES
from clt_plugins.testing.sparse_products import LAYOUTS, TOLERANCES, Problem, assert_conforms, random_mask


@pytest.fixture
def triton() -> Kernels:
    return make_kernels("triton", torch.device("cpu"), load_plugins())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_agrees_with_explicit_loops(triton, layout, dtype):
    mask = random_mask(5, 4, 5, 0.3)
    mask[3] = False  # a token with no pairs
    mask[:, :, 2] = False  # a feature never on
    tolerance, rows_tolerance = TOLERANCES[dtype]
    if rows_tolerance is not None:
        rows_tolerance *= 2  # the interpreter truncates to bfloat16, a GPU rounds
    for per_target in (False, True):
        problem = Problem.random(LAYOUTS[layout](4, 5), mask, 13, dtype, per_target=per_target)
        assert_conforms(triton, problem, tolerance, rows_tolerance)


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge[0] * edge[2] < 100], ids=str)
def test_triton_agrees_at_the_edges(triton, edge):
    tokens, layers, features, d_model, share = edge
    mask = random_mask(tokens, layers, features, share)
    for layout in LAYOUTS.values():
        problem = Problem.random(layout(layers, features), mask, d_model, torch.float64, per_target=False)
        assert_conforms(triton, problem, 1e-12)


def test_triton_computes_more_dimensions_than_a_program_holds(triton):
    mask = random_mask(2, 2, 2, 0.6)
    assert_conforms(triton, Problem.random(Layout.untied(2, 2), mask, 1100, torch.float64, per_target=True), 1e-12)


def test_triton_reads_dense_tensors_that_are_not_contiguous(triton):
    problem = Problem.random(Layout.untied(3, 4), random_mask(5, 3, 4, 0.4), 6, torch.float64, per_target=False)
    problem = attrs.evolve(problem, dense=problem.dense.transpose(0, 1).contiguous().transpose(0, 1))
    assert not problem.dense.is_contiguous()
    assert_conforms(triton, problem, 1e-12)
