"""The callback `bias_nudge`: decoder norms stay below a number, and biases of dead features rise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import Refused, Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Step, Training


@frozen(kw_only=True)
class BiasNudgeConfig:
    """Clip decoder norms, and nudge dead features: decoder_f <- decoder_f * min(1, norm / |decoder_f|), and
    b_f <- b_f + rise * min(1, idle_f / T - 1) where idle_f, the tokens since f was active, is above T."""

    norm: float = field(default=1.0, validator=validators.gt(0))
    """The largest norm of a decoder, over all layers that the feature writes to."""
    rise: float = field(default=0.05, validator=validators.ge(0))
    """The most by which a bias rises each time, in units of normalised activations."""
    after_tokens: int | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """T; `train.dead_after_tokens` if not given."""
    every: int = field(default=10, validator=validators.gt(0))
    """Steps between calls."""


class BiasNudge:
    """A `Callback`."""

    def __init__(self, config: BiasNudgeConfig, context: Context):
        self.config, self.every = config, config.every
        self.after_tokens = config.after_tokens or context.dead_after_tokens

    def after(self, run: Training, step: Step) -> None:
        norms = run.transcoder.tying.norms()
        run.scale_decoder((self.config.norm / norms.clamp_min(1e-12)).clamp_max(1.0))
        bias = run.transcoder.encoder.bias()
        share = (run.idle_tokens / self.after_tokens - 1).clamp(0, 1)
        name = next((name for name, weight in run.transcoder.named_parameters() if weight is bias), None)
        if name is None:
            raise Refused("encoder.name", "its bias is computed from other weights: bias_nudge cannot raise it")
        # Not `reinitialise`: it would make the optimizer forget these features.
        run.set_weights({name: bias.detach() + (self.config.rise * share).to(bias.dtype)})
        long, raised = run.parallel.total((norms > self.config.norm).sum()), run.parallel.total((share > 0).sum())
        run.log({"callbacks/clipped": int(long), "callbacks/nudged": int(raised)})


@hookimpl
def clt_callbacks() -> list[Spec]:
    return [Spec("bias_nudge", BiasNudgeConfig, BiasNudge)]
