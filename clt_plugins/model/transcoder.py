"""The cross-layer transcoder: normalisation, encoder, activation and tying put together.

It works on raw activations: [B, L, D] in, [B, L, D] out. (Ameisen et al. 2025, "Circuit Tracing".)

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clt_plugins.contract.context import Context
from clt_plugins.contract.spec import Selected
from clt_plugins.data.features import Features
from clt_plugins.errors import Refused
from clt_plugins.model import paths
from clt_plugins.model.encoder import check_form
from clt_plugins.model.normalisation.stored import check_buffers
from clt_plugins.model.parameters import note_axes
from clt_plugins.model.paths import Encoded
from clt_plugins.model.products.matrix import Product
from clt_plugins.model.saved.in_files import InFiles
from clt_plugins.model.select.above import Above, Capacity
from clt_plugins.registry.build import build

if TYPE_CHECKING:
    from clt_plugins.contract.model.activation import Activation, Selection
    from clt_plugins.contract.model.encoder import Encoder
    from clt_plugins.contract.model.normalisation import Normalisation
    from clt_plugins.contract.model.tying import Tying

DENSE_ABOVE = 0.04
"""Share of active features above which an activation without a fixed size runs dense; below half of it, sparse."""


class CrossLayerTranscoder(InFiles):
    """Reads the MLP inputs of every layer and reconstructs the MLP outputs.

    Args:
        context: sizes, device, dtype, kernels, parallel.
        encoder: the choice for `[encoder]`.
        activation: the choice for `[activation]`.
        tying: the choice for `[tying]`.
        normalisation: the choice for `[normalisation]`; its statistics are at their first values.
        path: "sparse", "dense" (the reference), or "auto": sparse unless the activation's features are dense.
    """

    target_variance: Tensor
    """The variance of the raw targets, [L], a mean over dimensions: it makes errors comparable between layers."""

    def __init__(
        self,
        context: Context,
        encoder: Selected,
        activation: Selected,
        tying: Selected,
        *,
        normalisation: Selected,
        path: str = "auto",
    ):
        super().__init__()
        self.n_layers = context.n_layers
        self.d_model = context.d_model
        self.n_features = context.n_features
        self.own = context.parallel.shard(context.n_features)
        """The features of each layer that this rank has."""
        self.context = context
        self.choices = {
            "normalisation": normalisation,
            "encoder": encoder,
            "activation": activation,
            "tying": tying,
        }
        self.path = path
        self.encoder: Encoder = build(encoder, context)
        self.activation: Activation = build(activation, context)
        self.tying: Tying = build(tying, context)
        if isinstance(self.activation, nn.Module):
            self.views()  # names that collide in files are found before training
        self.normaliser: Normalisation = build(normalisation, context)
        check_buffers(self.normaliser, normalisation)
        # Statistics stay in float32 where weights are bfloat16: activations are normalised before they are rounded.
        compute = torch.promote_types(context.dtype, torch.float32)
        variance = torch.ones(context.n_layers, dtype=compute, device=context.device)
        self.register_buffer("target_variance", variance)
        note_axes(self)
        with torch.no_grad():
            one = torch.zeros(1, self.n_layers, self.d_model, dtype=compute, device=context.device)
            self.row_size = check_form(self.affine_form(one), self.shape, encoder.choice)
        """H: how many numbers an encoder's row has."""
        self.described_model: dict[str, Any] | None = None
        self.step: int | None = None
        """Training steps done; None if it is not known."""
        self.tokens: int | None = None
        """Tokens trained on; None if it is not known."""
        self.product: Product | None = None
        """The type of the encoder's matrix product in training; that of its weights if None."""
        self.capacity = Capacity(1.0 if path == "sparse" else DENSE_ABOVE)
        """Places for pairs in a training step, where their number cannot be read."""
        self.runs_dense = path == "dense" or (path == "auto" and not self.activation.fixed_size)

    # -- the model on raw activations ---------------------------------------------------------------------------

    def forward(self, inputs: Tensor) -> Tensor:
        """Raw MLP inputs [B, L, D] -> reconstructed raw MLP outputs [B, L, D]."""
        self._check(inputs)
        x = self.normaliser.inputs(inputs)
        return self.normaliser.restore(self.reconstruct(self.encode_normalised(x).features, x))

    def encode(self, inputs: Tensor) -> Features:
        """Raw MLP inputs [B, L, D] -> features; `.dense()` makes them [B, L, F]."""
        self._check(inputs)
        return self.encode_normalised(self.normaliser.inputs(inputs)).features

    def decode(self, features: Features | Tensor, inputs: Tensor | None = None) -> Tensor:
        """Features (or a dense [B, L, F]) -> reconstructed raw MLP outputs [B, L, D].

        Args:
            inputs: the raw MLP inputs [B, L, D], which a skip path reads.

        Raises:
            Refused: the tying reads the inputs (a skip path) and none are given.
        """
        if isinstance(features, Tensor):
            features = Features(features)
        if inputs is None:
            if self._affine_reads_inputs():
                raise Refused("decode", "this transcoder has a skip path: give `inputs` too")
            inputs = features.values.new_zeros(features.shape[0], self.n_layers, self.d_model)
        return self.normaliser.restore(self.reconstruct(features, self.normaliser.inputs(inputs)))

    def _affine_reads_inputs(self) -> bool:
        """Whether the tying reads the inputs: NaN goes in, does NaN come out? A declaration could be forgotten."""
        probe = torch.full((1, self.n_layers, self.d_model), torch.nan, device=self.device)
        return bool(self.tying.affine(probe.to(self.target_variance.dtype)).isnan().any())

    def _check(self, inputs: Tensor) -> None:
        if inputs.dim() != 3 or tuple(inputs.shape[1:]) != (self.n_layers, self.d_model):
            raise Refused(
                "inputs",
                f"expected activations of shape [tokens, {self.n_layers}, {self.d_model}], got {list(inputs.shape)}",
            )

    # -- in normalised units ------------------------------------------------------------------------------------

    def encode_normalised(
        self, x: Tensor, extras: Sequence[Selection | None] = (), *, keep_pre: bool = False
    ) -> Encoded:
        """Normalised inputs [B, L, D] -> features, in one encoder pass that further selections may share.

        Args:
            extras: selections besides the activation's; None entries give None.
            keep_pre: keep all pre-activations [B, L, F] and their gradient.
        """
        form, activation = self.affine_form(x), self.activation

        def select() -> Selection:
            return self._selection(x)

        if self.runs_dense:
            return paths.dense(form, activation, select, extras)
        if keep_pre:
            return paths.keeping_pre(form, activation, select, extras)
        # Evaluation is of what is saved, which knows of no other product: thresholds would lose pairs just above them.
        product = self.product if self.training else None
        return paths.sparse(form, activation, select, extras, self.context.kernels, product)

    def affine_form(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What pre-activations are products of, from normalised inputs [B, L, D]: h [B, L, H], rows [L, F, H], and the
        bias [L, F]."""
        return self.encoder.inputs(x).contiguous(), self.encoder.rows(self.tying).contiguous(), self.encoder.bias()

    def _selection(self, x: Tensor) -> Selection:
        selection = self.activation.selection(x.shape[0], self.tying.norms)
        if isinstance(selection, Above) and self.training and torch.is_grad_enabled():
            self.capacity.limit(selection, self.context.kernels)
        return selection

    def decode_normalised(self, features: Features) -> Tensor:
        """What features of all ranks write, [B, L, D], without bias or skip."""
        return self.context.parallel.sum_features(self.tying.decode(features))

    def reconstruct(self, features: Features, x: Tensor) -> Tensor:
        """The normalised reconstruction [B, L, D] from features and normalised inputs."""
        written = self.context.parallel.sum_features_later(self.tying.decode(features))
        affine = self.tying.affine(x)  # computed while the sums of other ranks arrive
        # A sum over ranks is a view to autograd, which cannot be changed in place. Without ranks the tensor is the
        # tying's own, and adding in place saves a pass over [B, L, D].
        return written() + affine if self.context.parallel.tensor_ranks > 1 else written().add_(affine)

    def settle(self, density: float) -> None:
        """Choose between dense and sparse by the share of features that were active (path "auto")."""
        if self.path == "auto" and not self.activation.fixed_size:
            # Two bounds, so that a density close to one of them does not switch at every log interval.
            self.runs_dense = density > (DENSE_ABOVE / 2 if self.runs_dense else DENSE_ABOVE)
            if self.runs_dense:
                self.capacity.reset()

    def with_activation(self, choice: Selected, activation: Any) -> CrossLayerTranscoder:
        """A transcoder in eval mode that shares everything with this one but the activation.

        Args:
            choice: what built the activation.
        """
        other = copy.copy(self)
        # `copy` shares torch's tables of names too: what is set on one must not appear on the other.
        other._parameters, other._buffers = self._parameters.copy(), self._buffers.copy()
        other._modules = {**self._modules, "activation": activation}
        other.choices = {**self.choices, "activation": choice}
        other.described_model = self.model_described()
        other.runs_dense = False
        other.training = False
        activation.eval()
        note_axes(other)
        return other

    def clone(self) -> CrossLayerTranscoder:
        """A transcoder with numbers of its own, which may be changed; it shares kernels and ranks with this one."""
        shared = (self.context, self.context.kernels, self.context.parallel, self.context.recipe)
        other = copy.deepcopy(self, {id(one): one for one in shared})
        # A deep copy of a parameter does not have what `parameter` has marked it with.
        for (_, mine), (_, copied) in zip(self.named_parameters(), other.named_parameters(), strict=True):
            vars(copied).update(vars(mine))
        return other

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(L, F of this rank): the shape of whatever there is one of for each feature."""
        return self.n_layers, len(self.own)

    @property
    def device(self) -> torch.device:
        """Where the parameters are; "meta" where there are only shapes."""
        return next(self.parameters()).device

    @property
    def W_enc(self) -> Tensor:
        """The weights [L, F, D] of the encoder `plain`; other encoders have no tensor of this name.

        What must serve every encoder goes by `affine_form` or `encoder.expand`.
        """
        return self.encoder.W_enc  # type: ignore[attr-defined]

    @property
    def b_enc(self) -> Tensor:
        """The bias [L, F] of the encoder `plain`; see `W_enc`."""
        return self.encoder.b_enc  # type: ignore[attr-defined]
