"""Tensor parallel = single: what a rank has after a step is its slice of what one process has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from unittest import SkipTest

import attrs
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from clt_plugins.contract.model.parallel import SplitsTokens
from clt_plugins.errors import Faults
from clt_plugins.model.assemble import Parts, close
from clt_plugins.testing.bench import FEATURES, TOKENS, Bench
from clt_plugins.testing.processes.pool import RANKS, on_ranks
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same
from clt_plugins.training import learned

CHOICE = "tensor"
"""The choice of `[parallel]` that joins the ranks."""

ROUNDING = 1e-10
"""Of float64: other orders of the same sums differ by about 1e-15 of the largest term for each of some 1e3 terms."""

SUMS = "sums over features that miss those of other ranks: `context.parallel.sum_features`"
LOOK: dict[str, dict[str, str]] = {
    "first": {
        "": "`__init__`: draw with `clt_plugins.uniform`, which cuts what one process draws; nothing else random",
    },
    "features": {
        "": f"`__init__` and the step: {SUMS}",
        "encoder": f"`inputs`, `rows` and `bias` on a rank, which has its own features only: {SUMS}",
        "activation": "`selection`: the k best of this rank are not the k best of all; give `Top` its `parallel`",
        "tying": "`norms`, by which activations may choose: of this rank's features, in their order",
    },
    "reconstruction": {
        "": f"`forward`: {SUMS}",
        "tying": "`decode` and `affine`: a bias must not be in `decode`, which is summed over ranks",
    },
    "term": {
        "": f"`forward`: {SUMS}",
        "losses": "the loss: wrap what it adds up over features in `forward.sum_features`; do not take means over "
        "features",
    },
    "grad": {
        "": "`feature_axis` of the parameter (`clt_plugins.parameter`), and sums over features that miss other ranks",
    },
}
"""Where to look, by table; "" for all others. In the order in which one follows from the other: the first that differs
is the fault."""
SPLIT = (
    "`forward.share()`, here a part of the tokens, as on GPUs: what is computed of it is a mean over its tokens, and "
    "goes through `share.mean`"
)
"""Where to look if only that differs."""
VANISHES = 1e-5
"""A gradient below this part of the terms is compared by that part: see `scale`."""


@attrs.frozen(kw_only=True)
class Result:
    """What one rank has after a step."""

    tensors: bytes
    """A safetensors file of `first/…`, `term/…`, `grad/…`, `features` and `reconstruction`."""
    axes: dict[str, int | None]
    """Which axis of each tensor counts features, by the name it has in files."""
    shard: range
    """Its features of each layer."""


FIRST = ("sparse_is_dense", "gradient", "gradient_reconstruction", "gradient_features", "runs_model", "save_load")
"""What is wrong on one rank: several ranks say less clearly what."""


@check("encoder", "activation", "tying", "losses", needs=FIRST)
def tensor_parallel(bench: Bench) -> None:
    """On 2 and 3 ranks that share the features, everything is as on one: first values, terms, features, gradients.

    Skipped where it refuses to be built on several ranks, or no choice `tensor` is installed for `[parallel]`.
    """
    if CHOICE not in bench.plugins.choices("parallel"):
        raise SkipTest(f"no choice {CHOICE!r} for [parallel] is installed")
    changes: dict[str, Any] = {"transcoder": {"dtype": "float64", "path": "sparse"}}
    fresh = weights_by_name(bench.parts(stirred=False, **changes))
    expected = {f"first/{name}": value.clone() for name, value in fresh.items()}
    parts = bench.parts(**changes)
    weights = packed(weights_by_name(parts))
    expected |= _after_step(parts, bench)
    changes["parallel"] = {"name": CHOICE}
    for world in RANKS:
        # Losses are tried twice: with whole sums, as with gloo, and with shares of the tokens, as with nccl.
        for splits in (False, True) if bench.slot == "losses" and TOKENS % world == 0 else (False,):
            results = on_ranks(bench, world, step_on_rank, changes, weights, splits)
            skip_if_refused(results)
            _compare(expected, results, bench.slot, SPLIT if splits else "")


def skip_if_refused(results: Sequence[Any]) -> None:
    """A choice may refuse to be built on several ranks: then all of them have a text in place of a result."""
    if reason := refusal(results):
        raise SkipTest(f"it refuses several ranks: {reason}")


def refusal(results: Sequence[Any]) -> str:
    """Why all ranks refuse; "" where they have results."""
    refusals = [one for one in results if isinstance(one, str)]
    if refusals:
        expect(len(refusals) == len(results), "all ranks to refuse", "some train", "`build`")
    return refusals[0] if refusals else ""


def built_on_rank(bench: Bench, changes: dict[str, Any], *, stirred: bool) -> Parts | str:
    """The parts of this rank; why they cannot be built."""
    try:
        return bench.parts(stirred=stirred, **changes)
    except Faults as error:
        if dist.is_initialized():
            dist.destroy_process_group()  # this process serves other checks, too
        return str(error)


def step_on_rank(bench: Bench, changes: dict[str, Any], weights: bytes, splits: bool) -> Result | str:
    """A training step with the parent's weights, of which this rank uses its slice; why it refuses to be built.

    Args:
        splits: ranks split the tokens when they compute the error: see `SplitsTokens`.
    """
    parts = built_on_rank(bench, changes, stirred=False)
    if isinstance(parts, str):
        return parts
    if isinstance(parts.context.parallel, SplitsTokens):
        parts.context.parallel.splits_tokens = splits
    axes = parts.transcoder.feature_axes()
    shard = parts.context.parallel.shard(FEATURES)
    local = weights_by_name(parts)
    tensors = {f"first/{name}": x.clone() for name, x in local.items()}
    for name, value in load(weights).items():
        part = cut(value, axes[name], shard)
        expect(
            local[name].shape == part.shape,
            f"{name} {list(part.shape)} on a rank that has {len(shard)} of {FEATURES} features",
            str(list(local[name].shape)),
            "`__init__`: make it for `context.parallel.shard(context.n_features)`, and say by "
            "`clt_plugins.parameter(value, feature_axis)` which axis counts features",
        )
        local[name].copy_(part)
    tensors |= _after_step(parts, bench)
    # Not closed after an error: other ranks would report the lost connection, and this process is killed anyway.
    close(parts)
    return Result(tensors=packed(tensors), axes=axes, shard=shard)


def weights_by_name(parts: Parts) -> dict[str, Tensor]:
    """The transcoder's tensors without its statistics."""
    return {name: x for name, x in parts.transcoder.tensors().items() if not name.startswith("normaliser.")}


