"""Losses that run the language model, against finite differences, the evaluation, and one process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from clt_plugins import run
from clt_plugins.errors import Faults
from clt_plugins.model.assemble import Parts
from clt_plugins.model.in_model.passes import check_losses, run_model
from clt_plugins.training.plan.build import plan
from clt_stages.in_model import evaluate_in_model
from clt_synthetic.source import Synthetic
from tests.support.helpers import ACTIVATIONS, ENCODERS, TYINGS, parts, plugins, recipe, stir, tables
from tests.support.language_models import save_model, save_text
from tests.support.streams import build

ROOT = Path(__file__).resolve().parents[3]
KL = {"name": "kl", "weight": 1.0, "contexts": 3}
CE = {"name": "ce", "weight": 1.0, "contexts": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("gpt2", "llama"):
        save_model(folder / family, family)
    save_text(folder / "text.jsonl", 200)
    return folder


def stream(folder: Path, family: str = "gpt2", **changes: Any) -> Parts:
    source = {"name": "stream", "text": str(folder / "text.jsonl"), "context": 24, "held_out": 0.3, "model_batch": 4}
    settings = {"features": 16, **changes.pop("transcoder", {})}
    found = parts(
        model={"path": str(folder / family)},
        source={**source, "buffer_tokens": 64, **changes.pop("source", {})},
        transcoder=settings,
        normalisation={"name": "none"},
        train={"batch_tokens": 32},
        **{"losses": [{"name": "mse"}, KL], **changes},
    )
    stir(found.transcoder)
    return found


def loss_of(found: Parts, text: Any) -> torch.Tensor:
    made = run_model(found.transcoder, found.source.trainable_model(), text)
    forward: Any = attrs.make_class("Only", ["model"])(made)
    return found.losses[-1](forward)


def in_float64(model: torch.nn.Module) -> None:
    """All of a model in float64, its normalisations too, which transformers computes in float32."""
    model.double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            exact = lambda x, m=module: m.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()  # noqa: E731
            module.forward = exact  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("family", "activation", "tying", "encoder", "loss"),
    [
        ("gpt2", "relu", "untied-skip", "plain", KL),
        ("gpt2", "topk", "per_target-affine", "low_rank", KL),
        ("gpt2", "batchtopk-norm", "per_source", "tied", CE),
        ("llama", "batchtopk", "untied", "plain", KL),
        ("llama", "jumprelu", "untied", "plain", CE),
    ],
)
def test_its_gradient_is_the_derivative(folder, family, activation, tying, encoder, loss):
    """Central differences in float64 along a random direction of all parameters; thresholds have no derivative."""
    found = stream(
        folder, family, losses=[loss], activation=ACTIVATIONS[activation], tying=TYINGS[tying],
        encoder=ENCODERS[encoder], transcoder={"dtype": "float64"}, kernels={"name": "torch"},
    )  # fmt: skip
    in_float64(found.source.model)
    text, _ = found.source.training_text(3, None)
    (value,) = loss_of(found, text).values()
    value.backward()
    numbers = torch.Generator().manual_seed(0)
    parameters = {name: p for name, p in found.transcoder.named_parameters() if "threshold" not in name}
    directions = {n: torch.randn(p.shape, generator=numbers, dtype=torch.float64) for n, p in parameters.items()}
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for name, parameter in parameters.items():
                parameter.add_(directions[name], alpha=step)
            ends.append(float(*loss_of(found, text).values()))
    numerical = (ends[0] - ends[1]) / 2e-6
    parts_of = {name: float((p.grad * directions[name]).sum()) for name, p in parameters.items()}  # type: ignore[operator]
    assert min(map(abs, parts_of.values())) > 1e-4, "every parameter takes part"
    # The parts of parameters may cancel.
    assert sum(parts_of.values()) == pytest.approx(numerical, rel=1e-6, abs=1e-7 * max(map(abs, parts_of.values())))
    assert all(p.grad is None for p in found.source.model.parameters())


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_its_value_is_that_of_an_evaluation(folder, activation):
    """On the same text; on one context where features are selected over a batch."""
    found = stream(folder, losses=[KL, CE], activation=ACTIVATIONS[activation])
    found.transcoder.train()
    model = found.source.trainable_model()
    text, _ = found.source.training_text(1 if activation == "batchtopk" else 3, None)
    made = run_model(found.transcoder, model, text)
    forward: Any = attrs.make_class("Only", ["model"])(made)
    terms = {name: float(value.detach()) for loss in found.losses for name, value in loss(forward).items()}
    assert found.transcoder.activation.training, "as it was"
    model.held_out = lambda tokens: iter([text])
    found.transcoder.eval()
    report = evaluate_in_model(found.transcoder, model, 1000, torch.zeros(3, 32))
    assert report.tokens == len(made.next_tokens)
    assert terms["kl"] == pytest.approx(report.kl.transcoder, rel=1e-4)
    assert terms["ce"] == pytest.approx(report.cross_entropy.transcoder, rel=1e-4)


def test_a_selection_within_contexts_does_not_see_its_neighbours(folder):
    """BatchTopK on three contexts at once is BatchTopK on each of them."""
    found = stream(folder, activation={"name": "batchtopk", "k": 5, "anneal_from": 3, "anneal_over": 1.0})
    found.transcoder.train()
    found.transcoder.activation.schedule(0.0)
    model = found.source.trainable_model()
    whole, _ = found.source.training_text(3, None)
    together = run_model(found.transcoder, model, whole)
    alone, position = [], None
    for _ in range(3):
        text, position = found.source.training_text(1, position)
        alone.append(run_model(found.transcoder, model, text).logits)
    assert torch.allclose(together.logits, torch.cat(alone), atol=1e-4)
    found.transcoder.activation.schedule(1.0)
    last = run_model(found.transcoder, model, whole)
    assert torch.equal(last.logits, together.logits), "k does not follow the schedule"


def test_texts_are_training_contexts_in_order_and_disturb_no_batch(folder):
    one, two = (stream(folder).source for _ in range(2))
    read, position = [], None
    for _ in range(6):
        text, position = one.training_text(3, json.loads(json.dumps(position)))
        read.append(text)
        first, second = one.next(), two.next()
        assert torch.equal(first.inputs, second.inputs) and torch.equal(first.token_ids, second.token_ids)
    assert one.state() == two.state()
    packer = two._packer(held_out=False, contexts=3)
    for text in read:
        fresh = packer.next()
        for name in ("ids", "rows", "position_ids"):
            assert torch.equal(getattr(text, name), getattr(fresh, name))


@pytest.mark.parametrize("pack", [True, False])
def test_ranks_share_the_contexts_of_one_process(folder, pack):
    def pieces(text: Any) -> list[tuple[int, ...]]:
        """The positions of each context that count, by their tokens."""
        width = text.ids.shape[1]
        kept = torch.zeros(text.ids.numel(), dtype=torch.bool)
        kept[text.rows] = True
        rows = zip(text.ids, kept.view(-1, width), strict=True)
        return [tuple(ids[keep].tolist()) for ids, keep in rows]

    model, text = folder / "gpt2", folder / "text.jsonl"
    whole = build(model, text, pack=pack)
    first, position = whole.training_text(5, None)
    wanted = pieces(first) + pieces(whole.training_text(4, position)[0])
    for ranks in (2, 3):
        sources = [
            build(model, text, {"rank": rank, "ranks": ranks, "batch_tokens": 96}, pack=pack) for rank in range(ranks)
        ]
        begun = [source.training_text(5, None) for source in sources]
        assert all(at == position for _, at in begun)
        first = [pieces(part) for part, _ in begun]
        second = [pieces(source.training_text(4, position)[0]) for source in sources]
        found = [one for part in (*first, *second) for one in part]
        assert sorted(found) == sorted(wanted)
        assert [len(part) for part in first] == [-(-(5 - rank) // ranks) for rank in range(ranks)]


def run_tables(folder: Path, **changes: Any) -> dict[str, Any]:
    source = {"name": "stream", "text": str(folder / "text.jsonl"), "context": 24, "held_out": 0.3, "model_batch": 4}
    return tables(
        model={"path": str(folder / "gpt2")},
        source={**source, "buffer_tokens": 64},
        transcoder={"features": 24},
        train={"batch_tokens": 32, "eval_tokens": 40, "steps": 8, "clip_norm": 0.5},
        loggers=[{"name": "jsonl"}],
        **changes,
    )


def logged(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("transforms", [[], [{"name": "subsample", "share": 0.6}]])
def test_a_run_resumes_bit_for_bit(folder, tmp_path, transforms):
    losses = [{"name": "mse"}, {**KL, "every": 2}, {**CE, "contexts": 2, "start": 0.5}]
    settings = run_tables(folder, losses=losses, transforms=transforms)
    run(settings, out=tmp_path / "whole")
    run(settings, out=tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_000008")
    run(settings, out=tmp_path / "parts", resume="step_000004")
    names = ("transcoder/transcoder.safetensors", "checkpoints/step_000008/training.safetensors")
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    assert set(logged(tmp_path / "whole", "loss/kl")) == {4, 8}
    assert set(logged(tmp_path / "whole", "loss/ce")) == {8}


def test_losses_that_never_act_leave_the_weights_as_they_are(folder, tmp_path):
    plain = run(run_tables(folder), out=tmp_path / "plain")
    late = [{"name": "mse"}, {**KL, "start": 0.999}, {**CE, "weight": 0.0}]
    found = run(run_tables(folder, losses=late), out=tmp_path / "late")
    for name, value in plain.tensors().items():
        assert torch.equal(value, found.tensors()[name]), name


def test_a_source_that_cannot_is_refused_by_name(tmp_path, monkeypatch):
    class Plain:
        """The same rows without a model."""

        def __init__(self, *arguments: Any):
            inner = Synthetic(*arguments)
            for name in ("n_layers", "d_model", "next", "held_out", "statistics", "state", "load_state"):
                setattr(self, name, getattr(inner, name))

    monkeypatch.setattr("clt_synthetic.source.Synthetic", Plain)
    with pytest.raises(Faults, match=r"losses\[1\].name: 'kl' runs the language model in training, which the source "):
        run(tables(losses=[{"name": "mse"}, KL]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fewer_contexts_than_data_ranks_are_refused():
    found = recipe(losses=[{"name": "mse"}, KL])
    built = parts(losses=[{"name": "mse"}, KL])
    check_losses(found, built.losses, built.source, 3)
    with pytest.raises(Faults, match=r"losses\[1\].contexts: 3 cannot be divided among 4 data ranks"):
        check_losses(found, built.losses, built.source, 4)


def test_a_plan_counts_what_the_backward_pass_keeps():
    """All tensors that autograd saves in the model's pass and the loss, each storage once, against the plan's part."""
    settings: dict[str, Any] = {
        "model": {"path": str(ROOT / "examples" / "models" / "stdlib-gpt2")},
        "source": {"name": "stream", "context": 64, "buffer_tokens": 256, "model_batch": 4},
        "transcoder": {"features": 64},
        "losses": [{"name": "mse"}, {**KL, "contexts": 2}],
        "train": {"batch_tokens": 64},
    }
    found = parts(**settings)
    weights = {p.data_ptr() for module in (found.transcoder, found.source.model) for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    text, _ = found.source.training_text(2, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        (value,) = loss_of(found, text).values()
    value.backward()
    saved = sum(size for place, size in kept.items() if place not in weights)
    planned = plan(recipe(**settings), plugins()).bytes.in_model
    assert saved <= planned <= 3 * saved
    without = {**settings, "losses": [{"name": "mse"}]}
    assert plan(recipe(**without), plugins()).bytes.in_model == 0
