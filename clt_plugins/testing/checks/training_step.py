"""Checks of a whole training step: what activations, tyings and losses have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from clt_plugins.model.select.above import Above
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.testing.bench import TOKENS, Bench, as_now, gradients, stir
from clt_plugins.testing.checks.tensor_parallel import ROUNDING, scale
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import complain, expect, location, same


@check("encoder", "activation", "tying", "losses")
def sparse_is_dense(bench: Bench) -> None:
    """The sparse path equals the dense reference, in float64: features, reconstruction, terms, gradients."""
    outcomes, grads, densities = [], [], []
    for path in ("dense", "sparse"):
        parts = bench.parts(transcoder={"dtype": "float64", "path": path})
        outcomes.append(bench.step(parts, bench.batch(torch.float64)))
        grads.append(gradients(parts))
        densities.append(outcomes[-1].features.dense())
    look = {
        "encoder": "`rows`: must be differentiable by torch, or be a parameter",
        "activation": "`selection`, which must keep every pair whose value or gradient can be non-zero, and `forward`",
        "tying": "`decode`: the branch for `features.pairs is None` against the other",
        "losses": "whether a term reads `features.values` as [N]: use `per_feature` and sums, which work on both",
    }[bench.slot]
    same(densities[1], densities[0], "the same features on the sparse path", look, ROUNDING)
    same(outcomes[1].reconstruction, outcomes[0].reconstruction, "the same reconstruction", look, ROUNDING)
    for name, value in outcomes[0].terms.items():
        same(outcomes[1].terms[name], value, f"the same term {name!r} on both paths", look, ROUNDING)
    largest = scale(grads[0].values(), outcomes[0].terms.values())
    for name in grads[0].keys() | grads[1].keys():
        expect(
            name in grads[0] and name in grads[1],
            f"a gradient of {name} on both paths",
            "only one has it",
            look,
        )
        what = f"the same gradient of {name} on both paths"
        same(grads[1][name], grads[0][name], what, look, ROUNDING, largest)


@check("encoder", "activation", "tying", needs=("sparse_is_dense",))
def gradient(bench: Bench) -> None:
    """The derivative of a loss by the encoder and the tying is the numerical one, in float64 (`gradcheck`).

    State that a step changes is taken back before each evaluation.
    """
    _gradcheck(bench, lambda name: not name.startswith("activation."))


@check("activation", needs=("gradient",))
def own_gradient(bench: Bench) -> None:
    """The derivative by the activation's parameters is the numerical one, in float64 (`gradcheck`).

    Every parameter that requires a gradient gets one. A straight-through estimator's is not right: list it in
    `expected_failures` and say so. Skipped without parameters.
    """
    parts = bench.parts(transcoder={"dtype": "float64", "path": "sparse"})
    bench.step(parts, bench.batch(torch.float64))
    for name, parameter in parts.transcoder.activation.named_parameters():  # type: ignore[attr-defined]
        expect(
            not parameter.requires_grad or parameter.grad is not None,
            f"a gradient of {name}, or a parameter that is not trained",
            "none, though it requires one: the optimizer keeps moments for it, and weight decay may move it",
            "what is only state says `requires_grad_(False)`; else a `detach()` or `no_grad` on its way",
        )
    _gradcheck(bench, lambda name: name.startswith("activation."))


def _gradcheck(bench: Bench, belongs: Callable[[str], bool]) -> None:
    parts = bench.parts(transcoder={"dtype": "float64", "path": "sparse"})
    transcoder, batch = parts.transcoder, bench.batch(torch.float64)
    names = [name for name, p in transcoder.named_parameters() if p.requires_grad and belongs(name)]
    if not names:
        raise SkipTest("it has no parameters")

    def loss(name: str, value: Tensor) -> Tensor:
        restore()

        def run(module: CrossLayerTranscoder) -> Tensor:
            x = module.normaliser.inputs(batch.inputs)
            features = module.encode_normalised(x).features
            written = module.reconstruct(features, x)
            return (written - batch.targets).square().sum() + features.values.tanh().sum()

        return torch.func.functional_call(_Call(transcoder, run), {f"module.{name}": value}, ())

    restore = as_now(transcoder.activation)
    for name in names:
        # In float64, whatever its own type: a step of 1e-7 is lost in float32.
        value = transcoder.get_parameter(name).detach().double().clone().requires_grad_()
        look = f"what {name} goes through: a `detach()`, a `no_grad`, or a wrong `backward`"
        try:
            # A step of 1e-7 does not change which features are kept: their pre-activations are further apart.
            torch.autograd.gradcheck(
                lambda v, n=name: loss(n, v), [value], eps=1e-7, atol=1e-5, rtol=1e-4, fast_mode=True
            )
        except RuntimeError as error:
            if type(error).__name__ != "GradcheckError":
                raise
            complain(f"the gradient of {name} to be the derivative", _short(error), look)


def _short(error: BaseException) -> str:
    """The text of gradcheck on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    return (
        " ".join(line for line in lines if line.startswith(("numerical", "analytical", "Jacobian")))[:300] or lines[0]
    )


class _Call(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, function):
        super().__init__()
        self.module = module
        self.function = function

    def forward(self) -> Tensor:
        return self.function(self.module)


