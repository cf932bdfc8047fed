"""Normalisations: none, mean_std, rms, sqrt_d_model, whitening."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context


@frozen(kw_only=True)
class NoneConfig:
    """Activations stay as they are."""


@frozen(kw_only=True)
class MeanStdConfig:
    """Each dimension gets the mean 0 and the standard deviation 1.

    A dimension that never varied is divided by the root mean square of its layer's standard deviations.
    """


@frozen(kw_only=True)
class RMSConfig:
    """Each layer is divided by one number, so that its root mean square is 1."""


@frozen(kw_only=True)
class SqrtDModelConfig:
    """Each layer is divided by one number, so that the mean norm of a token's activation is sqrt(d_model)."""


@frozen(kw_only=True)
class WhiteningConfig:
    """Each layer gets the mean 0 and the identity as its covariance: no direction is larger than another.

    It costs a product with a D x D matrix per layer, token and side.
    """

    method: Literal["zca", "pca"] = "zca"
    """"zca" stays as near to the activations as possible; "pca" turns them to their principal components, the largest
    first."""
    sides: Literal["both", "inputs", "targets"] = "both"
    """What is whitened; the other side is normalised as by `mean_std`."""
    shrinkage: float = field(default=0.001, validator=[validators.ge(0), validators.le(1)])
    """The share of the covariance that is replaced by its mean variance in all directions. 0 whitens exactly, and makes
    noise as large as everything else; 1 divides each layer by one number."""


def _build(name: str) -> Any:
    def build(config: Any, context: Context) -> Any:
        from clt_normalisations import scales

        return getattr(scales, name)(context)

    return build


def build_whitening(config: WhiteningConfig, context: Context) -> Any:
    from clt_normalisations.whitening import Whitening

    return Whitening(config, context)


@hookimpl
def clt_normalisations() -> list[Spec]:
    return [
        Spec("none", NoneConfig, _build("Nothing")),
        Spec("mean_std", MeanStdConfig, _build("MeanStd")),
        Spec("rms", RMSConfig, _build("RMS")),
        Spec("sqrt_d_model", SqrtDModelConfig, _build("SqrtDModel")),
        Spec("whitening", WhiteningConfig, build_whitening),
    ]
