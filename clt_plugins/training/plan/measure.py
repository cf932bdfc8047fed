"""What this machine does in a second, measured in a few: a copy, a matrix product, and a training step of the recipe.

The step has the recipe's layers, width, activation, tying and losses, and fewer features and tokens where those would
take long. Its parts then scale with their work (`times`).

Shapes: B tokens, L layers, D d_model, F features per layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from clt_plugins.contract.model.activation import Scheduled
from clt_plugins.data.batch import Batch
from clt_plugins.distributed.single import Single
from clt_plugins.model.assemble import assemble_around, make_context
from clt_plugins.model.encoder import encode_selected
from clt_plugins.model.products.matrix import affine
from clt_plugins.model.sparse import reuse_gradients
from clt_plugins.training.objective import objective
from clt_plugins.training.optimizers.make import is_matrix, make_optimizer
from clt_plugins.training.plan.machines import CONTEXT_BYTES, PCIE, Rates
from clt_plugins.training.plan.work import Sizes, Work, work

if TYPE_CHECKING:
    from clt_plugins.contract.recipe import Recipe
    from clt_plugins.model.assemble import Parts

NUMBERS = 2**24
"""Pre-activations of a layer, and weights of all, up to which the step is not scaled down on a CPU."""
REPEATS = 3


def measure(recipe: Recipe, n_layers: int, d_model: int) -> Rates:
    """The rates of this machine for a recipe; takes some seconds.

    Raises:
        Refused: the recipe's device is not here.
    """
    small = _scaled(recipe, n_layers, d_model)
    parts = assemble_around(Sizes(n_layers, d_model), make_context(small, parallel=Single()))
    device = parts.context.device
    memory, products = _copy(device), _products(device)
    if parts.transcoder.runs_dense:
        # Products are all that counts then.
        return _rates(device, "a copy and a product", memory, products)
    seconds, done = _step(parts, small)
    # Gradient rows without pairs are written too; Adam's share is known by its bytes.
    zeroed = done.rows * d_model * done.weight_bytes / memory
    gradients = max(seconds["backward"] - zeroed, 0.1 * seconds["backward"])
    numbers = done.visits * d_model
    return _rates(
        device,
        f"{small.transcoder.features} features per layer, {small.train.batch_tokens} tokens a step",
        memory=(3 * done.parameters * done.weight_bytes + 2 * done.state_bytes) / seconds["optimizer"],
        products=products | {done.product: _flops(done) / seconds["product"]},
        numbers=done.tokens * n_layers * done.n_features / seconds["selection"],
        decoded=numbers / seconds["decode"],
        differentiated=(numbers + done.pairs * done.row_size) / gradients,
        touched=done.rows / zeroed,
    )


def _rates(device: torch.device, what: str, memory: float, products: dict[str, float], **step: float) -> Rates:
    """Rates; what was not measured counts as free."""
    free = dict.fromkeys(("numbers", "decoded", "differentiated", "touched"), float("inf"))
    return Rates(
        name=_name(device),
        basis=f"measured here: {what}",
        memory=memory,
        products=products,
        **free | step,
        copied=PCIE if device.type != "cpu" else float("inf"),
        link=float("inf"),
        capacity=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        context=CONTEXT_BYTES if device.type == "cuda" else 0,
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"this machine's CPU, {torch.get_num_threads()} threads"


def _flops(done: Work) -> float:
    return 2 * done.tokens * done.n_layers * done.n_features * done.row_size


def _scaled(recipe: Recipe, n_layers: int, d_model: int) -> Recipe:
    """The recipe with as many features and tokens as a CPU does in a moment."""
    tokens, features = recipe.train.batch_tokens, recipe.transcoder.features
    weights = n_layers * d_model * (1 + (n_layers + 1) / 2)
    features = max(min(features, 256), min(features, int(NUMBERS / weights)))
    tokens = max(min(tokens, 64), min(tokens, NUMBERS // (n_layers * features)))
    return attrs.evolve(
        recipe,
        transcoder=attrs.evolve(recipe.transcoder, features=features),
        train=attrs.evolve(recipe.train, batch_tokens=tokens),
    )


def _copy(device: torch.device) -> float:
    """Bytes read and written per second by a copy."""
    x = torch.ones(2**25, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / _median(lambda: y.copy_(x), device)


def _products(device: torch.device) -> dict[str, float]:
    """Operations per second of a product, in float32 and bfloat16."""
    size = 512 if device.type == "cpu" else 8192
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(size, size, device=device).to(dtype)
        product = partial(affine, x, x, torch.zeros(size, device=device, dtype=dtype))
        out[str(dtype).removeprefix("torch.")] = 2 * size**3 / _median(product, device)
    return out


def _step(parts: Parts, recipe: Recipe) -> tuple[dict[str, float], Work]:
    """Seconds of the parts of a training step, and what it did."""
    transcoder, context = parts.transcoder, parts.context
    device = context.device
    generator = torch.Generator().manual_seed(0)
    shape = recipe.train.batch_tokens, context.n_layers, context.d_model
    draws = [torch.randn(shape, generator=generator).to(device) for _ in range(2)]
    batch = Batch(*draws)
    idle = torch.zeros(context.n_layers, recipe.transcoder.features, dtype=torch.int64, device=device)
    if isinstance(transcoder.activation, Scheduled):
        transcoder.activation.schedule(0.5)
    transcoder.settle(0.0)  # what is dense at first is measured as it is later
    reuse_gradients(p for p in transcoder.parameters() if is_matrix(p, context.d_model))
    optimizer = make_optimizer(transcoder, recipe)
    done = work(parts, recipe, progress=0.5)
    x = transcoder.normaliser.inputs(batch.inputs)
    h, weight, bias = (one.detach() for one in transcoder.affine_form(x))

    def product() -> None:
        for layer in range(context.n_layers):
            affine(h[:, layer], weight[layer], bias[layer], transcoder.product)

    def encode() -> None:
        selection = transcoder.activation.selection(len(h), transcoder.tying.norms)
        encode_selected(h, weight, bias, [selection], context.kernels, transcoder.product)

    outcome: Any = None

    def forward() -> None:
        nonlocal outcome
        optimizer.zero_grad(set_to_none=True)
        outcome = objective(transcoder, parts.losses, batch, idle, 0.5)

    seconds: dict[str, list[float]] = {}
    for turn in range(REPEATS + 1):
        for name, function in (
            ("product", product),
            ("encode", encode),
            ("forward", forward),
            ("backward", lambda: outcome.total.backward()),
            ("optimizer", lambda: optimizer.step()),
        ):
            taken = _seconds(function, device)
            if turn:  # the first compiles
                seconds.setdefault(name, []).append(taken)
    out = {name: statistics.median(each) for name, each in seconds.items()}
    floor = 0.02 * out["forward"]  # differences of measurements may come out negative
    done = attrs.evolve(done, pairs=_pairs(outcome, done.pairs))
    out["selection"] = max(out["encode"] - out["product"], floor)
    out["decode"] = max(out["forward"] - out["encode"], floor)
    return out, done


def _pairs(outcome: Any, otherwise: int) -> int:
    """How many pairs were active; most of a batch of noise is above no threshold."""
    pairs = outcome.features.pairs
    return otherwise if pairs is None else max(1, len(pairs.token))


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _median(function: Callable[[], object], device: torch.device) -> float:
    function()
    return statistics.median(_seconds(function, device) for _ in range(REPEATS))
