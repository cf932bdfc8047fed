"""What the weights alone say of features, in units of raw activations.

With decoder rows w(s, f → r), what feature f of layer s adds to the outputs of layer r per unit of its value, and
encoder rows e(t, g):

- *norms* |w(s, f → r)|, and *cosines* between the rows of a feature, and with its encoder row.
- *Similar* features have a large cosine between all that they write: the rows of all targets as one vector [L * D], 0
  where a feature does not write. So features of different layers are compared in the layers that both write to, and
  what one of them writes before the other begins makes them less similar.
- *Virtual weights* from (s, f) to (t, g), t > s: the sum of w(s, f → r) over s <= r < t, which is what the feature has
  added to the residual stream when layer t reads it, times e(t, g). These are the weights of circuit tracing (Ameisen
  et al. 2025, "Circuit Tracing") along the residual stream, without attention. If the source knows its language model,
  the norm before the MLP is folded into e, but for its division by σ of each token. The largest in size are kept.
- *Logits* of a row w: U w, U being the LM head behind the final norm, but for the division by σ of each token (the
  logit lens: nostalgebraist 2020), less the mean over the vocabulary, since a number that is added to all logits
  changes no probability. (circuit-tracer's direct effects on logits are these, divided by σ.) They are kept for the row
  of each target, and for the sum of a feature's rows: all that it writes to the residual stream.

Time is that of products: of all pairs of features, F² L² D (1/2 + L/6) multiplications, and of all rows with U, F L² D
V / 2. They run in blocks on the transcoder's device; in memory are the rows of two layers, U, and a few blocks.

Shapes: L layers, D d_model, F features per layer, V vocabulary, n = L - s targets of a layer s, B features of a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from clt_plugins.collected.geometry.nearest import Nearest
from clt_plugins.collected.info import GeometryInfo
from clt_plugins.errors import Refused
from clt_plugins.model.normalisation.folded import raw_decoder, raw_encoder

if TYPE_CHECKING:
    from clt_plugins.collected.tensors import Arrays
    from clt_plugins.contract.reading.language_model import ReadsResidual
    from clt_plugins.model.transcoder import CrossLayerTranscoder

BLOCK = 2**25
"""Numbers of a block of products: 128 MiB."""


class _Work(NamedTuple):
    """What is to be computed for a layer s."""

    multiplications: int
    numbers: int
    """Products, among which the largest are searched."""


class Geometry:
    """Computes what the weights say, a layer at a time.

    Args:
        transcoder: with all features on this rank.
        model: the language model, for logits, and for the norms before its MLPs; None: both are left out.
        similar: S, similar features of each feature; 0 leaves them out.
        virtual: U, upstream and downstream features of each; 0 leaves them out.
        logits: G, tokens that each row raises most, and as many that it lowers most.

    Raises:
        Refused: features are split over ranks; the normalisation cannot be folded; or the model does not tell how its
            logits are computed.
    """

    def __init__(
        self,
        transcoder: CrossLayerTranscoder,
        model: ReadsResidual | None = None,
        *,
        similar: int = 10,
        virtual: int = 10,
        logits: int = 10,
    ):
        if transcoder.context.parallel.tensor_ranks > 1:
            raise Refused("transcoder", "its features are split over ranks: load all of it on one")
        self.transcoder, self.model = transcoder, model
        self.device = transcoder.device
        self._unembedding: Tensor | None = None
        if model is not None and logits:
            rows = model.unembedding().to(self.device)
            self._unembedding = rows - rows.mean(0)
        count = 0 if self._unembedding is None else min(logits, len(self._unembedding))
        self.info = GeometryInfo(similar=similar, virtual=virtual, logits=count)

    @torch.no_grad()
    def layers(self, progress: Callable[[float], None] | None = None) -> Iterator[tuple[int, Arrays]]:
        """The arrays of each layer, `ARRAYS_OF_GEOMETRY`, from the first to the last.

        Args:
            progress: called with the share of the work that is done.

        Raises:
            Refused: weights are not finite.
        """
        L, F = self.transcoder.n_layers, self.transcoder.n_features
        similar = [Nearest(F, self.info.similar, self.device) for _ in range(L)]
        upstream = [Nearest(F, self.info.virtual, self.device, by_size=True) for _ in range(L)]
        work = [self._work(layer).multiplications for layer in range(L)]
        for s in range(L):
            rows = self._rows(s)
            downstream = Nearest(F, self.info.virtual, self.device, by_size=True)
            written = torch.zeros_like(rows[:, 0])
            for t in range(s, L):
                if self.info.similar:
                    self._compare(s, rows, t, rows if t == s else None, similar)
                if self.info.virtual and t > s:
                    written += rows[:, t - 1 - s]
                    self._read(s, written, t, downstream, upstream[t])
            arrays = self._own(s, rows) | self._logits(s, rows)
            for name, value, best in (
                ("similar", "similar_cosine", similar[s]),
                ("upstream", "upstream_weight", upstream[s]),
                ("downstream", "downstream_weight", downstream),
            ):
                arrays[name], arrays[value] = best.best()
            yield s, {name: array.cpu().numpy() for name, array in arrays.items()}
            if progress is not None:
                progress(sum(work[: s + 1]) / sum(work))

    def _rows(self, layer: int) -> Tensor:
        """The decoder rows of a layer, [F, n, D] float32."""
        rows = raw_decoder(self.transcoder, layer, self.device).float()
        if not bool(rows.isfinite().all()):
            raise Refused(
                "transcoder", f"decoder rows of layer {layer} are not finite: the run that wrote it has failed"
            )
        return rows

    def seconds(self) -> float:
        """About how long it takes here; a product of the real width is timed, and a selection."""
        D, F = self.transcoder.d_model, self.transcoder.n_features
        rows = max(1, min(F, 2**22 // F))
        left, right = (torch.randn(count, D, device=self.device) for count in (rows, F))
        block = left @ right.T  # the first product starts what is started once
        product = self._timed(lambda: left @ right.T) / (block.numel() * D)
        selection = self._timed(lambda: Nearest(F, 10, self.device, by_size=True).see(0, block.T, 0)) / block.numel()
        total = 0.0
        for layer in range(self.transcoder.n_layers):
            work = self._work(layer)
            total += work.multiplications * product + work.numbers * selection
        return total

    def _work(self, layer: int) -> _Work:
        L, D, F = self.transcoder.n_layers, self.transcoder.d_model, self.transcoder.n_features
        later = L - layer
        similar = F * F * later if self.info.similar else 0
        virtual = F * F * (later - 1) if self.info.virtual else 0
        logits = 0 if self._unembedding is None else F * (later + 1) * len(self._unembedding)
        return _Work((similar * (later + 1) // 2 + virtual + logits + F) * D, similar + virtual + logits)

    def _timed(self, call: Callable[[], object]) -> float:
        """Seconds of the faster one of two calls."""
        return min(self._once(call) for _ in range(2))

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def _own(self, s: int, rows: Tensor) -> dict[str, Tensor]:
        """Norms and cosines of the rows [F, n, D] of a layer s."""
        F, n, D = rows.shape
        L = self.transcoder.n_layers
        norms, encoder_cosine = (torch.zeros(F, L, device=self.device) for _ in range(2))
        cosines = torch.zeros(F, L, L, device=self.device)
        encoder = raw_encoder(self.transcoder, s, self.device)[0].float()
        encoder = encoder * _inverse(encoder.norm(dim=1))[:, None]
        for part in _parts(F, n * D):
            norms[part, s:] = rows[part].norm(dim=2)
            unit = rows[part] * _inverse(norms[part, s:])[:, :, None]
            cosines[part, s:, s:] = unit @ unit.mT
            encoder_cosine[part, s:] = (unit @ encoder[part, :, None])[:, :, 0]
        return {"norms": norms, "cosines": cosines, "encoder_cosine": encoder_cosine}

    def _compare(self, s: int, rows: Tensor, t: int, others: Tensor | None, similar: list[Nearest]) -> None:
        """Cosines of all that features of layers s and t >= s write."""
        if others is None:
            others = self._rows(t)
        F = len(rows)
        inverse = _inverse(rows.flatten(1).norm(dim=1)), _inverse(others.flatten(1).norm(dim=1))
        right = others.flatten(1).T
        for part in _parts(F, F):
            left = rows[part, t - s :].flatten(1) * inverse[0][part, None]
            cosine = (left @ right).mul_(inverse[1])
            if s == t:
                cosine.diagonal(part.start).fill_(-torch.inf)
            else:
                similar[t].see(0, cosine.T, s * F + part.start)
            similar[s].see(part.start, cosine, t * F)

    def _read(self, s: int, written: Tensor, t: int, downstream: Nearest, upstream: Nearest) -> None:
        """Virtual weights from features of layer s to those of layer t > s.

        Args:
            written: what each feature of s has added to the residual stream before layer t, [F, D].
        """
        F = len(written)
        encoder = raw_encoder(self.transcoder, t, self.device)[0]
        if self.model is not None:
            encoder = self.model.residual_rows(t, encoder)
        right = encoder.float().T
        for part in _parts(F, F):
            weight = written[part] @ right
            downstream.see(part.start, weight, t * F)
            upstream.see(0, weight.T, s * F + part.start)

    def _logits(self, s: int, rows: Tensor) -> dict[str, Tensor]:
        """The tokens that each row, and their sum, raise and lower most."""
        F, L, G = len(rows), self.transcoder.n_layers, self.info.logits
        out: dict[str, Tensor] = {}
        for name in ("logits_up", "logits_down"):
            out[f"{name}_id"] = torch.full((F, L + 1, G), -1, dtype=torch.int32, device=self.device)
            out[f"{name}_value"] = torch.zeros(F, L + 1, G, device=self.device)
        if self._unembedding is None:
            return out
        for target in range(s, L + 1):
            for part in _parts(F, len(self._unembedding)):
                row = rows[part].sum(1) if target == L else rows[part, target - s]
                logits = row @ self._unembedding.T
                for name in ("logits_up", "logits_down"):
                    best = logits.topk(G, largest=name == "logits_up")
                    out[f"{name}_id"][part, target] = best.indices.int()
                    out[f"{name}_value"][part, target] = best.values
        return out


def _parts(count: int, width: int) -> Iterator[slice]:
    """Ranges of features, so many that a block of that width is not larger than `BLOCK`."""
    step = max(1, BLOCK // width)
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm; 0 where that is 0."""
    return torch.where(norm > 0, 1 / norm, 0)
