"""Checks for `[encoder]`: see `clt_plugins.contract.model.encoder.Encoder`.

Shapes: B tokens, L layers, D d_model, F features per layer, H numbers of a row.
"""

from __future__ import annotations

from unittest import SkipTest

import torch
from torch import Tensor

from clt_plugins.errors import Refused
from clt_plugins.model.assemble import Parts
from clt_plugins.model.sparse import reuse_gradients
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_plugins.testing.bench import D_MODEL, FEATURES, LAYERS, TOKENS, Bench, stir
from clt_plugins.testing.checks.training_step import ROUNDING, in_views
from clt_plugins.testing.registry import check
from clt_plugins.testing.report import expect, same

FORM = ("inputs", "rows", "bias")


def _parts(bench: Bench, path: str = "sparse") -> Parts:
    return bench.parts(transcoder={"dtype": "float64", "path": path})


def _form(transcoder: CrossLayerTranscoder, x: Tensor) -> dict[str, Tensor]:
    """What the encoder returns, as it returns it."""
    encoder = transcoder.encoder
    return {"inputs": encoder.inputs(x), "rows": encoder.rows(transcoder.tying), "bias": encoder.bias()}


@check("encoder", trial=True, basic=True)
def form(bench: Bench) -> None:
    """`inputs`, `rows` and `bias` have their shapes and types, and change nothing: called again, they are the same;
    `views` names every parameter."""
    transcoder, x = _parts(bench).transcoder, bench.batch(torch.float64).inputs
    kind = type(transcoder.encoder).__name__
    expect(isinstance(transcoder.encoder, torch.nn.Module), "a torch.nn.Module from `build`", kind, "the base class")
    in_views(transcoder.encoder)
    before = {name: p.detach().clone() for name, p in transcoder.named_parameters()}
    given = x.clone()
    first, second = _form(transcoder, given), _form(transcoder, given)
    same(given, x, "`inputs` to leave its argument as it is", "`inputs`: an operation in place")
    h = first["inputs"].shape[-1]
    shapes = {"inputs": (TOKENS, LAYERS, h), "rows": (LAYERS, FEATURES, h), "bias": (LAYERS, FEATURES)}
    for name, value in first.items():
        expect(tuple(value.shape) == shapes[name], f"`{name}` {shapes[name]}", f"{tuple(value.shape)}", f"`{name}`")
        same(second[name], value, f"the same `{name}` when asked again", f"`{name}`: random numbers, or a state")
    kind = str(transcoder.encoder.inputs(x.float()).dtype)
    expect(kind == "torch.float32", "float32 `inputs` of a float32 argument", kind, "`inputs`: `.to(x.dtype)`")
    for name, p in transcoder.named_parameters():
        same(p, before[name], f"{name} as it was before", "an operation in place in `inputs`, `rows` or `bias`")


@check("encoder", needs=("sparse_is_dense", "fresh"))
def product(bench: Bench) -> None:
    """Pre-activations are h · rows + bias on every path, and so are gradients: against autograd of the dense form.

    In float64; with gradients in buffers that are kept from step to step, as in training.
    """
    x = bench.batch(torch.float64).inputs
    for path, keep_pre in (("sparse", False), ("sparse", True), ("dense", False)):
        parts = _parts(bench, path)
        transcoder, where = parts.transcoder, f"path {path!r}{', all pre-activations kept' if keep_pre else ''}"
        features = transcoder.encode_normalised(x, keep_pre=keep_pre).features
        chosen = features.dense().detach() != 0
        made = _form(transcoder, x)
        pre = torch.einsum("blh,lfh->blf", made["inputs"], made["rows"]) + made["bias"]
        reference = transcoder.activation(pre, None) * chosen
        look = "`inputs`, `rows`, `bias`: do they return the same in training and evaluation, and when called again?"
        same(features.dense(), reference, f"the features of h · rows + bias ({where})", look, ROUNDING)
        names, parameters = zip(*transcoder.named_parameters(), strict=True)
        trained = [p for p in parameters if p.requires_grad]
        expected = torch.autograd.grad(reference.square().sum(), trained, allow_unused=True)
        reuse_gradients(p for p in trained if p.dim() > 1)
        for _ in range(2):  # the second step finds buffers with the first one's numbers
            for p in parameters:
                p.grad = None
            transcoder.encode_normalised(x, keep_pre=keep_pre).features.values.square().sum().backward()
        for p, grad in zip(trained, expected, strict=True):
            name = names[[id(one) for one in parameters].index(id(p))]
            got = torch.zeros_like(p) if p.grad is None else p.grad
            what = f"the gradient of {name} that autograd gives for the dense form ({where})"
            same(got, torch.zeros_like(p) if grad is None else grad, what, "a `backward` of your own", ROUNDING)