def in_views(module: Any) -> None:
    """`views` of an encoder or a tying names every parameter that is trained: files hold nothing else of it."""
    seen = {owner for owner, *_ in module.views().values()}
    missing = [name for name, p in module.named_parameters() if p.requires_grad and name not in seen]
    expect(not missing, "every parameter in `views`", f"none of {', '.join(missing)}: it is lost in files", "`views`")


@check("encoder", "activation", "tying")
def save_load(bench: Bench) -> None:
    """After a training step, a saved and loaded transcoder has the same bits and gives the same outputs."""
    parts = bench.parts()
    transcoder, batch = parts.transcoder, bench.batch()
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=0.01)
    bench.step(parts, batch)
    optimizer.step()
    transcoder.eval()
    transcoder.save(bench.folder / "saved")
    loaded = CrossLayerTranscoder.load(bench.folder / "saved", plugins=bench.plugins, kernels="torch")
    before, after = dict(transcoder.named_parameters()), dict(loaded.named_parameters())
    look = "`views`, which must cover every parameter, under names from which `load` can set them"
    if bench.slot == "activation":
        look = "what `build` makes anew: parameters and buffers of a torch.nn.Module are saved"
    expect(before.keys() == after.keys(), f"the parameters {sorted(before)}", str(sorted(after)), look)
    for name, value in before.items():
        same(after[name], value, f"{name} as it was saved", look)
        axes = [getattr(p, "feature_axis", None) for p in (value, after[name])]
        expect(axes[0] == axes[1], f"feature_axis {axes[0]} of {name} after loading", str(axes[1]), "`__init__`")
    for name, buffer in transcoder.named_buffers():
        if not name.startswith("normaliser."):
            same(
                dict(loaded.named_buffers())[name],
                buffer,
                f"the buffer {name} as it was saved",
                "a buffer with `persistent=False` is not saved, so `__init__` computes it, and steps do not change it",
            )
    with torch.no_grad():
        same(loaded(batch.inputs), transcoder(batch.inputs), "the same outputs after loading", look)


@check("encoder", "activation", "tying", "losses")
def bf16(bench: Bench) -> None:
    """With bfloat16 parameters, a step's terms and gradients are finite."""
    parts = bench.parts(transcoder={"dtype": "bfloat16"})
    outcome = bench.step(parts, bench.batch())
    look = "divisions, logarithms and roots of small numbers: compute in float32, bfloat16 has 8 bits"
    for name, value in outcome.terms.items():
        expect(bool(torch.isfinite(value)), f"a finite term {name!r}", f"{float(value)}", look)
    for name, grad in gradients(parts).items():
        expect(bool(torch.isfinite(grad).all()), f"a finite gradient of {name}", "inf or NaN in it", look)


@check("encoder", "activation", "tying")
def meta(bench: Bench) -> None:
    """On the device "meta" it builds without memory, with the parameters that it has on a CPU."""
    real, planned = bench.parts(), bench.parts(device="meta")
    on_cpu = {name: (tuple(p.shape), p.dtype) for name, p in real.transcoder.named_parameters()}
    on_meta = {name: (tuple(p.shape), p.dtype) for name, p in planned.transcoder.named_parameters()}
    look = "`__init__`: make every tensor with `device=context.device`, and read no numbers there"
    expect(on_meta == on_cpu, f"the same parameters on meta: {on_cpu}", str(on_meta), look)
    allocated = [name for name, p in planned.transcoder.named_parameters() if p.device.type != "meta"]
    expect(not allocated, "parameters without memory", f"{', '.join(allocated)} on {real.context.device}", look)


@check("encoder", "activation", "tying", "losses", trial=True)
def determinism(bench: Bench) -> None:
    """Built and stepped twice from one seed, everything is the same bit for bit."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        parts = bench.parts(stirred=False)
        fresh = {name: p.detach().clone() for name, p in parts.transcoder.named_parameters()}
        stir(parts.transcoder)
        outcome = bench.step(parts, bench.batch())
        runs.append((fresh, outcome.terms, gradients(parts)))
    look = (
        "random numbers: draw them from `clt_plugins.generator(context.seed, ...)`; sets and hashes of str: sort them"
    )
    for what, first, second in zip(("first value", "term", "gradient"), *runs, strict=True):
        for name in first:
            same(second[name], first[name], f"the same {what} of {name} in a second run", look)


@check("encoder", "activation", "tying", "losses", "normalisation")
def no_sync(bench: Bench) -> None:
    """A step reads nothing back from the device and has no shape that depends on numbers.

    Run on the device "meta", which has shapes but no numbers, and stands for a GPU here. Activations without a fixed
    size are tried on the dense path; also on the sparse one, in places of a fixed number, where they select by `Above`.
    """
    parts = bench.parts(device="meta", fixed=True, transcoder={"path": "sparse"})
    dense = bench.parts(device="meta", transcoder={"path": "dense"})
    activation, tying = parts.transcoder.activation, parts.transcoder.tying
    try:
        if activation.fixed_size or isinstance(activation.selection(TOKENS, tying.norms), Above):
            bench.step(parts, bench.batch(device="meta"))
        if not activation.fixed_size:
            bench.step(dense, bench.batch(device="meta"))
    except (RuntimeError, NotImplementedError) as error:
        complain(
            "a step that never waits for a GPU",
            " ".join(str(error).split())[:300],
            f"{location(error)}: `.item()`, `bool(...)`, `nonzero`, a boolean index, a tensor made without `device=`? "
            "Where it costs nothing on a CPU, ask for `x.device.type` first; use `torch.where` otherwise",
        )
