"""Adam for bfloat16: right on average, and the same bits whatever the cut, the ranks and the order.

`test_update_rules` holds the formulas; the conformance kit holds kernels to the reference.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch import nn

from clt_optimizers.bf16 import AdamBF16
from clt_plugins import Faults, Piece, run
from clt_plugins.files.folders import read_tensors
from clt_plugins.model.devices import make_kernels
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing.adam_update import FORMS, PLACES, assert_nan_stays, example
from clt_plugins.training.optimizers import reference
from clt_plugins.training.optimizers.make import build_optimizer, make_optimizer, weights_of
from clt_plugins.training.plan.build import plan
from tests.support.helpers import parts, plugins, recipe, tables

BF16 = {"dtype": "bfloat16"}
CHOICES = {
    "bf16 states": {"optimizer": {"name": "adam", "states": "bf16"}},
    "stochastic": {"transcoder": BF16},
    "stochastic, bf16 states": {
        "transcoder": BF16,
        "optimizer": {"name": "adam", "states": "bf16", "bf16_weights": "stochastic"},
    },
    "split": {"transcoder": BF16, "optimizer": {"name": "adam", "bf16_weights": "split"}},
    "split, bf16 states": {
        "transcoder": BF16,
        "optimizer": {"name": "adam", "states": "bf16", "bf16_weights": "split"},
    },
}


def adam(parameters: list[nn.Parameter], **settings) -> AdamBF16:
    flat = [p for each in parameters for p in (each["params"] if isinstance(each, dict) else [each])]
    pieces = {p: [Piece(str(number), number)] for number, p in enumerate(flat)}
    own = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "decoupled": False, "pieces": pieces}
    return AdamBF16(parameters, **{**own, **settings})


def test_small_updates_move_weights_on_average() -> None:
    """10,000 times 1e-5, a four-hundredth of what bfloat16 keeps at 1: together 0.1."""
    start = example("bfloat16 weights and moments", next(iter(PLACES)))
    shape = (16, 64)
    update = attrs.evolve(
        start,
        weight=torch.full(shape, 1.0, dtype=torch.bfloat16),
        grad=torch.ones(shape, dtype=torch.bfloat16),
        mean=torch.ones(shape, dtype=torch.bfloat16),
        square=torch.ones(shape, dtype=torch.bfloat16),
        grad_squares=None,
        # The moments stay 1, so that each step is 1e-5.
        scalars=torch.tensor([1.0, 1e-5, 1.0, 0.0, 0.0]),
        period=16,
    )
    kernels = make_kernels("numba", torch.device("cpu"), load_plugins())
    for _ in range(10_000):
        update.scalars[4] += 1
        kernels.update_rows(update)
    moved = 1 - update.weight.double()
    # A weight below 1 jumps by 2^-8 with a chance of 1e-5 / 2^-8: after 10,000 steps its variance is 0.1 * 2^-8.
    deviation = (0.1 * 2**-8 / moved.numel()) ** 0.5
    assert abs(float(moved.mean()) - 0.1) < 4 * deviation
    assert moved.std() == pytest.approx((0.1 * 2**-8) ** 0.5, rel=0.15), "each weight draws for itself"


def test_rounded_to_the_nearest_they_do_not() -> None:
    weight = nn.Parameter(torch.full((64,), 1.0, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.Adam([weight], lr=1e-5, fused=True)
    for _ in range(100):
        optimizer.step()
    assert bool((weight == 1).all())


@pytest.mark.parametrize("decoupled", [False, True])
def test_split_weights_are_float32_ones(decoupled: bool) -> None:
    numbers = torch.Generator().manual_seed(0)
    start = torch.randn(5, 33, generator=numbers).bfloat16()
    split, whole = nn.Parameter(start.clone()), nn.Parameter(start.float())
    groups = [{"params": [split], "weight_decay": 0.1}]
    ours = adam(groups, split=True, moments=torch.float32, decoupled=decoupled)  # type: ignore[arg-type]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind([whole], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for _ in range(50):
        split.grad = torch.randn(split.shape, generator=numbers).bfloat16()
        whole.grad = split.grad.float()
        ours.step()
        theirs.step()
    master = reference.joined(split.detach(), ours.state[split]["low"])
    # Fifty steps of 0.01 whose last digits differ: each by at most 2^-23 of the step or of the weight.
    torch.testing.assert_close(master, whole.detach(), rtol=0, atol=50 * 4 * 2**-23)
    assert torch.equal(split.detach(), master.bfloat16()), "products read the nearest bfloat16"


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_a_number_stays_none_whatever_its_bits(form: str) -> None:
    """0x7FFFFFFF, a GPU's own, was rounded to -0: the guard, which on a GPU looks at some steps only, saw zeros."""
    assert_nan_stays(SimpleNamespace(name="reference", update_rows=reference.update_rows), form)


