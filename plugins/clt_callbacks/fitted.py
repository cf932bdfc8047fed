"""The decoder of least squares, for the features as they are at the end of training.

Let the features of T tokens be fixed. Then a reconstruction is linear in the decoder rows W and the biases b, and

    J(W, b) = sum over tokens and layers of |y - y'(W, b)|² + c |W - W0|²

has one minimum: the decoder's step of the method of optimal directions (Engan, Aase & Husøy 1999, "Method of optimal
directions for frame design"). W0 are the rows as trained. c is `ridge` times the mean over features of the sum of a²,
a feature's values at these tokens: rows of features that were active seldom stay near W0.

The minimum is approached by the method of conjugate gradients (Hestenes & Stiefel 1952), preconditioned by the diagonal
of the system, which is a sum of a² for each row. Each iteration decodes all tokens once and takes a gradient of rows
once, by the run's own kernels, on any number of ranks. Every dimension of every target layer is a system of its own
where rows are of one target, and each dimension is one where rows serve several targets.

Shapes: B tokens of a batch, L layers, D d_model, F features per layer of this rank, n rows of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor
from tqdm import tqdm

from clt_plugins import Features, Pairs, Refused, Training

if TYPE_CHECKING:
    from clt_callbacks import FitDecoderConfig
    from clt_plugins import Batch

BIAS = "tying.b_dec"
"""The parameter of biases [L, D], of tyings that have them."""
SIDES = ("inputs", "targets")
GROUP = 8192
"""Tokens, at least, that are decoded at once: a gradient of all rows is added up for each group, and would take longer
than the products for small batches."""

Weigh = Callable[[Tensor], Tensor]


class FitDecoder:
    """A `Callback`."""

    every = 0

    def __init__(self, config: FitDecoderConfig):
        self.config = config

    def start(self, run: Training) -> None:
        """Ask for decoder rows: what cannot be fitted is refused before training.

        Raises:
            Refused: the tying has no rows of single features, or they are frozen, or the encoder is made of them.
        """
        run.decoder(0)
        transcoder = run.transcoder
        name, _ = transcoder.tying.feature_rows(0)  # type: ignore[attr-defined]
        if f"tying.{name}" not in run.weights():
            raise Refused("callbacks", "fit_decoder: transcoder.freeze holds the decoder: leave one of them out")
        if _reads(transcoder.encoder.rows, transcoder.tying, transcoder.get_parameter(f"tying.{name}")):
            text = f"fit_decoder: the rows of the encoder {transcoder.choices['encoder'].name!r} are the decoder's, and"
            raise Refused("callbacks", f"{text} would change with it: choose another encoder, or leave it out")

    def finish(self, run: Training) -> None:
        """Fit the decoder."""
        system = _System(run, self.config)
        solution, gain = system.solve(self.config.iterations)
        system.set(system.first.plus(solution))
        run.log({"fit_decoder/gain": gain})

    def state_bytes(self, transcoder: Any) -> int:
        """Bytes of four vectors, which the end of a run needs."""
        return 4 * sum(p.numel() * p.element_size() for p in transcoder.tying.parameters())


@torch.enable_grad()
def _reads(rows: Callable[[Any], Tensor], tying: Any, weight: Tensor) -> bool:
    """Whether an encoder's rows depend on a parameter of the tying."""
    made = rows(tying)
    return made.requires_grad and torch.autograd.grad(made[0, 0].sum(), weight, allow_unused=True)[0] is not None


@attrs.frozen(eq=False)
class _Vector:
    """Numbers for all that is fitted: decoder rows by parameter, of this rank, and biases."""

    rows: dict[str, Tensor]
    bias: Tensor | None

    def plus(self, other: _Vector) -> _Vector:
        rows = {name: value + other.rows[name] for name, value in self.rows.items()}
        return _Vector(rows, None if self.bias is None or other.bias is None else self.bias + other.bias)

    def map(self, function: Callable[[Tensor], Tensor]) -> _Vector:
        rows = {name: function(value) for name, value in self.rows.items()}
        return _Vector(rows, None if self.bias is None else function(self.bias))


