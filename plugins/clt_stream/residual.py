"""What reads a model's residual stream: the LM head behind the final norm, and the transcoder behind that of each MLP.

A norm is known by what it computes, not by its class or its name:

    norm(x) = w (x - mean(x)) / σ(x) + b      LayerNorm; σ² is the mean square of what is divided, and a small number ε
    norm(x) = w x / σ(x) + b                  RMSNorm; w is 1 + weight in Gemma, b is 0

So a matrix W after it reads x by the rows W w, less their mean for a LayerNorm, divided by σ(x), and adds a constant.
(The logit lens reads the residual stream in this way: nostalgebraist 2020.) Which norm stands before the head, and
before an MLP, shows in a forward pass of a few tokens; the head's rows are then compared with the model's logits.

Shapes: D d_model, V vocabulary, F rows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from clt_plugins import Refused
from clt_stream.compare import multiple, near, rounding
from clt_stream.taps import Act, Site, hooked, run_few

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 2**13
"""Rows of the head that are folded at a time."""


@attrs.frozen(eq=False)
class Norm:
    """A norm of the residual stream, as its formula."""

    weight: Tensor
    """w, [D] float64."""
    bias: Tensor
    """b, [D] float64."""
    epsilon: float
    """ε."""
    is_layer_norm: bool
    """Whether the mean is taken away first."""

    def readers(self, rows: Tensor) -> Tensor:
        """Rows [F, D] that read what the norm writes -> rows that read x, to be divided by σ(x)."""
        rows = rows * self.weight.to(rows)
        return rows - rows.mean(1, keepdim=True) if self.is_layer_norm else rows

    def divided(self, x: Tensor) -> Tensor:
        """x / σ(x), [..., D] float64."""
        x = x.double()
        numerator = x - x.mean(-1, keepdim=True) if self.is_layer_norm else x
        return x / (numerator.square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """What it writes, [..., D] float64."""
        scaled = self.divided(x)
        return self.weight * (scaled - scaled.mean(-1, keepdim=True) if self.is_layer_norm else scaled) + self.bias

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, width: int) -> Norm | None:
        """The formula that a module computes; None if it is not one of the two above."""
        alone = copy.deepcopy(module).cpu().float()
        draw = torch.Generator().manual_seed(0)
        trial = torch.randn(8, width, generator=draw).double() * 4.0 ** torch.arange(-4, 4)[:, None]
        trial *= 1 + torch.arange(8)[:, None] / 8  # of different norms
        trial += trial.abs().mean(1, keepdim=True) / 8  # and with a mean
        # Of mean 0, without a 0; so large that ε does not count, then so small that it does.
        probe = torch.ones(width, dtype=torch.float64)
        probe[1::2] = -1
        if width % 2:
            probe[-3:] = torch.tensor([1, 1, -2])
        small = 2.0**-8
        probes = torch.stack([probe * 2**12, probe * -(2**12), probe * small, probe * -small])
        try:
            plus, minus, small_plus, small_minus = alone(probes.float()[None])[0].double()
            written = alone(trial.float()[None])[0].double()
        except Exception:
            return None  # a module of another kind, which needs other arguments
        if plus.shape != probe.shape or written.shape != trial.shape:
            return None
        square, odd = float(probe.square().mean()), (plus - minus) / 2
        weight, bias = odd * square**0.5 / probe, (plus + minus) / 2
        share = multiple((small_plus - small_minus) / 2, odd)[0]
        epsilon = max(0.0, square * small**2 * (share**-2 - 1)) if share > 0 else 0.0
        tried = (cls(weight, bias, epsilon, is_layer_norm) for is_layer_norm in (True, False))
        return next((norm for norm in tried if near(written.float(), norm(trial))), None)


class Readers:
    """What reads the residual stream of a model. One forward pass of a few tokens.

    Args:
        sites: what the transcoder reads and what it predicts, layer by layer.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[tuple[Site, Site]]):
        self.model = model
        self.name = type(model).__name__
        self.head: Any = model.get_output_embeddings()
        embeddings: Any = model.get_input_embeddings()
        self.width: int = embeddings.weight.shape[1]
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        """What modules that may be norms read and wrote."""
        self._norms: dict[str, Norm | None] = {}
        self._layers: list[Norm | None] = []
        self._watch(sites)

    def _watch(self, sites: Sequence[tuple[Site, Site]]) -> None:
        model = self.model
        acts: list[tuple[Site, Act]] = []
        for path, module in model.named_modules():
            if self._may_be_norm(path, module):
                acts += _both(path, self._seen.setdefault(path, []))
        head_path = next((path for path, module in model.named_modules() if module is self.head), None)
        of_head: list[tuple[Tensor, Tensor]] = []
        if head_path is not None:
            acts += _both(head_path, of_head)
        read: dict[int, Tensor] = {}

        def keep(layer: int) -> Act:
            return lambda value: read.__setitem__(layer, value.detach().clone())

        acts += [(site, keep(layer)) for layer, (site, _) in enumerate(sites)]
        with hooked(model, acts):
            self._logits = run_few(model).logits
        self._of_head = of_head[-1] if of_head else None
        self._layers = [self._before(site, read[layer]) for layer, (site, _) in enumerate(sites)]

    def _may_be_norm(self, path: str, module: nn.Module) -> bool:
        weights = [*module.parameters(), *module.buffers()]
        small = all(weight.numel() <= 1 or weight.shape == (self.width,) for weight in weights)
        return bool(path) and small and not any(module.children()) and not isinstance(module, nn.Identity | nn.Dropout)

    def _norm(self, path: str) -> Norm | None:
        if path not in self._norms:
            self._norms[path] = Norm.of(self.model.get_submodule(path), self.width)
        return self._norms[path]

    def _before(self, site: Site, value: Tensor) -> Norm | None:
        """The norm of the same layer that wrote what is read at a site."""
        layer = re.match(r"(?:[^.]+\.)*?\d+\.", site.path)
        for path, calls in self._seen.items():
            if layer is not None and path.startswith(layer[0]):
                written = (wrote for _, wrote in calls if wrote.numel() == value.numel())
                if any(torch.equal(wrote.reshape(value.shape), value) for wrote in written) and self._norm(path):
                    return self._norm(path)
        return None

    def residual_rows(self, layer: int, rows: Tensor) -> Tensor:
        """See `ReadsResidual`."""
        norm = self._layers[layer]
        return rows if norm is None else norm.readers(rows)

    @torch.no_grad()
    def unembedding(self) -> Tensor:
        """See `ReadsResidual`."""
        weight = getattr(self.head, "weight", None)
        if self._of_head is None or weight is None or weight.dim() != 2 or weight.shape[1] != self.width:
            raise self._refused("it has no LM head that is one matrix on its d_model")
        read, wrote = self._of_head
        norm, x, factor = self._final(read)
        scale = self._scale(wrote)
        weight, bias = weight.detach(), getattr(self.head, "bias", None)
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        logits = []
        for into, rows in zip(out.split(ROWS), weight.split(ROWS), strict=True):
            rows = rows.double() * (factor * scale)
            into.copy_(norm.readers(rows))
            logits.append(norm.divided(x) @ into.double().T + rows @ norm.bias.to(rows))
        computed = torch.cat(logits, -1)
        if bias is not None:
            computed += bias.double() * scale
        if not near(self._logits, self._capped(computed).reshape(self._logits.shape)):
            raise self._refused("its logits are not those of its LM head behind its final norm")
        return out

    def _final(self, read: Tensor) -> tuple[Norm, Tensor, float]:
        """The norm that wrote what the head reads, what it read itself, and the factor between the two."""
        for path, calls in reversed(self._seen.items()):
            for x, wrote in reversed(calls):
                if wrote.shape != read.shape:
                    continue
                factor, remainder = (1.0, None) if torch.equal(wrote, read) else multiple(read, wrote)
                norm = self._norm(path) if remainder is None or rounding(remainder, read) else None
                if norm is not None:
                    return norm, x, factor
        raise self._refused("there is no LayerNorm or RMSNorm before its LM head")

    def _scale(self, wrote: Tensor) -> float:
        """The factor between what the head writes and the logits; 1 where they are capped."""
        if self._cap is not None or torch.equal(wrote, self._logits):
            return 1.0
        return multiple(self._logits, wrote)[0]

    @property
    def _cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self._cap is None else self._cap * (logits / self._cap).tanh()

    def _refused(self, why: str) -> Refused:
        return Refused("model.path", f"what features do to the logits of {self.name} cannot be told: {why}")


def _both(path: str, calls: list[tuple[Tensor, Tensor]]) -> list[tuple[Site, Act]]:
    """What a module reads and writes, as a pair for each of its calls."""
    read: list[Tensor] = []

    def wrote(value: Tensor) -> None:
        calls.append((read.pop(), value.detach().clone()))

    return [(Site(path, "input"), lambda value: read.append(value.detach().clone())), (Site(path, "output"), wrote)]
