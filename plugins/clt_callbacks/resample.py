"""Dead features begin again at inputs that are badly reconstructed (Bricken et al. 2023, "Towards Monosemanticity",
appendix on neuron resampling), for cross-layer transcoders.

For a dead feature of layer l, a token b is drawn with probability p_b ∝ (Σ_t ‖r_{b,t}‖²)², where r = targets -
reconstruction, in normalised units, and t are the layers that the feature writes to: all from l on, with the tying
`per_layer` only l. Then

    encoder row    x_{b,l} / ‖x_{b,l}‖ · 0.2 · mean norm of the encoder rows of the layer's active features
    bias           0
    decoder rows   r_{b,t} / ‖r_b‖ · mean norm of the decoders of the layer's active features

and the optimizer forgets what it knows of them. The original is an autoencoder, whose decoder takes the input's
direction; here the decoder writes something else than it reads, so it takes what is missing there. A row that serves
several targets (`per_source`) takes the mean of what is missing in them. Where features have no decoder rows of their
own (`per_target`), or the encoder's are computed (`tied`), those stay as they are.

Shapes: B tokens of a rank, L layers, D d_model, F features per layer of this rank, T sampled tokens of all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clt_callbacks.targets import targets
from clt_plugins import Batch, Context, Step, Training, generator

if TYPE_CHECKING:
    from clt_callbacks import ResampleConfig


class Resample:
    """A `Callback`."""

    def __init__(self, config: ResampleConfig, context: Context):
        self.config = config
        self.dead_after = context.dead_after_tokens
        self.every = config.every

    @torch.no_grad()
    def after(self, run: Training, step: Step) -> None:
        """Resample all features that are dead now."""
        if run.step > self.config.until * run.steps:
            return
        dead = run.idle_tokens >= self.dead_after
        count = int(run.parallel.total(dead.sum()))
        run.log({"callbacks/resampled": count})
        if not count:
            return
        written_to = targets(run)
        tokens = self._draw(run, dead, written_to)
        inputs, residuals = self._rows(run, tokens, written_to)
        for layer, rows in inputs.items():
            feature = dead[layer].nonzero().flatten()
            alive = ~dead[layer]
            missing = residuals[layer]
            new: dict[str, Any] = {}
            if "decoder" in run.settable:
                of_decoders = self._mean(run, run.transcoder.tying.norms()[layer], alive)
                shared = run.decoder(layer).shape[1] < missing.shape[1]
                if shared:
                    missing = missing.mean(1, keepdim=True)
                new["decoder"] = missing / missing.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None] * of_decoders
            if "encoder" in run.settable:
                norm = self._mean(run, run.encoder(layer).norm(dim=1), alive) * self.config.encoder_scale
                rows = run.rows_for(layer, rows)
                new["encoder"] = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12) * norm
            if "bias" in run.settable:
                new["bias"] = 0.0
            run.reinitialise(layer, feature + run.transcoder.own.start, **new)
            if "decoder" in new and shared:  # its norm over all targets is more than that of the row
                norms = run.transcoder.tying.norms()[layer][feature, None, None]
                rows = new["decoder"] * (of_decoders / norms.clamp_min(1e-12)).to(new["decoder"])
                run.reinitialise(layer, feature + run.transcoder.own.start, decoder=rows)

    def _draw(self, run: Training, dead: Tensor, written_to: list[int]) -> list[Tensor]:
        """The token, of T, of each dead feature of this rank, by layer; each [n] int64."""
        losses = [self._losses(run, batch, written_to) for batch in run.sample(self.config.tokens)]
        ranks, rank = run.parallel.data_ranks, run.parallel.data_rank
        # [batches, ranks, B, L]: the tokens of a batch follow each other over the ranks, as in one process.
        table = torch.zeros(len(losses), ranks, *losses[0].shape, dtype=torch.float64)
        table[:, rank] = torch.stack(losses)
        weights = run.parallel.total(table, over="tokens").flatten(0, 2).square().cumsum(0)
        own = run.transcoder.own
        drawn = []
        for layer, mask in enumerate(dead.cpu()):
            # A number for each feature of all ranks, so that it does not depend on the others that are dead.
            numbers = generator(run.context.seed, "resample", run.step, layer)
            uniform = torch.rand(run.context.n_features, dtype=torch.float64, generator=numbers)
            uniform = uniform[own.start : own.stop][mask]
            drawn.append(torch.searchsorted(weights[:, layer].contiguous(), uniform * weights[-1, layer]))
        return [tokens.clamp_max(len(weights) - 1) for tokens in drawn]

    def _losses(self, run: Training, batch: Batch, written_to: list[int]) -> Tensor:
        """The squared error of each token in the layers that features of each layer write to, [B, L] float64, on the
        CPU."""
        error = (batch.targets - run.reconstruct(batch)).double().square().sum(2)
        return torch.stack([error[:, layer : layer + n].sum(1) for layer, n in enumerate(written_to)], 1).cpu()

    def _rows(
        self, run: Training, tokens: list[Tensor], written_to: list[int]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Inputs [n, D] and what is missing in the layers that are written to [n, t, D], of the token of each dead
        feature of this rank, by layer."""
        d_model = run.context.d_model
        inputs: dict[int, Tensor] = {}
        residuals: dict[int, Tensor] = {}
        ranks, rank = run.parallel.data_ranks, run.parallel.data_rank
        # Read once more, so that no more than what was drawn is kept.
        for number, batch in enumerate(run.sample(self.config.tokens)):
            missing = batch.targets - run.reconstruct(batch)
            first = (number * ranks + rank) * batch.tokens
            for layer, drawn in enumerate(tokens):
                if layer not in inputs:
                    inputs[layer] = missing.new_zeros(len(drawn), d_model)
                    residuals[layer] = missing.new_zeros(len(drawn), written_to[layer], d_model)
                here = ((drawn >= first) & (drawn < first + batch.tokens)).nonzero().flatten()
                rows = (drawn[here] - first).to(missing.device)
                here = here.to(missing.device)
                inputs[layer][here] = batch.inputs[rows, layer]
                residuals[layer][here] = missing[rows, layer : layer + written_to[layer]]
        total = run.parallel.total
        return (
            {layer: total(x, over="tokens") for layer, x in inputs.items()},
            {layer: total(x, over="tokens") for layer, x in residuals.items()},
        )

    def _mean(self, run: Training, norms: Tensor, alive: Tensor) -> Tensor:
        """The mean norm of a layer's active features of all ranks; of all features where none is active."""
        norms = norms.double()  # so that other orders of the sum, on other numbers of ranks, give the same
        sums = torch.stack([(norms * alive).sum(), alive.sum().to(norms), norms.sum(), norms.new_tensor(len(norms))])
        of_alive, count, of_all, everyone = run.parallel.total(sums)
        return torch.where(count > 0, of_alive / count.clamp_min(1), of_all / everyone)