class _System:
    """The normal equations: what they multiply a vector by, and their right-hand side."""

    def __init__(self, run: Training, config: FitDecoderConfig):
        self.run, self.transcoder, self.parallel = run, run.transcoder, run.parallel
        weights = run.weights()
        self.layers = range(self.transcoder.n_layers)
        views = [self.transcoder.tying.feature_rows(layer) for layer in self.layers]  # type: ignore[attr-defined]
        self.views = [(f"tying.{name}", view) for name, view in views]
        names = sorted({name for name, _ in self.views})
        # A copy: the parameters take the values of other vectors meanwhile.
        self.first = _Vector(
            {name: weights[name].clone() for name in names}, weights[BIAS].clone() if BIAS in weights else None
        )
        self.apart = len(self.layers) == 1 or self._rows(self.first.rows, 0).shape[1] > 1
        """Whether rows are of one target each."""
        self.kept: list[Features] = []
        self.tokens = 0
        self.right, self.squares, self.squared_error = self._read(config.tokens)
        self.ridge = config.ridge * float(self._mean_square())

    def _rows(self, rows: dict[str, Tensor], layer: int) -> Tensor:
        """A layer's rows, [F, n, D], a view."""
        name, view = self.views[layer]
        return view(rows[name])

    def set(self, vector: _Vector) -> None:
        """Put numbers into the transcoder."""
        self.run.set_weights(vector.rows if vector.bias is None else {**vector.rows, BIAS: vector.bias})

    # -- the system -------------------------------------------------------------------------------------------------

    def _read(self, tokens: int) -> tuple[_Vector, Tensor, Tensor]:
        """Keep the features of tokens. The right-hand side, which is the gradient of the residual; the sum of a² of
        each feature, [L, F]; and the squared error."""
        transcoder = self.transcoder
        like = next(iter(self.first.rows.values()))
        squares = like.new_zeros(transcoder.n_layers * len(transcoder.own))
        error = like.new_zeros(())

        def groups() -> Iterator[tuple[Features, Weigh]]:
            for batches in _grouped(self.run.sample(tokens)):
                features = _joined([self._features(batch.inputs) for batch in batches])
                squares.index_add_(0, features.pairs.feature, _strength(features))  # type: ignore[union-attr]
                self.kept.append(features)
                inputs, targets = (torch.cat([getattr(batch, side) for batch in batches]) for side in SIDES)
                self.tokens += len(inputs)

                def residual(written: Tensor, inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                    left = targets - (written + transcoder.tying.affine(inputs))
                    error.add_(left.square().sum())
                    return left

                yield features, residual

        right = self._gradient(groups())
        of_all = self.parallel.total(squares.view(transcoder.n_layers, -1), "tokens")
        return right, of_all, self.parallel.total(error, "tokens")

    @torch.no_grad()
    def _features(self, inputs: Tensor) -> Features:
        """What is active in eval mode, as pairs, without a gradient."""
        was_training = self.transcoder.training
        self.transcoder.eval()
        try:
            features = self.transcoder.encode_normalised(inputs).features
        finally:
            self.transcoder.train(was_training)
        if features.pairs is None:
            dense = features.dense()
            pairs = Pairs.from_mask(dense != 0)
            features = Features(dense.flatten(1)[pairs.token, pairs.feature], pairs)
        return features

    def _gradient(self, groups: Iterable[tuple[Features, Weigh]]) -> _Vector:
        """The sum over tokens of what rows and biases are multiplied by, times a number for each output.

        Args:
            groups: features, and what makes the numbers [B, L, D] of what the features write [B, L, D].
        """
        parameters = {name: self.transcoder.get_parameter(name) for name in self.first.rows}
        for parameter in parameters.values():
            parameter.grad = None
        bias = None if self.first.bias is None else torch.zeros_like(self.first.bias)
        for features, weigh in groups:
            with torch.enable_grad():
                written = self.transcoder.decode_normalised(features)
            with torch.no_grad():
                x = weigh(written.detach())
            written.backward(x)
            if bias is not None:
                bias += x.sum(0)
        rows = {}
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            rows[name] = self.parallel.total(parameter.grad, "tokens").clone()
            parameter.grad = None
        return _Vector(rows, None if bias is None else self.parallel.total(bias, "tokens"))

    def _times(self, vector: _Vector) -> _Vector:
        """The normal equations' matrix times a vector."""
        self.set(vector)

        def output(written: Tensor) -> Tensor:
            return written if vector.bias is None else written + vector.bias

        product = self._gradient((features, output) for features in self.kept)
        rows = {name: value.add_(vector.rows[name], alpha=self.ridge) for name, value in product.rows.items()}
        return _Vector(rows, product.bias)

    def _mean_square(self) -> Tensor:
        """The mean over all features that were active of the sum of a²."""
        told = torch.stack([self.squares.sum(), (self.squares > 0).sum().to(self.squares)])
        total, count = self.parallel.total(told, "features")
        return total / count.clamp_min(1)

    # -- conjugate gradients ----------------------------------------------------------------------------------------

    def solve(self, iterations: int) -> tuple[_Vector, float]:
        """The change of the decoder, and the share of the squared error that it removes."""
        x, r = self.right.map(torch.zeros_like), self.right
        p = z = self._preconditioned(r)
        inner = self._dot(r, z)
        hidden = None if self.parallel.rank == 0 else True
        for _ in tqdm(range(iterations), desc="fitting the decoder", disable=hidden):
            product = self._times(p)
            step = _ratio(inner, self._dot(p, product))
            x, r = self._add(x, step, p), self._add(r, -step, product)
            z = self._preconditioned(r)
            before, inner = inner, self._dot(r, z)
            p = self._add(z, _ratio(inner, before), p)
        # J falls by x · (right-hand side + residual of the system), and a part of it is now the penalty.
        gained = self._dot(x, self._add(r, torch.ones_like(inner), self.right)).sum()
        rows = _Vector(x.rows, None)
        gained += self.ridge * self._dot(rows, rows).sum()
        return x, float(gained / self.squared_error)

    def _preconditioned(self, vector: _Vector) -> _Vector:
        rows = {name: value.clone() for name, value in vector.rows.items()}
        for layer in self.layers:
            self._rows(rows, layer).div_((self.squares[layer] + self.ridge).clamp_min(1e-30)[:, None, None])
        count = self.parallel.total(torch.tensor(float(self.tokens)), "tokens").to(self.squares)
        return _Vector(rows, None if vector.bias is None else vector.bias / count)

    def _dot(self, one: _Vector, other: _Vector) -> Tensor:
        """Inner products, by system: [L, D] where rows are of one target each, else [1, D]."""
        total = self.squares.new_zeros(len(self.layers) if self.apart else 1, self.transcoder.d_model)
        for layer in self.layers:
            part = (self._rows(one.rows, layer) * self._rows(other.rows, layer)).sum(0)
            total[layer if self.apart else 0 :] += part if self.apart else part.sum(0)
        total = self.parallel.total(total, "features")
        if one.bias is None or other.bias is None:
            return total
        biases = one.bias * other.bias
        return total + (biases if self.apart else biases.sum(0, keepdim=True))

    def _add(self, one: _Vector, factor: Tensor, other: _Vector) -> _Vector:
        """one + factor · other, with a factor for each system."""
        rows = {name: value.clone() for name, value in one.rows.items()}
        for layer in self.layers:
            self._rows(rows, layer).add_(factor[layer if self.apart else 0 :] * self._rows(other.rows, layer))
        bias = None if one.bias is None or other.bias is None else one.bias + factor * other.bias
        return _Vector(rows, bias)


def _grouped(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Batches, in groups of `GROUP` tokens or more."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if sum(one.tokens for one in group) >= GROUP:
            yield group
            group = []
    if group:
        yield group


def _joined(parts: list[Features]) -> Features:
    """The features of several batches as those of one. Empty places of a GPU's pairs have the value 0."""
    starts = accumulate((part.shape[0] for part in parts), initial=0)
    pairs = [part.pairs for part in parts if part.pairs is not None]
    token = torch.cat([one.token + start for one, start in zip(pairs, starts, strict=False)])
    feature = torch.cat([one.feature for one in pairs])
    joined = Pairs(token, feature, sum(one.tokens for one in pairs), pairs[0].n_layers, pairs[0].n_features)
    return Features(torch.cat([part.values for part in parts]), joined)


def _strength(features: Features) -> Tensor:
    """The square of each pair's value, [N]; the mean over targets where a feature writes another value to each."""
    squares = features.values.square()
    return squares if squares.dim() == 1 else squares.mean(1)


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """one / other, and 0 where a system is solved."""
    return torch.where(other > 0, one / other.clamp_min(1e-30), 0.0)