def packed(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file of copies: views of one tensor cannot be in one."""
    return save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})


def cut(x: Tensor, axis: int | None, shard: range) -> Tensor:
    """A rank's part of a tensor."""
    return x if axis is None else x.narrow(axis, shard.start, len(shard))


def _after_step(parts: Parts, bench: Bench) -> dict[str, Tensor]:
    """What is compared after a step: `term/…`, `grad/…` cut as files are, `features` and `reconstruction`."""
    outcome = bench.step(parts, bench.batch(torch.float64))
    parameters = learned.parameters(parts)
    parts.context.parallel.reduce_gradients(list(parameters.values()))
    tensors = {f"term/{name}": value for name, value in outcome.terms.items()}
    tensors |= {"features": outcome.features.dense().detach(), "reconstruction": outcome.reconstruction}
    for name, (owner, view, _) in learned.views(parts).items():
        grad = parameters[owner].grad
        tensors[f"grad/{name}"] = view(torch.zeros_like(parameters[owner]) if grad is None else grad)
    return tensors


def scale(gradients: Iterable[Tensor], terms: Iterable[Tensor]) -> float:
    """What differences between gradients are relative to: the largest number of all of them.

    Not of the one parameter: where its summands cancel, what is left is rounding, of the size of the summands, and
    those are about as large as the gradients of others. Where a loss is at an extremum, all vanish: summands are of the
    size of the terms, and 1e-15 of these is about their rounding.
    """
    weighted = [*gradients, *(VANISHES * x for x in terms)]
    return max([float(x.detach().abs().nan_to_num(posinf=0).max()) for x in weighted if x.numel()], default=0.0)


def _compare(expected: dict[str, Tensor], results: list[Result], table: str, where: str = "") -> None:
    ranks = [load(result.tensors) for result in results]
    of_kind = {kind: [x for name, x in expected.items() if name.startswith(f"{kind}/")] for kind in LOOK}
    largest = scale(of_kind["grad"], of_kind["term"])
    for name in sorted(expected, key=lambda name: list(LOOK).index(name.split("/")[0])):
        kind, _, inner = name.partition("/")
        tolerance, look = 0.0 if kind == "first" else ROUNDING, where or LOOK[kind].get(table, LOOK[kind][""])
        for rank, (tensors, result) in enumerate(zip(ranks, results, strict=True)):
            axis = 2 if kind == "features" else result.axes.get(inner)
            what = f"{name.replace('/', ' of ')} on rank {rank} of {len(ranks)} as in one process"
            expect(name in tensors, what, "rank has none", look)
            of = largest if kind == "grad" else None
            same(tensors[name], cut(expected[name], axis, result.shard), what, look, tolerance, of)
