"""The sparse products by explicit loops in float64: the definition that kernels are compared with, slow and plain.

Shapes: B tokens, L layers, D d_model, F features per layer, N pairs, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import torch
from torch import Tensor

from clt_plugins.contract.model.kernels import BothGradients, Kernels
from clt_plugins.data.features import Pairs
from clt_plugins.data.layout import Layout
from clt_plugins.testing.report import expect, same

LAYOUTS = {
    "own_layer": Layout.own_layer,
    "untied": Layout.untied,
    "per_source": Layout.per_source,
    "per_target": Layout.per_target,
}

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 2**-8),
}
"""dtype of the weight -> allowed error of decode and grad_values, and of grad_rows, as a share of the largest number:
another order of sums; and rows stored in bfloat16 are rounded once, by at most 2^-9."""


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
        numbers = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=numbers, dtype=torch.float64)

        pairs = Pairs.from_mask(mask)
        wide = torch.promote_types(dtype, torch.float32)
        count = len(pairs.token)
        values = draw(count, layout.n_layers) if per_target else draw(count)
        dense = draw(mask.shape[0], layout.n_layers, d_model).to(wide)
        return cls(pairs, layout, values.to(wide), draw(layout.rows, d_model).to(dtype), dense)

    def touches(self) -> Iterator[tuple[int, int, int, int]]:
        """Each (pair, token, target, row), by the definition of a layout; empty places touch nothing."""
        layout = self.layout
        count = None if self.pairs.count is None else int(self.pairs.count)
        both = zip(self.pairs.token.tolist()[:count], self.pairs.feature.tolist()[:count], strict=True)
        for n, (b, feature) in enumerate(both):
            s, f = divmod(feature, layout.n_features)
            for j in range(layout.count[s]):
                yield n, b, s + j, layout.first[s] + f * layout.step[s] + j * layout.stride[s]

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """decode, grad_values and grad_rows, by loops in float64."""
        values, weight, dense = (x.double().numpy() for x in (self.values, self.weight, self.dense))
        decoded, grad_values, rows = np.zeros_like(dense), np.zeros_like(values), np.zeros_like(weight)
        for n, b, t, row in self.touches():
            index = (n, t) if values.ndim == 2 else n
            decoded[b, t] += values[index] * weight[row]
            grad_values[index] += dense[b, t] @ weight[row]
            rows[row] += values[index] * dense[b, t]
        return torch.from_numpy(decoded), torch.from_numpy(grad_values), torch.from_numpy(rows)

    def computed(self, kernels: Kernels, start: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The same by kernels, which write over NaN."""
        decoded, grad_values = torch.full_like(self.dense, torch.nan), torch.full_like(self.values, torch.nan)
        rows = torch.full_like(self.weight, torch.nan) if overwrite else start.clone()
        kernels.decode(self.values, self.pairs, self.layout, self.weight, decoded)
        kernels.grad_values(self.dense, self.pairs, self.layout, self.weight, grad_values)
        kernels.grad_rows(self.values, self.pairs, self.layout, self.dense, rows, overwrite=overwrite)
        return decoded, grad_values, rows

    def at_once(
        self, kernels: BothGradients, start: Tensor, *, overwrite: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """grad_values, grad_rows, squares [R] and sums [L * F] by kernels that compute them together."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        grad_values, rows = torch.full_like(self.values, torch.nan), start.clone()
        squares = start.double().square().sum(1).float()
        if overwrite:
            rows, squares = torch.full_like(rows, torch.nan), torch.full_like(squares, torch.nan)
        features = self.layout.n_layers * self.layout.n_features
        sums = torch.full((features,), torch.nan, dtype=wide) if self.values.dim() == 1 else None
        kernels.gradients(
            self.values, self.pairs, self.layout, self.weight, self.dense, grad_values, rows,
            overwrite=overwrite, squares=squares, sums=sums,
        )  # fmt: skip
        return grad_values, rows, squares, torch.zeros(features) if sums is None else sums

    def with_empty_places(self, number: int) -> Problem:
        """The same pairs with some empty places at the end, whose values are 0."""
        pairs = self.pairs
        last = pairs.tokens - 1, pairs.n_layers * pairs.n_features - 1
        token, feature = (
            torch.cat([x, x.new_full((number,), end)])
            for x, end in zip((pairs.token, pairs.feature), last, strict=True)
        )
        count = torch.tensor(len(pairs.token))
        padded = Pairs(token, feature, pairs.tokens, pairs.n_layers, pairs.n_features, count)
        values = torch.cat([self.values, self.values.new_zeros(number, *self.values.shape[1:])])
        return attrs.evolve(self, pairs=padded, values=values)

    def __str__(self) -> str:
        shape = f"B {self.pairs.tokens}, L {self.layout.n_layers}, F {self.layout.n_features}, D {self.weight.shape[1]}"
        kind = "a value per target" if self.values.dim() == 2 else "one value per pair"
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return f"{shape}, {len(self.pairs.token)} pairs, {kind}, {self.layout.rows} rows, {dtype}"


def assert_conforms(kernels: Kernels, problem: Problem, tolerance: float, rows_tolerance: float | None = None) -> None:
    """All three products, with and without `overwrite`, within `tolerance` of the largest number of each result.

    Kernels that compute `BothGradients` are compared in that too.

    Args:
        rows_tolerance: for grad_rows, whose result has the weight's type; `tolerance` if None.

    Raises:
        Nonconformance: which product is off, by how much, where, and in which problem.
    """
    start = torch.randn(problem.weight.shape, generator=torch.Generator().manual_seed(1)).to(problem.weight.dtype)
    allowed = {"decode": tolerance, "grad_values": tolerance, "grad_rows": rows_tolerance or tolerance}
    decoded, grad_values, rows = problem.expected()
    for overwrite in (True, False):
        expected = decoded, grad_values, rows if overwrite else rows + start.double()
        computed = problem.computed(kernels, start, overwrite=overwrite)
        for (name, bound), right, result in zip(allowed.items(), expected, computed, strict=True):
            look = f"`{name}` of {kernels.name!r} for {problem}" + (", overwrite=False" if not overwrite else "")
            unwritten = (~torch.isfinite(result)).nonzero()[:1].tolist()
            expect(not unwritten, f"every number of {name} written", f"none or not a finite one at {unwritten}", look)
            same(result.double(), right, f"{name} as by explicit loops", look, bound)
        if isinstance(kernels, BothGradients):
            _assert_at_once(kernels, problem, computed, start, allowed, overwrite=overwrite)


def _assert_at_once(
    kernels: BothGradients,
    problem: Problem,
    apart: tuple[Tensor, Tensor, Tensor],
    start: Tensor,
    allowed: dict[str, float],
    *,
    overwrite: bool,
) -> None:
    """Both gradients at once are those of the single products; squares and sums are those of the results.

    Args:
        apart: what the single products gave.
    """
    look = f"`gradients` for {problem}" + (", overwrite=False" if not overwrite else "")
    _, grad_values, rows = apart
    at_once = problem.at_once(kernels, start, overwrite=overwrite)
    for name, right, result in zip(("grad_values", "grad_rows"), (grad_values, rows), at_once, strict=False):
        same(result.double(), right.double(), f"{name} as by the single product", look, allowed[name])
    stored = at_once[1].double().square().sum(1)
    same(at_once[2].double(), stored, "squares of the rows as stored", look, 1e-5)
    if problem.values.dim() == 1:
        sums = torch.zeros(len(at_once[3]), dtype=torch.float64)
        sums.index_add_(0, problem.pairs.feature, problem.values.double())
        bound = 1e-12 if at_once[3].dtype == torch.float64 else 1e-5
        same(at_once[3].double(), sums, "sums of a feature's values", look, bound)


def random_mask(tokens: int, layers: int, features: int, share: float, seed: int = 0) -> Tensor:
    """Which features are on, [B, L, F]."""
    return torch.rand(tokens, layers, features, generator=torch.Generator().manual_seed(seed)) < share