@pytest.mark.parametrize("form", FORMS)
def test_bits_do_not_depend_on_how_the_work_is_cut(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in PLACES:
        results = []
        for size in (17, 260, 2**20):
            monkeypatch.setattr(reference, "ON_CPU", size)
            results.append(example(form, place))
            reference.update_rows(results[-1])
        for name in ("weight", "mean", "square"):
            first, *others = (getattr(one, name) for one in results)
            # torch's own loops may round a square root otherwise in a vector and at its end: never seen in bfloat16.
            exact = 0.0 if first.dtype == torch.bfloat16 else 1e-6
            for other in others:
                torch.testing.assert_close(other, first, rtol=exact, atol=exact)


def steps(parameters: dict[str, nn.Parameter], grads: dict[str, torch.Tensor], own: range, count: int = 3) -> AdamBF16:
    """Updates of a rank's parameters: `a` [2, F, 3] and `b` [2, F]."""
    pieces = {p: [Piece(name, ord(name), axis=1, own=own, features=10)] for name, p in parameters.items()}
    optimizer = adam(list(parameters.values()), pieces=pieces)
    for _ in range(count):
        for name, p in parameters.items():
            p.grad = grads[name][:, own.start : own.stop].clone()
        optimizer.step()
    return optimizer


def test_several_uneven_ranks_round_like_one_process_in_any_order() -> None:
    numbers = torch.Generator().manual_seed(0)
    shapes = {"a": (2, 10, 3), "b": (2, 10)}
    start = {name: torch.randn(shape, generator=numbers).bfloat16() for name, shape in shapes.items()}
    grads = {name: torch.randn(shape, generator=numbers).bfloat16() for name, shape in shapes.items()}

    def ended(own: range, order: list[str]) -> dict[str, torch.Tensor]:
        parameters = {name: nn.Parameter(start[name][:, own.start : own.stop].clone()) for name in order}
        optimizer = steps(parameters, grads, own)
        state = {f"{name}/{key}": optimizer.state[p][key] for name, p in parameters.items() for key in KEPT}
        return state | {name: p.detach() for name, p in parameters.items()}

    KEPT = ("exp_avg", "exp_avg_sq")
    whole = ended(range(10), ["a", "b"])
    ranks = [ended(own, ["b", "a"]) for own in (range(4), range(4, 5), range(5, 10))]
    for name, value in whole.items():
        assert torch.equal(torch.cat([rank[name] for rank in ranks], 1), value), name
    other = steps({"a": (p := nn.Parameter(start["a"].clone()))}, grads, range(10), 2)
    assert not torch.equal(p.detach(), whole["a"]) and other.state[p]["step"] == 2


def test_the_pieces_of_an_untied_decoder_are_numbered_over_all_ranks() -> None:
    """The rows of a layer follow each other on a rank; in the complete decoder other ranks' lie between."""
    built = parts()
    optimizer = make_optimizer(built.transcoder, recipe(**CHOICES["bf16 states"]))
    assert isinstance(optimizer, AdamBF16)
    names = [one.name for one in optimizer.pieces[built.transcoder.tying.weight]]  # type: ignore[index, union-attr]
    assert names == ["W_dec.00", "W_dec.01", "W_dec.02"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(choice: str, tmp_path: Path) -> None:
    changes = CHOICES[choice]
    train = {"eval_every": 100, "log_every": 100, **changes.get("train", {})}
    chosen = tables(**{**changes, "train": {**train, "steps": 8, "schedule_steps": 8}})
    whole = run(chosen, out=tmp_path / "whole", plugins=plugins())
    run(chosen, out=tmp_path / "again", plugins=plugins())
    for later in (tmp_path / "again" / "checkpoints").glob("step_000008"):
        later.rename(tmp_path / "gone")
    resumed = run(chosen, out=tmp_path / "again", resume="step_000004", plugins=plugins())
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    saved = read_tensors(tmp_path / "whole" / "checkpoints" / "step_000008" / "training.safetensors")
    halves = {name.partition("/")[2] for name, value in saved.items() if value.dtype == torch.int16}
    assert halves == ({*whole.views()} if choice.startswith("split") else set()), "cut like the parameters"
    kind = "bfloat16" if changes.get("transcoder") else "float32"
    assert str(resumed.W_enc.dtype) == f"torch.{kind}"


def test_bytes_of_each_choice() -> None:
    for choice, number in zip(CHOICES, (4, 8, 4, 10, 6), strict=True):
        chosen = recipe(**CHOICES[choice])
        needs = plan(chosen, plugins())
        assert needs.bytes.optimizer == number * needs.parameters, choice
        assert needs.bytes.parameters == (2 if "transcoder" in CHOICES[choice] else 4) * needs.parameters
        built = parts(**CHOICES[choice])
        optimizer = make_optimizer(built.transcoder, chosen)
        kept = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        assert sum(x.numel() * x.element_size() for x in kept) == number * needs.parameters, choice
        said = map(build_optimizer(built.transcoder, chosen).state_bytes, weights_of(built.transcoder))
        assert sum(said) == number * needs.parameters


def test_a_choice_for_bfloat16_weights_is_refused_for_others() -> None:
    with pytest.raises(
        Faults, match=r"optimizer\.bf16_weights: weights are float32: leave it out, or set transcoder\."
    ):
        recipe(optimizer={"name": "adam", "bf16_weights": "split"})
