"""Transforms and metrics that are wrong in one way each: the kit finds the fault. Without it they conform."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from clt_plugins.testing import Case
from tests.support.kit_says import by_check, failures_of, installed

if TYPE_CHECKING:
    from tests.conftest import Distributions

TRANSFORM = '''
import random
import torch
from attrs import frozen
from clt_plugins import Batch, Spec, generator, hookimpl

@frozen(kw_only=True)
class Config:
    """One to be checked."""

class Transform:
    held_out, drops = FLAGS

    def __init__(self, context):
        self.context, self.seed, self.calls = context, context.seed, 0
        self.draws = generator(self.seed, "mine")

    def __call__(self, batch, number):
        inputs, targets, ids, positions = batch.inputs, batch.targets, batch.token_ids, batch.positions
        self.calls += 1
        BODY
        return Batch(inputs, targets, ids, positions)
MORE
@hookimpl
def clt_transforms():
    return [Spec("mine", Config, lambda config, context: Transform(context))]
'''

STATEFUL = """
    def state(self):
        return self.calls

    def load_state(self, state):
        self.calls = state

"""

REPEAT = """
def repeat(inputs, ids, positions):
    # The token before it in its context is the same one.
    before = positions - torch.tensor([0, 1])
    return ((positions[:, None] == before[None]).all(2) & (ids[:, None] == ids)).any(0)

def large(inputs, ids, positions):
    return inputs.flatten(1).norm(dim=1) > 50
