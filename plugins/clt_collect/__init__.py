"""The stage and the command `collect`: what each feature does in a text, in one store that reports are made from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from attrs import field, frozen, validators

from clt_plugins import FREE_ON_RESUME, Spec, hookimpl, with_trained

if TYPE_CHECKING:
    from clt_plugins import Context, Trained

_positive: Any = validators.gt(0)
_not_negative: Any = validators.ge(0)
_optional: Any = validators.optional(_not_negative)


@frozen(kw_only=True)
class CollectConfig:
    """What each feature does in a text: statistics, examples, co-active features; and what its weights say. Everything
    is in one store, `collected/`, from which reports are made without the model."""

    tokens: int = field(default=65536, validator=_positive)
    """Tokens to read, at most; of training text, whole batches."""
    text: Literal["held_out", "training"] = "held_out"
    """Which text: held out, or that of the first training batches. Training text is shuffled: the last tokens of it may
    lack some of their neighbours."""
    top: int = field(default=20, validator=_not_negative)
    """Examples with the largest values, of each feature."""
    groups: int = field(default=5, validator=_not_negative)
    """A feature's active values, sorted, are cut into so many groups of equal size."""
    per_group: int = field(default=5, validator=_not_negative)
    """Examples that are drawn from each group."""
    window: int = field(default=32, validator=[_not_negative, validators.lt(2**15)])
    """The feature's values are kept at so many tokens before and after each example."""
    distinct: int | None = field(default=8, validator=_optional)
    """Of examples whose tokens are equal up to so many before and after, one is kept in the top and in each group."""
    bins: int = field(default=48, validator=_positive)
    """Bins of the histograms of active values, of equal width in their logarithm."""
    coactive: int = field(default=10, validator=_not_negative)
    """Co-active features of each feature."""
    coactive_tokens: int = field(default=256, validator=_positive)
    """At how many tokens of each feature other features are counted; at all where it is active at fewer."""
    geometry: bool = True
    """Also compute what the weights say: norms, cosines, similar features, virtual weights, logits. Its time grows with
    the square of the features."""
    similar: int = field(default=10, validator=_not_negative)
    """Features with similar decoder rows, of each feature."""
    virtual: int = field(default=10, validator=_not_negative)
    """Upstream and downstream features by virtual weight, of each feature."""
    logits: int = field(default=10, validator=_not_negative)
    """Tokens that each decoder row raises most, and as many that it lowers most; none without a language model."""
    folder: str = "collected"
    """The folder of the store; a second one in a recipe needs another."""
    ranks: Literal["one", "all"] = field(default="one", metadata=FREE_ON_RESUME)
    """Which processes of a run read: rank 0 alone with all features, after the others have left; or all, before any
    stage that runs on one. The geometry is computed by rank 0, while the others wait."""
    every: int | None = field(default=None, validator=validators.optional(_positive), metadata=FREE_ON_RESUME)
    """Also every so many steps during training, on checkpoints."""


def build_collect(config: CollectConfig, context: Context) -> Any:
    from clt_collect.stage import Collect

    return Collect(config)


@click.command("collect")
@with_trained()
@click.option("--out", type=click.Path(path_type=Path), help="The folder of the store; else collected/ in the run.")
@click.option("--json", "as_json", is_flag=True, help="What the store holds, as JSON.")
def collect(trained: Trained, out: Path | None, as_json: bool) -> None:
    """Collect what each feature of PLACE (a run, a transcoder, or another tool's folder) does in held-out text.

    Settings are those of the stage `collect` in the recipe, and can be changed: --set stages.collect.tokens=1000000.
    The store is collected/ of the run; of a checkpoint, or of another transcoder that is not the run's final one,
    stages/NAME/collected/. A command that was killed goes on where it stopped when it is given again. A store that is
    there already, of the same transcoder and with the same settings, is kept.
    """
    from clt_collect.command import run

    run(trained, out, as_json)


@hookimpl
def clt_stages() -> list[Spec]:
    return [Spec("collect", CollectConfig, build_collect)]


@hookimpl
def clt_commands() -> list[click.Command]:
    return [collect]
