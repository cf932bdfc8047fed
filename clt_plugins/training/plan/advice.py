"""Changes of settings that would make a recipe faster or smaller, each tried on the plan itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from clt_plugins.errors import Faults
from clt_plugins.recipe.read import recipe_data
from clt_plugins.training.plan.records import Advice, Plan

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe

Changed = Callable[..., Plan]
"""(settings as `--set` takes them) -> the plan of the recipe with them.

Raises:
    Faults: the recipe cannot have them.
"""

WORTH = 1.05
"""What is told makes training faster by this factor at least."""
COUNTS = (*range(1, 9), *(2**n for n in range(4, 11)))
"""Numbers of GPUs that are tried."""


def faster(needs: Plan, recipe: Recipe, changed: Changed) -> list[Advice]:
    """Single changes that give more tokens per second and still fit, the best first."""
    assert needs.speed is not None
    found = []
    for setting, cost, dead in _changes(needs, recipe):
        other = _try(changed, setting)
        if other is None or other.speed is None or (needs.speed.fits and not other.speed.fits):
            continue
        # What works on dead features only counts while there are some.
        before, after = (s.seconds + (s.if_dead if dead else 0.0) for s in (needs.speed, other.speed))
        times = (other.tokens / after) / (needs.tokens / before)  # of the same number of steps
        if times >= WORTH:
            found.append(Advice(set=setting, times=times, total_bytes=other.total_bytes, cost=cost))
    found.sort(key=lambda one: -one.times)
    return found


def _changes(needs: Plan, recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """Settings to try: as `--set` takes them, what they change besides, and whether they work on dead features only.

    Some belong to plugins of this project. A recipe that has others refuses them, and they are passed over.
    """
    table = recipe_data(recipe)
    batch, device = recipe.train.batch_tokens, recipe.transcoder.device
    for factor in (2, 4):
        yield f"train.batch_tokens={factor * batch}", f"one update for {factor} times as many tokens", False
    if recipe.train.precision == "fp32" and recipe.transcoder.dtype == "float32":
        yield "train.precision=bf16", "features are selected by a product in bfloat16", False
        if device != "cpu":
            yield "train.precision=tf32", "features are selected by a product in TF32", False
    if table["optimizer"].get("states") == "fp32":
        yield "optimizer.states=bf16", "moments are rounded", False
    if recipe.transcoder.dtype == "float32":
        yield "transcoder.dtype=bfloat16", "weights are rounded", False
    if recipe.model is not None and recipe.model.dtype == "float32":
        yield "model.dtype=bfloat16", "activations are rounded", False
    if needs.bytes.pairs == 0 and table["transcoder"]["path"] == "auto":
        yield "transcoder.path=sparse", "as it is once less than 4 % of the features are active; slower before", False
    if table["activation"].get("anneal_from", 1) > 1:
        yield "activation.anneal_from=1", "more features die", False
    for index, loss in enumerate(table["losses"]):
        if loss["name"] == "auxk" and (k := loss.get("k") or needs.d_model // 2) > 64:
            yield f"losses.{index}.k={max(64, k // 4)}", "while features are dead; fewer of them learn at a token", True


def named_ranks(recipe: Recipe) -> tuple[int | None, int]:
    """Tensor and data ranks that a recipe names; None and 1 where it does not."""
    config = recipe.parallel.config
    return getattr(config, "tensor", None), getattr(config, "data", 1)


def take(gpus: int | None, recipe: Recipe) -> str:
    """What to give to `plan` so that features are split over so many GPUs, and tokens are not."""
    if gpus is None:
        return ""
    named = named_ranks(recipe) != (None, 1)
    return f"--gpus {gpus}" + (f" --set parallel.tensor={gpus} --set parallel.data=1" if named else "")


def smallest_gpus(needs: Plan, changed: Changed) -> int | None:
    """How many GPUs hold a recipe if its features are split over them."""
    assert needs.speed is not None
    if needs.speed.fits is None:
        return None
    for count in COUNTS:
        other = _try(changed, "parallel.name=tensor", f"parallel.tensor={count}", "parallel.data=1")
        if other is not None and other.speed is not None and other.speed.fits:
            return count
    return None


def to_fit(needs: Plan, recipe: Recipe, changed: Changed) -> list[str]:
    """Settings that together make a recipe fit, those that cost least first; empty if it fits, or none do."""
    assert needs.speed is not None
    if needs.speed.fits in (True, None):
        return []
    chosen: list[str] = []
    smallest = needs.total_bytes
    batch = recipe.train.batch_tokens
    for setting in (
        "source.buffer_device=cpu",
        "model.dtype=bfloat16",
        "optimizer.states=bf16",
        "transcoder.dtype=bfloat16",
        f"train.batch_tokens={max(1, batch // 2)}",
        f"train.batch_tokens={max(1, batch // 4)}",
    ):
        other = _try(changed, *chosen, setting)
        if other is None or other.speed is None or other.total_bytes >= smallest:
            continue
        chosen, smallest = (
            [*(one for one in chosen if one.split("=")[0] != setting.split("=")[0]), setting],
            other.total_bytes,
        )
        if other.speed.fits:
            return chosen
    return []


def _try(changed: Changed, *settings: str) -> Plan | None:
    try:
        return changed(*settings)
    except Faults:
        return None
