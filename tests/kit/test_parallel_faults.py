"""Ranks that are wrong in one way each: the kit finds the fault. Without it they conform.

What raises an error is told by `shard`, the first check that calls everything.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER, assert_only

PARALLEL = """
from contextlib import nullcontext
from clt_plugins.templates import parallel as template

class Ranks(template.Example):
    BODY

def build(config, context):
    made = template.build(config, context)
    made.__class__ = Ranks
    return made

@hookimpl
def clt_parallel():
    return [Spec("mine", template.ExampleConfig, build)]
"""
CHECKS = ("shard", "sums", "gradients", "gather")


@pytest.mark.parametrize(
    ("body", "name", "text"),
    [
        ("pass", "", ""),
        ("def sum_features_later(self, x): return lambda: x", "sums", "sum_features_later [3.0, 3.0] on rank 0 of 2"),
        (
            "def sum_features_later(self, x): total = self.total(x); return lambda: total",
            "shard",
            "does not require grad",
        ),
        (
            'def total(self, x, over="features", what="metrics"): return super().total(x)',
            "sums",
            'total over "tokens" [1.0, 1.0]',
        ),
        ("def reduce_gradients(self, parameters): pass", "gradients", "with `partial_gradient`"),
        (
            "def reduce_gradients(self, parameters): [p.grad.copy_(self.total(p.grad)) for p in parameters]",
            "shard",
            "NoneType",
        ),
        ("def gather(self, text): return [text] * self.world", "gather", "the texts ['rank 0', 'rank 1é']"),
        ("batch_rank, batch_ranks = 1, 2", "gather", "batch_rank and batch_ranks [0, 1] on rank 0"),
    ],
    ids=["right", "sum_features_later", "no gradient", "tokens", "partial", "None", "gather", "apart"],
)
def test_ranks_that_are_wrong_in_one_way(check: Any, body: str, name: str, text: str) -> None:
    found = check(HEADER + PARALLEL, ("shard", name) if name else CHECKS, BODY=body)
    if name:
        assert_only(found, name, text)
    else:
        assert set(found.values()) == {"pass"}


def test_ranks_that_refuse_some_numbers_of_processes_are_tried_on_others(check: Any) -> None:
    refusing = """def shard(self, n_features):
        return super().shard(n_features)

def build(config, context):
    made = template.build(config, context)
    if made.world in REFUSED:
        made.close()
        raise Refused("parallel", f"{made.world} ranks are too many or too few")
    made.__class__ = Ranks
    return made

def old(config, context):
    return"""
    source = HEADER + PARALLEL.replace("BODY\n\ndef build(config, context):", refusing)
    assert set(check(source, CHECKS, REFUSED="(1, 3)").values()) == {"pass"}
    found = check(source, CHECKS, REFUSED="(1, 2, 3)")
    assert found["shard"].startswith("skip: it refuses 1, 2 and 3 ranks: parallel: 1 ranks are too many or too few")
