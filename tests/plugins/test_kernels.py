"""The sparse products of every kernels plugin against explicit loops in float64."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from clt_plugins import Layout, Pairs, sparse_decode
from clt_plugins.interfaces import Kernels
from clt_plugins.loading import load
from clt_plugins.setup import make_kernels

# ---------------------------------------------------------------------------------------------------------------------
# The comparison: for any object that follows `interfaces.Kernels`.

LAYOUTS = {
    "own_layer": Layout.own_layer,
    "untied": Layout.untied,
    "per_source": Layout.per_source,
    "per_target": Layout.per_target,
}


@attrs.frozen(eq=False)
class Problem:
    """Random inputs of the three products; values [N, L] where `per_target`."""

    pairs: Pairs
    layout: Layout
    values: Tensor
    weight: Tensor
    dense: Tensor

    @classmethod
    def random(
        cls, layout: Layout, mask: Tensor, d_model: int, dtype: torch.dtype, *, per_target: bool, seed: int = 0
    ) -> Problem:
        """
        Args:
            mask: which features are on, [B, L, F].
            dtype: of the weight; values and dense tensors have it too, but float32 for bfloat16.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        pairs = Pairs.from_mask(mask)
        wide = torch.promote_types(dtype, torch.float32)
        count = len(pairs.token)
        values = draw(count, layout.layers) if per_target else draw(count)
        dense = draw(mask.shape[0], layout.layers, d_model).to(wide)
        return cls(pairs, layout, values.to(wide), draw(layout.rows, d_model).to(dtype), dense)

    def touches(self):
        """Each (pair, token, target, row), by the definition of a layout."""
        layout = self.layout
        for n, (b, feature) in enumerate(zip(self.pairs.token.tolist(), self.pairs.feature.tolist(), strict=True)):
            s, f = divmod(feature, layout.features)
            for j in range(layout.count[s]):
                yield n, b, s + j, layout.first[s] + f * layout.step[s] + j * layout.stride[s]

    def expected(self, start: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """decode, grad_values, and grad_rows added to `start`, by loops in float64."""
        values, weight, dense = (x.double().numpy() for x in (self.values, self.weight, self.dense))
        decoded, grad_values, rows = np.zeros_like(dense), np.zeros_like(values), start.double().numpy().copy()
        for n, b, t, row in self.touches():
            place = (n, t) if values.ndim == 2 else n
            decoded[b, t] += values[place] * weight[row]
            grad_values[place] += dense[b, t] @ weight[row]
            rows[row] += values[place] * dense[b, t]
        return decoded, grad_values, rows

    def found(self, kernels: Kernels, start: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The same by kernels; results are written over garbage."""
        decoded, grad_values = torch.full_like(self.dense, torch.nan), torch.full_like(self.values, torch.nan)
        rows = torch.full_like(self.weight, torch.nan) if overwrite else start.clone()
        kernels.decode(self.values, self.pairs, self.layout, self.weight, decoded)
        kernels.grad_values(self.dense, self.pairs, self.layout, self.weight, grad_values)
        kernels.grad_rows(self.values, self.pairs, self.layout, self.dense, rows, overwrite=overwrite)
        return decoded, grad_values, rows


def assert_conforms(kernels: Kernels, problem: Problem, tolerance: float, rows_tolerance: float | None = None) -> None:
    """All three products, with and without `overwrite`, within `tolerance` of the largest number of each result.

    Args:
        rows_tolerance: for grad_rows, whose result has the weight's type; `tolerance` if None.
    """
    start = torch.randn(problem.weight.shape, generator=torch.Generator().manual_seed(1)).to(problem.weight.dtype)
    for overwrite in (True, False):
        expected = problem.expected(torch.zeros_like(start) if overwrite else start)
        found = problem.found(kernels, start, overwrite=overwrite)
        for name, one, other, allowed in zip(
            ("decode", "grad_values", "grad_rows"),
            expected,
            found,
            (tolerance, tolerance, rows_tolerance or tolerance),
            strict=True,
        ):
            assert torch.isfinite(other).all(), f"{kernels.name}: {name} left numbers unwritten or is not finite"
            error = np.abs(one - other.double().numpy()).max(initial=0)
            largest = np.abs(one).max(initial=0)
            assert error <= allowed * max(largest, 1e-30), f"{kernels.name}: {name} is off by {error} of {largest}"


def random_mask(tokens: int, layers: int, features: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(tokens, layers, features, generator=torch.Generator().manual_seed(seed)) < share


# ---------------------------------------------------------------------------------------------------------------------
# The built-in kernels.

# Where no other reason is given: 1e-12 for another order of float64 sums, 1e-5 for float32; rows stored in bfloat16
# are rounded once, by at most 2^-9.
TOLERANCES = {torch.float64: (1e-12, None), torch.float32: (1e-5, None), torch.bfloat16: (1e-5, 2**-8)}


@pytest.fixture(params=["torch", "numba", "triton"])
def kernels(request, monkeypatch) -> Kernels:
    if request.param == "triton":
        # Read when the kernels are first imported: Triton's interpreter runs them with NumPy, on the CPU.
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton")
    return make_kernels(request.param, torch.device("cpu"), load())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("per_target", [False, True], ids=["one-value", "value-per-target"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_agree_with_explicit_loops(kernels, layout, per_target, dtype):
    mask = random_mask(9, 4, 7, 0.3)
    mask[3] = False  # a token with no pairs
    mask[:, :, 2] = False  # a feature never on
    problem = Problem.random(LAYOUTS[layout](4, 7), mask, 13, dtype, per_target=per_target)
    tolerance, rows_tolerance = TOLERANCES[dtype]
    if kernels.name == "triton" and rows_tolerance is not None:
        rows_tolerance *= 2  # Triton's interpreter cuts bfloat16 off, where a GPU rounds
    assert_conforms(kernels, problem, tolerance, rows_tolerance)


@pytest.mark.parametrize("per_target", [False, True], ids=["one-value", "value-per-target"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("tokens", "layers", "features", "d_model", "share"),
    [
        (5, 3, 4, 6, 0.0),  # N = 0
        (1, 3, 5, 7, 0.5),  # one token
        (6, 3, 1, 5, 0.5),  # one feature per layer
        (6, 1, 5, 9, 0.5),  # one layer
        (3, 2, 3, 1, 1.0),  # one dimension, every feature on
        (70, 3, 40, 33, 0.4),  # many pairs per token and per feature
        (600, 2, 3, 300, 0.5),  # more tokens and dimensions than a tile holds
    ],
)
def test_kernels_agree_at_the_edges(kernels, layout, per_target, tokens, layers, features, d_model, share):
    if kernels.name == "triton" and tokens * features > 1000:
        pytest.skip("takes minutes in Triton's interpreter")
    mask = random_mask(tokens, layers, features, share)
    problem = Problem.random(LAYOUTS[layout](layers, features), mask, d_model, torch.float64, per_target=per_target)
    assert_conforms(kernels, problem, 1e-12)


def test_tokens_at_both_ends_without_pairs(kernels):
    mask = torch.zeros(6, 2, 3, dtype=torch.bool)
    mask[2, 1, 2] = mask[3, 0, 0] = True
    assert_conforms(kernels, Problem.random(Layout.untied(2, 3), mask, 5, torch.float64, per_target=False), 1e-12)


def test_rows_that_belong_to_no_feature_become_zero(kernels):
    layout = attrs.evolve(Layout.own_layer(2, 3), first=(1, 5), rows=9)
    problem = Problem.random(layout, random_mask(4, 2, 3, 0.6), 5, torch.float64, per_target=False)
    assert_conforms(kernels, problem, 1e-12)


def test_a_pair_may_come_twice_and_out_of_order_within_its_token(kernels):
    """A selection with too few candidates fills up with pairs whose value is zero."""
    token, feature = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([7, 0, 0, 3, 0])
    mask = random_mask(1, 3, 4, 1.0)
    problem = Problem.random(Layout.untied(3, 4), mask, 5, torch.float64, per_target=False)
    values = torch.tensor([1.5, 0.0, 0.0, -2.0, 0.0], dtype=torch.float64)
    dense = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    changed = attrs.evolve(problem, pairs=Pairs(token, feature, 3, 3, 4), values=values, dense=dense)
    assert_conforms(kernels, changed, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_number_of_threads(kernels, layout, dtype):
    if kernels.name == "triton":
        pytest.skip("torch's threads are not Triton's")
    mask = random_mask(67, 3, 29, 0.3)
    problem = Problem.random(LAYOUTS[layout](3, 29), mask, 40, dtype, per_target=False)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(problem.found(kernels, problem.weight, overwrite=False))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("per_target", [False, True], ids=["one-value", "value-per-target"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_through_decode(kernels, layout, per_target):
    if kernels.name == "triton":
        pytest.skip("takes minutes in Triton's interpreter")
    problem = Problem.random(LAYOUTS[layout](3, 4), random_mask(5, 3, 4, 0.4), 3, torch.float64, per_target=per_target)

    def run(values: Tensor, weight: Tensor) -> Tensor:
        return sparse_decode(values, problem.pairs, weight, problem.layout, kernels)

    assert torch.autograd.gradcheck(run, (problem.values.requires_grad_(), problem.weight.requires_grad_()))


def test_dense_tensors_need_not_be_contiguous(kernels):
    problem = Problem.random(Layout.untied(3, 4), random_mask(5, 3, 4, 0.4), 6, torch.float64, per_target=False)
    strided = problem.dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert_conforms(kernels, attrs.evolve(problem, dense=strided), 1e-12)


def test_numba_refuses_a_gpu():
    with pytest.raises(ValueError, match="CPU only"):
        make_kernels("numba", torch.device("cuda"), load())


def test_triton_refuses_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA GPUs only"):
        make_kernels("triton", torch.device("cpu"), load())


def test_auto_takes_numba_on_a_cpu():
    assert make_kernels("auto", torch.device("cpu"), load()).name == "numba"
