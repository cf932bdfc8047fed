"""`rowwise_adam` number by number; `muon` and `adafactor` against torch's own on single matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from clt_plugins.training.optimizers.make import make_optimizer
from clt_plugins.training.optimizers.rate import set_rate
from tests.support.helpers import parts, recipe

STEPS = 4


def trained(name: str, gradients: Any = None, **settings: Any) -> tuple[Any, dict[str, torch.Tensor], list[dict]]:
    """A transcoder after some steps at 0.01, 0.02, ...; its first values, and the gradients of each step."""
    transcoder: Any = parts(transcoder={"dtype": "float64"}, tying={"name": "untied", "skip": True}).transcoder
    optimizer = make_optimizer(transcoder, recipe(optimizer={"name": name, **settings}))
    named = dict(transcoder.named_parameters())
    numbers = torch.Generator().manual_seed(1)
    first = {key: p.detach().clone() for key, p in named.items()}
    drawn = []
    for step in range(STEPS):
        drawn.append({key: torch.randn(p.shape, generator=numbers, dtype=torch.float64) for key, p in named.items()})
        for key, p in named.items():
            p.grad = drawn[-1][key].clone()
        set_rate(optimizer, 0.01 * (step + 1))
        optimizer.step()
    return transcoder, first, drawn


@pytest.mark.parametrize(("key", "row"), [("encoder.W_enc", (1, 2)), ("tying.weight", (7,)), ("tying.skip", (2, 4))])
def test_rowwise_adam_moves_a_row_as_its_formula_says(key: str, row: tuple[int, ...]) -> None:
    b1, b2, eps, decay = 0.8, 0.9, 1e-3, 0.3
    transcoder, first, drawn = trained("rowwise_adam", betas=[b1, b2], eps=eps, weight_decay=decay)
    w = first[key][row].tolist()
    m, v = [0.0] * len(w), 0.0
    for t, gradients in enumerate(drawn, start=1):
        g, lr = gradients[key][row].tolist(), 0.01 * t
        m = [b1 * m_i + (1 - b1) * g_i for m_i, g_i in zip(m, g, strict=True)]
        v = b2 * v + (1 - b2) * sum(g_i * g_i for g_i in g) / len(g)
        size = math.sqrt(v / (1 - b2**t)) + eps
        w = [w_i - lr * decay * w_i - lr * (m_i / (1 - b1**t)) / size for w_i, m_i in zip(w, m, strict=True)]
    assert dict(transcoder.named_parameters())[key][row].tolist() == pytest.approx(w, rel=1e-12)


def test_rowwise_adam_moves_a_bias_like_adam() -> None:
    row, adam = (trained(name)[0] for name in ("rowwise_adam", "adam"))
    torch.testing.assert_close(row.b_enc, adam.b_enc, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(row.W_enc, adam.W_enc)


def matrices(key: str, x: torch.Tensor, transcoder: Any) -> list[torch.Tensor]:
    """The matrices that Muon should see: a layer's [F, D]; of an untied decoder one for each pair of layers."""
    if key != "tying.weight":
        return list(x)
    found = []
    for source in range(3):
        rows = transcoder.tying._rows(x, source)  # [F, 3 - source, D]
        found += [rows[:, target] for target in range(3 - source)]
    return found


@pytest.mark.parametrize("settings", [{}, {"adjust_lr": "original", "nesterov": False, "weight_decay": 0.2}])
def test_muon_moves_every_layers_matrix_as_torchs_own_does_alone(settings: dict[str, Any]) -> None:
    transcoder, first, drawn = trained("muon", **settings)
    for key in ("encoder.W_enc", "tying.weight", "tying.skip"):
        last = matrices(key, dict(transcoder.named_parameters())[key].detach(), transcoder)
        begun = matrices(key, first[key], transcoder)
        for number, (start, end) in enumerate(zip(begun, last, strict=True)):
            alone = torch.nn.Parameter(start.clone().contiguous())
            optimizer = torch.optim.Muon(
                [alone],
                weight_decay=settings.get("weight_decay", 0.0),
                nesterov=settings.get("nesterov", True),
                adjust_lr_fn=settings.get("adjust_lr", "match_rms_adamw"),
            )
            for step, gradients in enumerate(drawn):
                alone.grad = matrices(key, gradients[key], transcoder)[number].clone().contiguous()
                optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
                optimizer.step()
            torch.testing.assert_close(end, alone.detach(), rtol=1e-6, atol=1e-8, msg=f"{key} {number}")


def test_muon_moves_all_else_as_adamw_does() -> None:
    settings = {"weight_decay": 0.1, "roles": {"bias": {"weight_decay": 0.3}}}
    muon, adamw = (trained(name, **settings)[0] for name in ("muon", "adamw"))
    for key in ("encoder.b_enc", "tying.b_dec"):
        one, other = (dict(model.named_parameters())[key] for model in (muon, adamw))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_adafactor_is_torchs() -> None:
    transcoder, first, drawn = trained("adafactor", weight_decay=0.1, beta2_decay=-0.7, eps=1e-2, clip=1.5)
    for key, p in transcoder.named_parameters():
        alone = torch.nn.Parameter(first[key].clone())
        decay = 0.1 if p.shape[-1] == 6 and key not in ("tying.b_dec",) else 0.0
        optimizer = torch.optim.Adafactor([alone], beta2_decay=-0.7, eps=(None, 1e-2), d=1.5, weight_decay=decay)
        for step, gradients in enumerate(drawn):
            alone.grad = gradients[key].clone()
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            optimizer.step()
        torch.testing.assert_close(p.detach(), alone.detach(), rtol=1e-12, atol=1e-14, msg=key)
