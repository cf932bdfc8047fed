"""What a run reports: training and held_out, which are the default; cosine, decoder_norms, gradient_norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class TrainingConfig:
    """Of each logged step: `loss/...`, `train/nmse`, `train/l0`, `train/dead_fraction`, `optim/lr`,
    `optim/grad_norm`."""


@frozen(kw_only=True)
class HeldOutConfig:
    """Of each held-out pass: `eval/nmse`, `eval/explained_variance`, `eval/l0`, `eval/dead_fraction`, all of them by
    layer too, and `eval/density`."""


@frozen(kw_only=True)
class CosineConfig:
    """Of each held-out pass: `eval/cosine`, the mean over tokens of the cosine between reconstruction and target."""


@frozen(kw_only=True)
class DecoderNormsConfig:
    """Of each logged step: mean norms of what features write, by source layer (`train/decoder_norm_by_layer`) and by
    how many layers later it is read (`train/decoder_norm_by_distance`). It costs a pass over the decoder."""


@frozen(kw_only=True)
class GradientNormsConfig:
    """Of each logged step: the 2-norm of the gradients of encoder matrices, decoder matrices, biases and so on
    (`optim/grad_norm_encoder`, `_decoder`, `_bias`, `_threshold`, `_loss`, `_other`), of those that have any. It costs
    a pass over the gradients. With `train.clip_norm` they are those after clipping, unless the optimizer clips
    gradients as it reads them, as adam and adamw do."""


def build_training(config: TrainingConfig, context: Context) -> Any:
    from clt_metrics.built_in import Training

    return Training(context)


def build_held_out(config: HeldOutConfig, context: Context) -> Any:
    from clt_metrics.built_in import HeldOutScores

    return HeldOutScores()


def build_cosine(config: CosineConfig, context: Context) -> Any:
    from clt_metrics.further import Cosine

    return Cosine(context)


def build_decoder_norms(config: DecoderNormsConfig, context: Context) -> Any:
    from clt_metrics.further import DecoderNorms

    return DecoderNorms(context)


def build_gradient_norms(config: GradientNormsConfig, context: Context) -> Any:
    from clt_metrics.further import GradientNorms

    return GradientNorms(context)


@hookimpl
def clt_metrics() -> list[Spec]:
    return [
        Spec("training", TrainingConfig, build_training),
        Spec("held_out", HeldOutConfig, build_held_out),
        Spec("cosine", CosineConfig, build_cosine),
        Spec("decoder_norms", DecoderNormsConfig, build_decoder_norms),
        Spec("gradient_norms", GradientNormsConfig, build_gradient_norms),
    ]
