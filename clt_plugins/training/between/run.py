"""A run as callbacks see it: what they may read, and the operations by which they change it.

Shapes: B tokens, L layers, D d_model, F features per layer (of all ranks), N features that are changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from clt_plugins.contract.model.activation import Settable, Thresholded
from clt_plugins.distributed.reading import Reading
from clt_plugins.errors import Refused
from clt_plugins.training.between.rows import Rows

if TYPE_CHECKING:
    from clt_plugins.contract.context import Context
    from clt_plugins.contract.model.parallel import Parallel
    from clt_plugins.data.batch import Batch
    from clt_plugins.model.assemble import Parts
    from clt_plugins.model.transcoder import CrossLayerTranscoder
    from clt_plugins.training.saved.checkpoint import Progress

Weights = Mapping[str, Tensor]
"""Tensors by the names of the transcoder's parameters, of this rank's features."""


class Training:
    """A run between two steps.

    All ranks make the same calls. What they change is exact on any number of ranks and resumes bit for bit, if it
    depends on the run's state alone: on weights, batches, counters, the step, and `generator(run.context.seed, ...)`.
    """

    def __init__(self, parts: Parts, optimizer: torch.optim.Optimizer, progress: Progress, steps: int):
        self._parts, self._progress = parts, progress
        self._rows = Rows(parts.transcoder, optimizer)
        self._evaluation: Callable[[], Weights] | None = None
        self._logged: list[dict[str, Any]] = []
        self._reason = ""
        self._checkpoint = False
        self.steps = steps
        """All steps of the run."""
        self.metrics: dict[str, Any] = {}
        """The newest value of everything logged in this process, by name: `loss/total`, `eval/nmse`."""

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps done."""
        return self._progress.step

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self._progress.tokens

    @property
    def idle_tokens(self) -> Tensor:
        """Tokens since each feature of this rank was last active, [L, F of this rank] int64; not to be changed."""
        return self._progress.idle_tokens

    @property
    def transcoder(self) -> CrossLayerTranscoder:
        """To be read; change it by the operations below."""
        return self._parts.transcoder

    @property
    def context(self) -> Context:
        """Sizes, seed, device, `parallel`, as `build` was told."""
        return self._parts.context

    @property
    def parallel(self) -> Parallel:
        """The ranks."""
        return self._parts.context.parallel

    def weights(self) -> dict[str, Tensor]:
        """The transcoder's trained parameters by name (`tying.weight`), of this rank's features; not to be changed."""
        named = self.transcoder.named_parameters()
        return {name: value.detach() for name, value in named if value.requires_grad}

    def encoder(self, layer: int) -> Tensor:
        """A layer's encoder rows, [F of this rank, H]; H is D but for encoders that transform their inputs.

        Raises:
            Refused: they are computed from other weights, and cannot be set.
        """
        parameter, view = self._rows.encoder(layer)
        return view(parameter.detach())

    def bias(self, layer: int) -> Tensor:
        """A layer's encoder biases, [F of this rank].

        Raises:
            Refused: they are computed from other weights, and cannot be set.
        """
        parameter, view = self._rows.bias(layer)
        return view(parameter.detach())

    def decoder(self, layer: int) -> Tensor:
        """A layer's decoder rows, [F of this rank, n, D]; n is L - layer, or 1 where a row serves all targets.

        Raises:
            Refused: features of the tying have no rows of their own (`FeatureRows`).
        """
        parameter, view = self._rows.decoder(layer)
        return view(parameter.detach())

    @property
    def settable(self) -> set[str]:
        """Which weights of single features can be set: "encoder", "bias", "decoder"."""
        return self._rows.settable

    def rows_for(self, layer: int, x: Tensor) -> Tensor:
        """The encoder rows [N, H] that have the direction of normalised inputs x [N, D] of a layer; x itself but for
        encoders that transform their inputs."""
        return self._rows.rows_for(layer, x)

    def sample(self, tokens: int) -> Iterator[Batch]:
        """Batches of at least so many tokens, those that come next, in normalised units on the transcoder's device.

        They are read and put back: training goes on as if they had not been read. A data rank has its share of each.
        """
        source, normaliser = self._parts.source, self.transcoder.normaliser
        state = source.state()
        try:
            reading = Reading(source, self.parallel, self.context.device)
            for batch in reading.batches(max(1, -(-tokens // self.context.batch_tokens))):
                yield attrs.evolve(
                    batch, inputs=normaliser.inputs(batch.inputs), targets=normaliser.targets(batch.targets)
                )
        finally:
            source.load_state(state)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> Tensor:
        """What the transcoder writes for a sampled batch, [B, L, D] in normalised units, in eval mode."""
        transcoder, was_training = self.transcoder, self.transcoder.training
        transcoder.eval()
        try:
            features = transcoder.encode_normalised(batch.inputs).features
            return transcoder.reconstruct(features, batch.inputs)
        finally:
            transcoder.train(was_training)

    # -- changing -----------------------------------------------------------------------------------------------

    def reinitialise(
        self,
        layer: int,
        feature: Tensor,
        *,
        encoder: Tensor | None = None,
        bias: Tensor | float | None = None,
        decoder: Tensor | None = None,
        revive: bool = True,
    ) -> None:
        """Give features of a layer new weights. The optimizer forgets what it knows of those that are given.

        Args:
            feature: [N] int64, numbered over all ranks. A rank takes those that it has; ranks may give different ones.
            encoder: [N, H], as `encoder` has them; `rows_for` makes them from normalised inputs.
            bias: [N], or one number.
            decoder: [N, L - layer, D], a row for each target; or [N, 1, D]. A tying with one row for all targets takes
                their mean.
            revive: count the features as active now, as for a new start. False leaves `idle_tokens` as it is: a dead
                feature whose bias is raised a little stays dead until a token activates it.

        Raises:
            Refused: the encoder or the tying has no rows of single features.
        """
        own = self.transcoder.own
        mine = (feature >= own.start) & (feature < own.stop)
        number = feature[mine] - own.start
        if encoder is not None:
            self._rows.write(*self._rows.encoder(layer), number, encoder[mine])
        if bias is not None:
            self._rows.write(*self._rows.bias(layer), number, bias[mine] if isinstance(bias, Tensor) else bias)
        if decoder is not None:
            parameter, view = self._rows.decoder(layer)
            rows = decoder[mine]
            if view(parameter.detach()).shape[1] == 1:
                rows = rows.mean(1, keepdim=True)
            self._rows.write(parameter, view, number, rows)
        if revive:
            self._progress.idle_tokens[layer, number] = 0

    def scale_decoder(self, factor: Tensor, *, inverse: bool = False) -> None:
        """Multiply the decoder of every feature by a factor; what the optimizer knows of gradients stays.

        Args:
            factor: [L, F of this rank], above 0.
            inverse: divide the encoder's rows and bias by it, and thresholds, so that the reconstruction stays the
                same; but for activations that rank pre-activations without the decoder's norm.

        Raises:
            Refused: the encoder or the tying has no rows of single features.
        """
        for layer, by_feature in enumerate(factor):
            self._rows.scale(*self._rows.decoder(layer), by_feature)
            if inverse:
                self._rows.scale(*self._rows.encoder(layer), 1 / by_feature)
                self._rows.scale(*self._rows.bias(layer), 1 / by_feature)
        activation = self.transcoder.activation
        if inverse and isinstance(activation, Thresholded) and isinstance(activation, Settable):
            activation.set_threshold(activation.threshold() / factor)

    @torch.no_grad()
    def set_weights(self, weights: Weights) -> None:
        """Set whole parameters, by the names of `weights()`, such as averages at the end of a run. What the optimizer
        knows stays."""
        for name, value in weights.items():
            self.transcoder.get_parameter(name).copy_(value)

    def evaluate_with(self, weights: Callable[[], Weights]) -> None:
        """From now on evaluate on held-out tokens with other weights, which `weights()` gives by name; said in `start`.

        Raises:
            Refused: another callback has said so too.
        """
        if self._evaluation is not None:
            raise Refused("callbacks", "two of them give weights for evaluation: use one")
        self._evaluation = weights

    def stop(self, reason: str) -> None:
        """End the run after this step: it is logged, evaluated and saved as a last step is, and the stages follow.

        Args:
            reason: told to the user.
        """
        self._reason = self._reason or reason

    def checkpoint(self) -> None:
        """Save a checkpoint after this step."""
        self._checkpoint = True

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Log numbers by `group/name`, as a `Logger` gets them: with those of this step where it logs some, else in a
        record of their own. A name that a record has already begins another one."""
        self._logged.append(dict(metrics))

    # -- what the loop asks ---------------------------------------------------------------------------------------

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """A block in which the transcoder has the weights that evaluations are to be made with."""
        others = {} if self._evaluation is None else self._evaluation()
        parameters = {name: self.transcoder.get_parameter(name) for name in others}
        own = {name: parameter.data for name, parameter in parameters.items()}
        try:
            # Another tensor is put in the place, so nothing is copied where types agree.
            for name, parameter in parameters.items():
                parameter.data = others[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]
