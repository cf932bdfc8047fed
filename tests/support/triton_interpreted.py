"""Triton's kernels under its interpreter; run by `test_kernels`, with TRITON_INTERPRET=1.

The interpreter runs kernels with NumPy, on the CPU, thousands of times slower than a GPU. So problems are small, and
the kit's larger ones are left out.
"""

from __future__ import annotations

import attrs
import pytest
import torch

from clt_plugins import BothGradients, Layout
from clt_plugins.contract.model.kernels import Kernels
from clt_plugins.model.devices import bare_context, make_kernels
from clt_plugins.model.sparse import reuse_gradients, row_squares, sparse_decode
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing.adam_update import assert_updates
from clt_plugins.testing.sparse_products import LAYOUTS, TOLERANCES, Problem, assert_conforms, random_mask

ROWS = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Allowed error of rows that are rounded once. The interpreter truncates to bfloat16, a GPU rounds."""


@pytest.fixture
def triton() -> Kernels:
    return make_kernels("triton", torch.device("cpu"), load_plugins())


@pytest.fixture
def cuts_features(monkeypatch):
    """Features of more than 4 pairs are hot, and cut into pieces of 2."""
    monkeypatch.setattr("clt_kernels.gpu.kernels.HOT", 4)
    monkeypatch.setattr("clt_kernels.gpu.kernels.PIECE", 2)


def ragged(layout: str, dtype: torch.dtype, *, per_target: bool, d_model: int = 5) -> Problem:
    """Tokens and features of 0 to 3 pairs."""
    mask = random_mask(4, 3, 2, 0.5)
    mask[2] = False
    mask[:, 1, 1] = False
    return Problem.random(LAYOUTS[layout](3, 2), mask, d_model, dtype, per_target=per_target)


@pytest.mark.parametrize(
    ("layout", "per_target"),
    [("own_layer", False), ("untied", False), ("per_source", False), ("per_source", True), ("per_target", True)],
)
def test_triton_agrees_with_explicit_loops(triton, layout, per_target):
    assert isinstance(triton, BothGradients)
    assert_conforms(triton, ragged(layout, torch.float32, per_target=per_target).with_empty_places(3), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_triton_computes_every_type(triton, dtype):
    tolerance = TOLERANCES.get(dtype, (1e-5,))[0]
    assert_conforms(triton, ragged("untied", dtype, per_target=False, d_model=16), tolerance, ROWS.get(dtype))


@pytest.mark.parametrize("layout", ["untied", "per_source", "per_target"])
def test_triton_cuts_features_of_many_tokens(triton, cuts_features, layout):
    """Pieces of 2 pairs: the last one full, or half full; features of 4, 5 and 6 pairs."""
    mask = random_mask(6, 2, 3, 0.2)
    mask[:, 0, 0] = mask[:5, 1, 1] = mask[2:, 1, 2] = True
    mask[5, 1, 1] = mask[:2, 1, 2] = False
    problem = Problem.random(LAYOUTS[layout](2, 3), mask, 5, torch.float64, per_target=False)
    assert_conforms(triton, problem.with_empty_places(2), 1e-12)


@pytest.mark.parametrize(
    ("tokens", "layers", "features", "d_model", "share"),
    [(3, 2, 2, 6, 0.0), (1, 2, 2, 7, 0.5), (3, 1, 3, 9, 0.5), (3, 2, 2, 1, 1.0), (2, 1, 9, 70, 1.0)],
)
def test_triton_agrees_at_the_edges(triton, tokens, layers, features, d_model, share):
    """No pairs; one token, one layer, one dimension; more pairs and dimensions than a program of `decode` holds."""
    mask = random_mask(tokens, layers, features, share)
    problem = Problem.random(Layout.untied(layers, features), mask, d_model, torch.float64, per_target=False)
    assert_conforms(triton, problem, 1e-12)


def test_triton_decodes_layouts_that_have_no_program(triton):
    """Layer 0 writes to one layer only: neither to its own alone nor to all later ones."""
    layout = attrs.evolve(Layout.untied(3, 3), count=(1, 2, 1))
    problem = Problem.random(layout, random_mask(4, 3, 3, 0.4), 4, torch.float64, per_target=False)
    assert_conforms(triton, problem, 1e-12)


def test_triton_reads_dense_tensors_that_are_not_contiguous(triton):
    problem = ragged("untied", torch.float64, per_target=False)
    problem = attrs.evolve(problem, dense=problem.dense.transpose(0, 1).contiguous().transpose(0, 1))
    assert not problem.dense.is_contiguous()
    assert_conforms(triton, problem, 1e-12)


def test_a_nan_stays_in_its_token_and_its_rows(triton):
    problem = ragged("untied", torch.float32, per_target=False)
    token = int(problem.pairs.token[0])
    problem.dense[token, -1] = torch.nan
    decoded, grad_values, rows = problem.computed(triton, problem.weight, overwrite=True)
    expected = problem.expected()
    for result, right in zip((decoded, grad_values, rows), expected, strict=True):
        assert torch.equal(result.isnan(), right.isnan())
    assert grad_values.isnan().any() and not grad_values.isnan().all()


def test_the_squares_of_rows_are_left_on_the_parameter(triton):
    problem = ragged("untied", torch.float32, per_target=False)
    weight = torch.nn.Parameter(problem.weight.clone())
    reuse_gradients([weight])
    values = problem.values.clone().requires_grad_()

    def backward() -> None:
        out = sparse_decode(values, problem.pairs, weight, problem.layout, triton)
        (out * problem.dense).sum().backward()

    backward()
    first = weight.grad.clone()
    torch.testing.assert_close(row_squares(weight), first.square().sum(1))
    backward()  # a second term of the loss adds up
    torch.testing.assert_close(weight.grad, 2 * first)
    torch.testing.assert_close(row_squares(weight), weight.grad.square().sum(1))
    weight.grad.mul_(0.5)
    assert row_squares(weight) is None
    backward()  # what was not known is not known after one more
    assert row_squares(weight) is None
    weight.grad = None
    assert row_squares(weight) is None
    backward()
    torch.testing.assert_close(row_squares(weight), first.square().sum(1))


def test_gradients_from_bfloat16_are_rounded_and_nothing_else_is():
    chosen = load_plugins().pick("kernels", "triton").spec
    narrow = chosen.build(chosen.config(gradients_from="bfloat16"), bare_context(torch.device("cpu")))
    for dtype, bound in ((torch.bfloat16, 2**-7), (torch.float32, 1e-6)):
        problem = ragged("untied", dtype, per_target=False, d_model=16)
        apart = problem.computed(narrow, problem.weight, overwrite=True)[1:]
        at_once = problem.at_once(narrow, problem.weight, overwrite=True)
        for name, single, both in zip(("grad_values", "grad_rows"), apart, at_once, strict=False):
            assert both.dtype == single.dtype
            off = (both.double() - single.double()).norm() / single.double().norm()
            assert off < bound, name
            assert name != "grad_values" or dtype != torch.bfloat16 or off > 1e-5  # it is rounded


def test_triton_updates_weights_by_the_same_bits_as_the_engine(triton):
    assert_updates(triton)
