"""Plugins with words in the places where tests of the kit make them wrong, and what several of these tests ask."""

from __future__ import annotations

import pytest

from clt_plugins.registry.plugins import load_plugins

HEADER = '''
from attrs import field, frozen
from clt_plugins import *

@frozen(kw_only=True)
class Config:
    """One to be checked."""
    weight: float = 1.0
    """A number."""
'''

SOURCE = """
import torch

class Source:
    n_layers, d_model = 2, 4

    def __init__(self, context):
        self.context, self.position = context, 0
        numbers = generator(context.seed, "rows")
        self.rows = torch.randn(2000, 2, self.n_layers, self.d_model, generator=numbers)

    def next(self):
        parallel = self.context.parallel
        share = self.context.batch_share()
        start = self.position + share * parallel.data_rank
        rows = self.rows[start : start + share]
        self.position += self.context.batch_tokens
        return Batch(rows[:, 0], rows[:, 1])

    def held_out(self, tokens):
        rows = self.rows[-tokens:]
        yield Batch(rows[:, 0], rows[:, 1])

    def statistics(self):
        return None

    def state(self):
        return {"position": self.position}

    def load_state(self, state):
        self.position = state["position"] + OFFSET

@hookimpl
def clt_sources():
    return [Spec("mine", Config, lambda config, context: Source(context))]
"""

LOSS = """
class Loss:
    needs_pre = False

    def selection(self, tokens, idle_tokens):
        return None

    def __call__(self, forward):
        values = forward.features.values DETACH
        return {"mine": forward.sum_features(values.square().sum()) / forward.features.shape[0]}

@hookimpl
def clt_losses():
    return [Spec("mine", Config, lambda config, context: Loss())]
"""

LOGGER = """
import time

class Logger:
    def __init__(self, folder):
        self.folder, self.file = folder, None

    def start(self, recipe, step):
        self.file = (self.folder / "log.txt").open("a")

    def log(self, step, metrics):
        SLOW
        self.file.write(f"{step} {sorted(metrics)}\\n")

    def close(self, status):
        if self.file is not None:
            CLOSE

@hookimpl
def clt_loggers():
    return [Spec("mine", Config, lambda config, context: Logger(context.folder))]
"""


def assert_only(found: dict[str, str], name: str, text: str) -> None:
    """One check failed, the one of that name, and says why."""
    failed = [check for check, said in found.items() if said != "pass" and not said.startswith("skip: ")]
    assert failed == [name], "\n".join(found[each] for each in failed)
    assert text in found[name]


def needs_ranks() -> None:
    if "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")
