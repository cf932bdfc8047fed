"""Whitening: activations with the identity as their covariance.

With the mean μ and the covariance Σ of a layer's activations, of which a share α is replaced by the mean variance
(shrinkage to a multiple of the identity: Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional
covariance matrices"), and its eigenvectors U and eigenvalues Λ,

    Σ' = (1 - α) Σ + α (tr Σ / D) I = U Λ Uᵀ

    ZCA: x' = (x - μ) U Λ^(-1/2) Uᵀ        x = x' U Λ^(1/2) Uᵀ + μ
    PCA: x' = (x - μ) U Λ^(-1/2)           x = x' Λ^(1/2) Uᵀ + μ

(Kessy, Lewin & Strimmer 2018, "Optimal whitening and decorrelation", arXiv 1512.00809; rows are activations here, so
matrices multiply from the right.)

Shapes: B tokens, L layers, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from clt_normalisations.scales import EPSILON, fit_mean_std
from clt_plugins import AffineNormalisation

if TYPE_CHECKING:
    from clt_normalisations import WhiteningConfig
    from clt_plugins import Batch, Context, Parallel

FLOOR = 1e-10
"""The smallest eigenvalue, as a share of the mean one: without shrinkage a constant direction has none."""

Side = Literal["input", "target"]
SIDES: tuple[Side, Side] = ("input", "target")
WHITENED: dict[str, tuple[Side, ...]] = {"both": ("input", "target"), "inputs": ("input",), "targets": ("target",)}


class Whitening(AffineNormalisation):
    """See the module."""

    needs = ("mean", "std")

    def __init__(self, config: WhiteningConfig, context: Context):
        super().__init__(context, matrix=WHITENED[config.sides])
        self.config, self.parallel = config, context.parallel
        # Apple's GPUs have no float64.
        self.device = torch.device("cpu") if context.device.type == "mps" else context.device
        self.size = context.n_layers, context.d_model
        self.gathered: dict[str, Covariance] = {}

    def observe(self, batch: Batch) -> None:
        """Add a batch to the covariances."""
        for side in self.matrix:
            sums = self.gathered.setdefault(side, Covariance(*self.size, self.device))
            sums.add(getattr(batch, f"{side}s"))

    def observed_bytes(self) -> int:
        """One matrix [L, D, D] in float64 for each side."""
        n_layers, d_model = self.size
        return len(self.matrix) * n_layers * d_model**2 * 8

    def fit(self, statistics: Mapping[str, Tensor]) -> None:
        for side in SIDES:
            if side not in self.matrix:
                fit_mean_std(self.side(side), statistics, f"{side}s")
                continue
            units = self.side(side)
            assert units.inverse is not None
            covariance = self.gathered.pop(side).layers(self.parallel)
            units.shift.copy_(statistics[f"{side}s.mean"])
            for layer, matrix in enumerate(covariance):
                wide, narrow = self._matrices(matrix)
                units.scale[layer], units.inverse[layer] = wide, narrow

    def _matrices(self, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix from normalised to raw activations, and its inverse, each [D, D]."""
        mean = covariance.diagonal().mean()
        share = self.config.shrinkage
        shrunk = (1 - share) * covariance + share * mean * torch.eye(len(covariance)).to(covariance)
        values, vectors = (x.flip(-1) for x in torch.linalg.eigh(shrunk))
        # Either sign is an eigenvector; so they are the same whatever library computed them.
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        # A layer that never varies has a mean of 0.
        deviations = values.clamp_min(FLOOR * float(mean)).sqrt().clamp_min(EPSILON)
        wide, narrow = deviations[:, None] * vectors.T, vectors / deviations
        return (vectors @ wide, narrow @ vectors.T) if self.config.method == "zca" else (wide, narrow)


class Covariance:
    """Streamed covariance of each layer's activations, in float64."""

    def __init__(self, n_layers: int, d_model: int, device: torch.device):
        self.count = 0
        self.first = torch.zeros(n_layers, d_model, dtype=torch.float64, device=device)
        self.second = torch.zeros(n_layers, d_model, d_model, dtype=torch.float64, device=device)
        # Sums of products about zero lose digits where a mean is large; a shift near the mean keeps them.
        self.shift: Tensor | None = None

    def add(self, raw: Tensor) -> None:
        """Add activations [B, L, D]."""
        self.count += len(raw)
        if self.shift is None:
            self.shift = raw.double().mean(0).to(self.first.device)
        for layer, second in enumerate(self.second):
            x = raw[:, layer].to(second.device, torch.float64) - self.shift[layer]
            self.first[layer] += x.sum(0)
            second.addmm_(x.T, x)

    def layers(self, parallel: Parallel) -> Iterator[Tensor]:
        """The covariance (n - 1) of the tokens of all ranks, [D, D] for each layer; the sums are used up."""
        assert self.shift is not None
        count = int(parallel.total(torch.tensor(self.count), over="tokens"))
        mean = parallel.total(self.first + self.count * self.shift, over="tokens") / count
        # From each rank's shift to a common one, the mean of all tokens, a step s away: with f = Σ x,
        # Σ (x + s)(x + s)ᵀ = Σ x xᵀ + s fᵀ + f sᵀ + n s sᵀ.
        for second, first, step in zip(self.second, self.first, self.shift - mean, strict=True):
            half = first + self.count / 2 * step
            second += torch.outer(step, half) + torch.outer(half, step)
            yield parallel.total(second, over="tokens") / (count - 1)