"""

METRIC = '''
import torch
from attrs import frozen
from clt_plugins import Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """One to be checked."""

class Metric:
    caches = ("sums", "transcoder")

    def __init__(self, context):
        self.parallel, self.tokens, self.sums, self.transcoder = context.parallel, 0, 0.0, None

    def step(self, step):
        self.transcoder = step.transcoder
        parallel, tokens = self.parallel, self.parallel.data_ranks * len(step.targets)
        size = step.features.values.sum()
        size = parallel.total(size, over="all") / tokens
        STEP
        return {"train/size": size}

    def held_out(self):
        self.tokens, self.sums = 0, 0.0
        return self

    def add(self, batch, features, reconstruction):
        self.tokens += batch.tokens
        self.sums = self.sums + features.values.double().sum()

    def result(self, scores):
        size = self.parallel.total(torch.as_tensor(self.sums), over="all") / scores.tokens
        RESULT
        return {"size": float(size)}

@hookimpl
def clt_metrics():
    return [Spec("mine", Config, lambda config, context: Metric(context))]
'''


@pytest.fixture
def failures(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """What the kit says of a plugin, by check."""

    def run(source: str, only: str = "", **replaced: str) -> dict[str, str]:
        def wanted(case: Case) -> bool:
            basic = case.check in ("config", "default")
            return case.slot in ("transforms", "metrics") and not basic and only in case.check

        return by_check(failures_of(installed(distributions, source, **replaced), wanted))

    return run


DROP = (
    "keep = positions[:, 1] > 1; inputs, targets, ids, positions = (x[keep] for x in (inputs, targets, ids, positions))"
)
DRAW = """rank, ranks, rows = self.context.parallel.data_rank, self.context.parallel.data_ranks, len(inputs)
        drawn = torch.randn(ranks * rows, 1, 1, generator=generator(self.seed, "mine", number))
        inputs = inputs + 0.1 * drawn[rank * rows : (rank + 1) * rows]"""


@pytest.mark.parametrize(
    ("flags", "body", "more"),
    [
        ("False, False", "inputs = inputs.clamp(-2, 2)", ""),
        ("True, True", DROP, ""),
        ("True, False", DRAW, ""),
        ("False, False", "self.calls -= number < 0; inputs = inputs * (1 + self.calls / 9)", STATEFUL),
    ],
)
def test_transforms_without_a_fault(failures: Any, flags: str, body: str, more: str) -> None:
    assert failures(TRANSFORM, FLAGS=flags, BODY=body, MORE=more) == {}


@pytest.mark.parametrize(
    ("flags", "body", "text"),
    [
        ("False, False", "inputs.mul_(2)", "inputs as it was: the batch is not the transform's"),
        ("False, False", "targets.clamp_(-1, 1)", "targets as it was"),
        ("False, False", "inputs = inputs.double()", "got: torch.float64 on cpu"),
        ("False, False", "inputs = (inputs - inputs.mean(0)) / inputs.std(0)", "finite inputs for 1 rows"),
        ("False, None", "pass", "`drops`, True or False"),
        ("False, False", DROP, "one that drops rows says `drops = True`"),
        ("False, False", "ids = None", "token_ids as it got them, got none"),
    ],
)
def test_a_batch_that_is_not_as_it_should_be(failures: Any, flags: str, body: str, text: str) -> None:
    assert text in failures(TRANSFORM, "batches", FLAGS=flags, BODY=body, MORE="")["batches"]


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ("batch.token_ids[~keep] = -1", "token_ids"),
        ("positions[~keep] = 0", "positions"),
        ("targets[~keep] *= 0", "targets"),
        ("inputs[~keep] = 0 * inputs[~keep] if number < 0 else inputs[~keep]", "inputs"),
    ],
)
@pytest.mark.parametrize("which", ["repeat", "large"])
def test_a_transform_that_changes_the_rows_which_it_drops(failures: Any, changed: str, name: str, which: str) -> None:
    """Only there does the batch that it was given change."""
    drop = f"keep = ~{which}(inputs, ids, positions); {changed}; batch = batch.rows(keep)"
    drop += "; inputs, targets, ids, positions = batch.inputs, batch.targets, batch.token_ids, batch.positions"
    found = failures(TRANSFORM + REPEAT, "batches", FLAGS="True, True", BODY=drop, MORE="")
    assert f"{name} as it was: the batch is not the transform's" in found["batches"]


@pytest.mark.parametrize("which", ["repeat", "large"])
def test_a_transform_that_drops_rows_conforms(failures: Any, which: str) -> None:
    drop = f"return batch.rows(~{which}(inputs, ids, positions))"
    assert failures(TRANSFORM + REPEAT, FLAGS="True, True", BODY=drop, MORE="") == {}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("inputs, targets, ids = inputs[2:], targets[2:], ids[2:]; positions = positions[:-2]", "token id of each"),
        ("inputs, ids, positions = inputs[1:], ids[1:], positions[1:]; targets = targets[:-1]", "targets of the same"),
        ("inputs = inputs.flip(0)", "inputs of the same row as its position"),
        ("positions = positions + 100", "positions that went in"),
    ],
)
def test_parts_of_rows_that_part(failures: Any, body: str, text: str) -> None:
    assert text in failures(TRANSFORM, "alignment", FLAGS="True, True", BODY=body, MORE="")["alignment"]


@pytest.mark.parametrize("body", ["inputs = inputs + torch.randn_like(inputs)", "inputs = inputs * random.random()"])
def test_random_numbers_without_a_key(failures: Any, body: str) -> None:
    found = failures(TRANSFORM, "determinism", FLAGS="False, False", BODY=body, MORE="")
    assert "clt_plugins.generator(context.seed, NAME, number)" in found["determinism"]


@pytest.mark.parametrize(
    ("body", "more"),
    [
        ("inputs = inputs * (1 + self.calls / 9)", ""),
        ("inputs = inputs + torch.randn(inputs.shape, generator=self.draws)", ""),
        (DROP.replace("> 1", "> self.calls % 3"), ""),
        ("inputs = inputs * (1 + self.calls / 9)", STATEFUL.replace("self.calls = state", "pass")),
    ],
)
def test_what_is_lost_when_a_run_is_resumed(failures: Any, body: str, more: str) -> None:
    found = failures(TRANSFORM, "resume", FLAGS="False, True", BODY=body, MORE=more)
    assert "let it follow from `number`" in found["resume"]


@pytest.mark.parametrize(
    ("flags", "body", "text"),
    [
        ("True, False", "inputs = inputs * (1 + self.calls / 9)", "the same state after a held-out pass"),
        ("True, False", "self.calls -= number < 0; inputs = inputs * (1 + self.calls / 9)", "at the second pass"),
    ],
)
def test_a_held_out_pass_that_is_no_measurement(failures: Any, flags: str, body: str, text: str) -> None:
    assert text in failures(TRANSFORM, "held_out", FLAGS=flags, BODY=body, MORE=STATEFUL)["held_out"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("inputs = inputs - inputs.mean(0)", "inputs of batch 0 on 2 data ranks as on one"),
        (DRAW.replace("rank * rows : (rank + 1) * rows", ":rows"), "inputs of batch 0 on 2 data ranks as on one"),
        ("self.context.parallel.total(inputs.sum())", "a transform that asks no other rank"),
        ("self.calls += float(inputs.sum()) > 0; inputs = inputs + 0", "the same state on both data ranks"),
    ],
)
def test_a_transform_that_depends_on_the_number_of_ranks(failures: Any, body: str, text: str) -> None:
    assert text in failures(TRANSFORM, "ranks", FLAGS="False, False", BODY=body, MORE=STATEFUL)["ranks"]


def test_a_metric_without_a_fault(failures: Any) -> None:
    assert failures(METRIC, STEP="", RESULT="") == {}


@pytest.mark.parametrize(
    ("step", "result", "text"),
    [
        ("return {'size': size}", "", "by name `group/name`"),
        ("return {'train/size': [1, 2]}", "", "numbers or tensors of at most two dimensions"),
        ("return {'train/size': step.targets[0]}", "", "as a number, [L] or [L, F]"),
        ("size = step.targets.std(0).mean()", "", "a finite 'train/size' for 1 tokens"),
        ("step.reconstruction.sub_(step.targets)", "", "['reconstruction'] changed in place"),
        ("size = step.features.values[step.features.pairs.token == 0].sum()", "", "'NoneType' object has no attribute"),
        ("return {'time/size': size}", "", "another group than time/"),
        ("", "size = size / 0", "a finite 'eval/size'"),
    ],
)
def test_numbers_that_no_logger_takes(failures: Any, step: str, result: str, text: str) -> None:
    assert text in failures(METRIC, "numbers", STEP=step or "pass", RESULT=result or "pass")["numbers"]


@pytest.mark.parametrize(
    ("step", "result"),
    [("step.transcoder.W_enc.data.mul_(1.01)", "pass"), ("pass", "self.transcoder.b_enc.data.add_(0.01)")],
)
def test_a_metric_that_changes_what_it_measures(failures: Any, step: str, result: str) -> None:
    found = failures(METRIC, "no_change", STEP=step, RESULT=result)
    assert "as in a run without the metric" in found["no_change"]


@pytest.mark.parametrize(
    ("step", "result", "text"),
    [
        ("size = step.features.values.sum() / tokens", "pass", "'train/size' on rank 0 of 2 tensor ranks"),
        (
            "size = parallel.total(step.features.values.sum()) / tokens",
            "pass",
            "'train/size' on rank 0 of 2 data ranks",
        ),
        ("pass", "size = self.parallel.total(self.sums) / self.tokens", "'eval/size' on rank 0 of 2 data ranks"),
        ("return {f'train/size{parallel.tensor_rank}': size}", "pass", "the names of one process"),
    ],
)
def test_a_metric_of_one_rank(failures: Any, step: str, result: str, text: str) -> None:
    assert text in failures(METRIC, "ranks", STEP=step, RESULT=result)["ranks"]