@check("encoder")
def expand(bench: Bench) -> None:
    """`expand` gives the matrix and bias of each layer: on its own x they make the pre-activations; detached.

    Skipped where the encoder refuses to.
    """
    transcoder, x = _parts(bench).transcoder, bench.batch(torch.float64).inputs
    made = _form(transcoder, x)
    for layer in range(LAYERS):
        try:
            matrix, bias = transcoder.encoder.expand(layer, transcoder.tying)
        except Refused as refused:
            expect("\n" not in str(refused), "a refusal of one line", repr(str(refused)), "`expand`")
            raise SkipTest(f"it refuses: {refused}") from refused
        for what, value, shape in (("matrix", matrix, (FEATURES, D_MODEL)), ("bias", bias, (FEATURES,))):
            expect(tuple(value.shape) == shape, f"a {what} {shape}", f"{tuple(value.shape)}", "`expand`")
            expect(not value.requires_grad, f"a {what} that is detached", "one with a gradient", "`expand`: `detach()`")
        pre = made["inputs"][:, layer] @ made["rows"][layer].T + made["bias"][layer]
        what = f"x · matrixᵀ + bias of layer {layer} to be its pre-activations"
        same(x[:, layer] @ matrix.to(x.dtype).T + bias, pre, what, "`expand`: all that `inputs` does to x", ROUNDING)


@check("encoder")
def fresh(bench: Bench) -> None:
    """When a parameter changes in place, as an optimizer changes it, something of what the encoder gives changes too.

    So does `rows` when the decoder changes in what `expand` reads of it.
    """
    transcoder, x = _parts(bench).transcoder, bench.batch(torch.float64).inputs
    assert isinstance(transcoder.encoder, torch.nn.Module)
    look = "a tensor that is kept from an earlier call, or a parameter that nothing reads"
    for name, p in transcoder.encoder.named_parameters():
        before = {part: value.detach().clone() for part, value in _form(transcoder, x).items()}
        stir(torch.nn.ParameterList([p]), seed=8)
        after = _form(transcoder, x)
        expected = f"`inputs`, `rows` or `bias` to change with {name}"
        expect(any(not torch.equal(after[part], before[part]) for part in FORM), expected, "all as before", look)
    matrix, rows = _matrix(transcoder), transcoder.encoder.rows(transcoder.tying).detach().clone()
    assert isinstance(transcoder.tying, torch.nn.Module)
    stir(transcoder.tying, seed=8)
    other = _matrix(transcoder)
    if matrix is not None and other is not None and not torch.equal(matrix, other):
        changed = not torch.equal(rows, transcoder.encoder.rows(transcoder.tying))
        expect(changed, "`rows` to change with the decoder, as `expand` does", "`rows` as before", look)


def _matrix(transcoder: CrossLayerTranscoder) -> Tensor | None:
    """A copy of what `expand` gives for the first layer; None where it refuses."""
    try:
        return transcoder.encoder.expand(0, transcoder.tying)[0].clone()
    except Refused:
        return None
