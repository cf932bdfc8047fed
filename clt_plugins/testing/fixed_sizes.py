"""Kernels whose selections have fixed sizes and empty places, as on a GPU, on any device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clt_plugins.model.select.reference import TorchSelect

if TYPE_CHECKING:
    from clt_plugins.contract.model.kernels import Kernels
    from clt_plugins.contract.select import Per


class FixedKernels:
    """The products of other kernels, and a selection in PyTorch's operations that reads nothing back."""

    fixed = True

    def __init__(self, kernels: Kernels):
        self.kernels = kernels

    def __getattr__(self, name: str) -> Any:
        if name == "kernels":  # a copy is asked before it has any
            raise AttributeError(name)
        return getattr(self.kernels, name)

    def select(
        self, tokens: int, n_layers: int, n_features: int, k: int, *, per: Per, capacity: int = 0
    ) -> TorchSelect:
        """See `Kernels.select`."""
        return TorchSelect(tokens, n_layers, n_features, k, per=per, capacity=capacity, fixed=True)
