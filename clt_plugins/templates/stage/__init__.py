"""The stage `example`: a model card, `card.md`, with the sizes of the transcoder and its scores on held-out tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Refused, Spec, StageInfo, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Job


@frozen(kw_only=True)
class ExampleConfig:
    """A model card, `card.md`."""

    title: str = "A cross-layer transcoder"
    """Its first line."""
    tokens: int = field(default=4096, validator=validators.gt(0))
    """Held-out tokens for the scores."""
    every: int | None = field(default=None, validator=validators.optional(validators.gt(0)), metadata=FREE_ON_RESUME)
    """Also every so many steps during training, on checkpoints."""


class Example:
    """A `Stage`."""

    def __init__(self, config: ExampleConfig, context: Context):
        self.config = config
        self.info = StageInfo(folder="example", needs="source", every=config.every)

    def check(self, job: Job) -> None:
        """Before training: look at settings and sizes only, values mean nothing yet."""
        if "\n" in self.config.title:
            raise Refused("stages.example.title", "has a line break: write it on one line")

    def run(self, job: Job) -> None:
        """Write the result into `job.folder`, which is empty."""
        from clt_plugins import score

        transcoder = job.transcoder
        scores = score(transcoder, job.source.held_out(self.config.tokens))
        lines = [
            f"# {self.config.title}",
            f"{transcoder.n_layers} layers of {transcoder.n_features} features, d_model {transcoder.d_model}",
            f"trained on {transcoder.tokens} tokens",
            f"L0 {scores.l0:.1f}, NMSE {scores.nmse:.4f} on {scores.tokens} held-out tokens",
        ]
        job.show("\n".join(lines), {"l0": scores.l0, "nmse": scores.nmse})
        (job.folder / "card.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        job.log({"example/l0": scores.l0, "example/nmse": scores.nmse})


@hookimpl
def clt_stages() -> list[Spec]:
    return [Spec("example", ExampleConfig, Example)]
