"""Two data ranks = one process: terms, gradients and state, over two steps on the same tokens."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import torch
from safetensors.torch import load
from torch import Tensor

from clt_plugins.contract.model.activation import Scheduled
from clt_plugins.model.assemble import Parts, close
from clt_plugins.testing.bench import Bench
from clt_plugins.testing.checks.tensor_parallel import CHOICE, ROUNDING, built_on_rank, packed, scale, skip_if_refused
from clt_plugins.testing.processes.pool import on_ranks
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same
from clt_plugins.training import learned

RANKS = 2
STEPS = 2
RATE = 0.05
"""Of plain gradient descent between the steps."""

TOTAL = '`context.parallel.total(x, over="tokens")`'
LOOK = {
    "losses": {
        "state": f"what is computed from a batch and kept: add it up by {TOTAL}",
        "term": "the loss: a mean over this rank's tokens, not a sum; of what the language model gave, "
        f"`forward.model.mean(x)`; what else is of a whole batch goes through {TOTAL}",
        "grad": "sums over the tokens of a batch that miss those of other ranks, or that are no mean",
    },
    "activation": {
        "state": f"what is computed from a batch and kept: add it up by {TOTAL}",
        "term": "`selection`: the k best of this rank's tokens are not the k best of the batch; give `Top` its "
        f"`parallel`; what else is of a whole batch goes through {TOTAL}",
        "grad": "sums over the tokens of a batch that miss those of other ranks, or that are no mean",
    },
}
"""Where to look, by table, in the order in which one follows from the other."""
FLOAT32 = 64 * torch.finfo(torch.float32).eps
"""A difference of at most this share of the largest number is the rounding of float32."""
ROUNDED = (
    "a difference of the size of float32 rounding, in a transcoder of float64: a parameter, a buffer or a step of the "
    "plugin is in float32; make it in `torch.promote_types(context.dtype, torch.float32)`"
)


@check("activation", "losses", needs=("tensor_parallel",))
def data_parallel(bench: Bench) -> None:
    """On 2 ranks that share the tokens, everything is as on one: terms (their mean), gradients, and kept state.

    Skipped where it refuses to be built on several ranks, or no choice `tensor` is installed for `[parallel]`.
    """
    if CHOICE not in bench.plugins.choices("parallel"):
        raise SkipTest(f"no choice {CHOICE!r} for [parallel] is installed")
    changes: dict[str, Any] = {"transcoder": {"dtype": "float64", "path": "sparse"}}
    expected = _steps(bench.parts(**changes), bench, slice(None))
    changes["parallel"] = {"name": CHOICE, "tensor": 1, "data": RANKS}
    results = on_ranks(bench, RANKS, steps_on_rank, changes)
    skip_if_refused(results)
    ranks = [load(each) for each in results]
    for step in range(STEPS):
        prefixes = (f"{step}/grad/", f"{step}/term/")
        largest = scale(*([x for name, x in expected.items() if name.startswith(each)] for each in prefixes))
        for kind, look in LOOK[bench.slot].items():
            for name in [name for name in expected if name.startswith(f"{step}/{kind}/")]:
                what = f"{kind} {name.split('/', 2)[2]} in step {step + 1}"
                expect(all(name in each for each in ranks), f"{what} on both data ranks", "one has none", look)
                if kind == "term":
                    mean = torch.stack([each[name] for each in ranks]).mean(0)
                    _same(mean, expected[name], f"{what}: the mean of {RANKS} data ranks as in one process", look)
                    continue
                for rank, each in enumerate(ranks):
                    text = f"{what} on data rank {rank} of {RANKS} as in one process"
                    _same(each[name], expected[name], text, look, largest if kind == "grad" else None)


def _same(actual: Tensor, expected: Tensor, text: str, look: str, largest: float | None = None) -> None:
    """Equal up to the rounding of float64; a difference as small as that of float32 has its own advice.

    Args:
        largest: what rounding is a share of, if not the largest number of the two.
    """
    if actual.shape == expected.shape and actual.is_floating_point() and actual.numel():
        difference = float((actual.double() - expected.double()).abs().max())
        look = ROUNDED if difference <= FLOAT32 * float(expected.double().abs().max()) else look
    same(actual, expected, text, look, ROUNDING, largest)


def steps_on_rank(bench: Bench, changes: dict[str, Any]) -> bytes | str:
    """The steps with this rank's half of the tokens; why it refuses to be built."""
    parts = built_on_rank(bench, changes, stirred=True)
    if isinstance(parts, str):
        return parts
    share = parts.context.batch_share()
    first = share * parts.context.parallel.data_rank
    found = _steps(parts, bench, slice(first, first + share))
    # Not closed after an error: other ranks would report the lost connection, and this process is killed anyway.
    close(parts)
    return packed(found)


def _steps(parts: Parts, bench: Bench, tokens: slice) -> dict[str, Tensor]:
    """What is compared of each step: `STEP/term/…`, `STEP/grad/…`, and what is kept besides, `STEP/state/…`."""
    found: dict[str, Tensor] = {}
    parameters = learned.parameters(parts)
    activation = parts.transcoder.activation
    for step in range(STEPS):
        for parameter in parameters.values():
            parameter.grad = None
        if isinstance(activation, Scheduled):
            activation.schedule(step / STEPS)
        outcome = bench.step(parts, bench.batch(torch.float64, seed=step + 1).rows(tokens))
        parts.context.parallel.reduce_gradients(list(parameters.values()))
        found |= {f"{step}/term/{name}": value for name, value in outcome.terms.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    found[f"{step}/grad/{name}"] = parameter.grad.clone()
                    parameter.sub_(parameter.grad, alpha=RATE)
        found |= {f"{step}/state/{name}": value for name, value in _state(parts).items()}
    return found


def _state(parts: Parts) -> dict[str, Tensor]:
    """Parameters that are not trained, and buffers, of activation and losses."""
    modules: dict[str, Any] = {"activation": parts.transcoder.activation}
    modules |= {f"losses.{number}": loss for number, loss in enumerate(parts.losses)}
    found: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        if isinstance(module, torch.nn.Module):
            kept = {name: p for name, p in module.named_parameters() if p.grad is None}
            found |= {
                f"{prefix}.{name}": x.detach().clone() for name, x in (kept | dict(module.named_buffers())).items()
            }
    return found
