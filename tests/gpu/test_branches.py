"""What the reference does on a GPU only, forced to run on a CPU, gives what it gives there."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch

from clt_kernels import reference
from clt_kernels.reference import TorchKernels
from clt_plugins import Layout, Top
from clt_plugins.testing.selection import numbers
from clt_plugins.testing.sparse_products import LAYOUTS, Problem, assert_conforms, random_mask

KINDS = ["normal", "ties", "special", "negative", "equal", "rising"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope, k", [("global", 5), ("layer", 5), ("layer", [1, 7, 4])], ids=str)
@pytest.mark.parametrize("per", ["token", "batch"])
def test_a_selection_of_fixed_sizes_keeps_the_same(per, scope, k, dtype, kind):
    tokens, layers, features = 9, 3, 40
    pre = numbers(kind, tokens, layers, features).to(dtype)
    kept = []
    for fixed in (False, True):
        top = Top(k, tokens, layers, features, per=per, scope=scope, kernels=TorchKernels(fixed=fixed))
        for layer in range(layers):
            top.see(layer, pre[layer].clone())
        kept.append(top.finish())
    (pairs, values), (fixed_pairs, fixed_values) = kept
    count = len(values) if fixed_pairs.count is None else int(fixed_pairs.count)
    assert count == len(values)
    assert torch.equal(fixed_pairs.token[:count], pairs.token)
    assert torch.equal(fixed_pairs.feature[:count], pairs.feature)
    torch.testing.assert_close(fixed_values[:count], values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(fixed_pairs.token_start, pairs.token_start)
    assert torch.equal(fixed_pairs.feature_start, pairs.feature_start)
    # An empty place has no value, so that nothing counts it as active.
    assert (fixed_values[count:] == -torch.inf).all()


@pytest.fixture(scope="module")
def as_on_a_gpu() -> types.ModuleType:
    """The reference kernels without the branches for the CPU."""
    spec = importlib.util.spec_from_file_location("reference_as_on_a_gpu", reference.__file__)
    assert spec is not None and spec.origin is not None
    module = importlib.util.module_from_spec(spec)
    source = Path(spec.origin).read_text()
    assert source.count('.device.type == "cpu"') >= 2, "the branches have another form: adapt this test"
    exec(compile(source.replace('.device.type == "cpu"', '.device.type == "none"'), spec.origin, "exec"), vars(module))
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_target", [False, True])
def test_the_reference_products_of_a_gpu_are_those_of_explicit_loops(as_on_a_gpu, layout, per_target):
    mask = random_mask(6, 4, 5, 0.3)
    mask[3] = False  # a token with no pairs
    mask[:, :, 2] = False  # a feature never on
    problem = Problem.random(LAYOUTS[layout](4, 5), mask, 13, torch.float64, per_target=per_target)
    assert_conforms(as_on_a_gpu.TorchKernels(), problem, 1e-12)


def test_a_layout_of_one_layer_has_no_rows_beyond_the_last(as_on_a_gpu):
    problem = Problem.random(Layout.untied(1, 7), random_mask(3, 1, 7, 0.5), 4, torch.float64, per_target=False)
    assert_conforms(as_on_a_gpu.TorchKernels(), problem, 1e-12)
