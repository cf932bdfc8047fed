"""How features and tokens are split over processes: single, tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen, validators

from clt_plugins import Spec, hookimpl

if TYPE_CHECKING:
    from clt_plugins import Context, Recipe


@frozen(kw_only=True)
class SingleConfig:
    """One process has all features and tokens; no process group."""


@frozen(kw_only=True)
class TensorConfig:
    """Features are split over `tensor` ranks, batches over `data` groups of such ranks; started by `torchrun`."""

    tensor: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    """Ranks that share the features; all ranks divided by `data` if not given."""
    data: int = field(default=1, validator=validators.ge(1))
    """Groups of ranks that share the tokens of a batch."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """The library that transfers tensors; "auto" is nccl for GPUs and gloo for CPUs."""
    timeout_s: float = field(default=600.0, validator=validators.gt(0))
    """Seconds that ranks wait for another one before they count it as dead."""


def build_single(config: SingleConfig, context: Context) -> Any:
    from clt_plugins import Single

    return Single()


def build_tensor(config: TensorConfig, context: Context) -> Any:
    from clt_parallel.connect import connect

    return connect(config, context.device)


@hookimpl
def clt_parallel() -> list[Spec]:
    return [Spec("single", SingleConfig, build_single), Spec("tensor", TensorConfig, build_tensor)]


@hookimpl
def clt_check(recipe: Recipe) -> list[str]:
    config = recipe.parallel.config
    if not isinstance(config, TensorConfig):
        return []
    faults = []
    if config.tensor is not None and config.tensor > recipe.transcoder.features:
        faults.append(
            f"parallel.tensor: {config.tensor} ranks, but transcoder.features is {recipe.transcoder.features}"
        )
    if recipe.train.batch_tokens % config.data:
        faults.append(f"parallel.data: a batch of {recipe.train.batch_tokens} tokens cannot be cut into {config.data}")
    return faults
