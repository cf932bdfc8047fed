"""Plugins that are wrong in one way each: the kit finds the fault and says where to look. Without it each conforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import pytest

from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing import Nonconformance, cases

if TYPE_CHECKING:
    from tests.conftest import Distributions

HEADER = '''
from attrs import field, frozen
from clt_plugins import *

@frozen(kw_only=True)
class Config:
    """One to be checked."""
    weight: float = 1.0
    """A number."""
'''

ACTIVATION = """
import torch

class Activation(torch.nn.Module):
    fixed_size = True

    def __init__(self, context):
        super().__init__()
        self.context = context

    def selection(self, tokens, norms):
        context = self.context
        # The features of all ranks where `Top` knows of ranks, else this rank's.
        features = context.n_features if PARALLEL else len(context.parallel.shard(context.n_features))
        parallel = context.parallel if PARALLEL else None
        return Top(8, tokens, context.n_layers, features, per="token", kernels=context.kernels, parallel=parallel)

    def forward(self, pre, feature):
        return pre.relu()

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Activation(context))]
"""

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

EXPORTER = """
import torch

class Exporter:
    def export(self, transcoder, folder):
        tensors = {name: x.double().flatten().tolist() for name, x in transcoder.tensors().items()}
        DROP
        (folder / "weights.txt").write_text(repr(sorted(tensors.items())))

@hookimpl
def clt_exporters():
    return [Spec("mine", Config, lambda config, context: Exporter())]
"""

KERNELS = """
class Kernels:
    name = "mine"

    def __init__(self, inner):
        self.inner = inner

    def preference(self, device):
        return -1

    def select(self, *shape, per, capacity=0):
        return self.inner.select(*shape, per=per, capacity=capacity)

    def decode(self, values, pairs, layout, weight, out):
        self.inner.decode(values, pairs, layout, weight, out)
        CUT

    def grad_values(self, *arguments):
        self.inner.grad_values(*arguments)

    def grad_rows(self, *arguments, overwrite):
        self.inner.grad_rows(*arguments, overwrite=overwrite)

def build(config, context):
    from clt_kernels.reference import TorchKernels
    return Kernels(TorchKernels())

@hookimpl
def clt_kernels():
    return [Spec("mine", Config, build)]
"""


@pytest.fixture
def failures(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """What the kit says of a plugin, by `choice/check`; source text replaced first."""

    def run(source: str, only: str = "", **replaced: str) -> dict[str, str]:
        for word, text in replaced.items():
            source = source.replace(word, text)
        distributions.forget("plugin_under_test")
        distributions.module("plugin_under_test", source)
        found = {}
        for case in cases("plugin_under_test"):
            if only in str(case) and case.slot != "plugin":  # these modules import torch, and much else
                try:
                    case.run()
                except Nonconformance as error:
                    found[str(case)] = str(error)
                except SkipTest:
                    pass
        return found

    return run


def test_a_topk_that_forgets_other_ranks(failures: Any) -> None:
    if "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")
    assert failures(HEADER + ACTIVATION, PARALLEL="True") == {}
    found = failures(HEADER + ACTIVATION, PARALLEL="False")
    assert found.keys() == {"mine/tensor_parallel"}
    assert "features on rank 0 of 2 as in one process" in found["mine/tensor_parallel"]
    assert "give `Top` its `parallel`" in found["mine/tensor_parallel"]


def test_a_source_that_repeats_a_row_after_resuming(failures: Any) -> None:
    assert failures(HEADER + SOURCE, OFFSET="0") == {}
    found = failures(HEADER + SOURCE, OFFSET="-1")
    assert found.keys() == {"mine/resume"}
    assert "the state that was loaded" in found["mine/resume"]


def test_a_source_that_repeats_a_row_though_its_state_is_right(failures: Any) -> None:
    """Batches are as before, since the row before the first one is the last one."""
    rows = "self.rows[[n * 31 % 64 for n in range(start, start + share)]]"
    again = {"self.rows[start : start + share]": rows}
    found = failures(HEADER + SOURCE, only="once", OFFSET="0", **again)
    assert "112 different rows, resumed after 48\n     got: 48 of them came before" in found["mine/exactly_once"]


def test_a_source_whose_position_is_that_of_one_rank(failures: Any) -> None:
    """As if the rows of every rank were its own: with other ranks some come again, and others never."""
    per_rank = {
        "start = self.position + share * parallel.data_rank": "start = self.position * parallel.data_ranks + "
        "share * parallel.data_rank",
        "self.position += self.context.batch_tokens": "self.position += share",
    }
    found = failures(HEADER + SOURCE, only="ranks", OFFSET="0", **per_rank)
    assert found.keys() == {"mine/other_ranks"}
    assert "no row twice before all rows came once" in found["mine/other_ranks"]


RANKS = "self.context.parallel.data_ranks"


def test_a_source_that_leaves_rows_out_with_other_ranks(failures: Any) -> None:
    skips = {
        'return {"position": self.position}': f'return {{"position": self.position, "n": {RANKS}}}',
        'self.position = state["position"]': f"self.position = state['position'] + 5 * (state['n'] != {RANKS})",
    }
    found = failures(HEADER + SOURCE, only="ranks", OFFSET="0", **skips)
    assert found.keys() == {"mine/other_ranks"}
    assert "rows have not come" in found["mine/other_ranks"]


def test_a_source_that_refuses_other_ranks_is_honest(failures: Any) -> None:
    refuses = {
        'return {"position": self.position}': f'return {{"position": self.position, "n": {RANKS}}}',
        'self.position = state["position"]': f"if state['n'] != {RANKS}:\n"
        "            raise Refused('parallel.data', 'not as many as before')\n"
        '        self.position = state["position"]',
    }
    assert failures(HEADER + SOURCE, only="ranks", OFFSET="0", **refuses) == {}


def test_a_source_whose_state_differs_between_ranks(failures: Any) -> None:
    differs = {
        'return {"position": self.position}': 'return {"position": self.position, "n": self.context.parallel.rank}'
    }
    found = failures(HEADER + SOURCE, only="other_ranks", OFFSET="0", **differs)
    assert "expected: the same state on every data rank" in found["mine/other_ranks"]


@pytest.mark.parametrize(
    ("end", "text"),
    [("raise StopIteration", "StopIteration"), ("return None", "got: none"), ("pass", "got: 0")],
)
def test_a_source_that_ends_without_a_word(failures: Any, end: str, text: str) -> None:
    line = "start = self.position + share * parallel.data_rank"
    replaced = {line: f"{line}\n        if start >= 320:\n            share = 0\n            {end}"}
    found = failures(HEADER + SOURCE, only="epochs", OFFSET="0", **replaced)
    assert text in found["mine/epochs"]


def test_a_source_with_a_short_batch_at_the_end_of_an_epoch(failures: Any) -> None:
    short = {"rows = self.rows[start : start + share]": "rows = self.rows[start % 300 : min(start % 300 + share, 300)]"}
    found = failures(HEADER + SOURCE, only="epochs", OFFSET="0", **short)
    assert "batch 18 of 16 tokens\n     got: 12" in found["mine/epochs"]


def test_a_source_whose_order_is_the_hash_of_python(failures: Any) -> None:
    by_hash = {
        "    def next(self):": "        order = sorted(range(2000), key=lambda n: hash(str(n)))\n"
        "        self.rows = self.rows[order]\n\n    def next(self):"
    }
    found = failures(HEADER + SOURCE, OFFSET="0", **by_hash)
    assert found.keys() == {"mine/other_process"}
    assert "`hash` of text" in found["mine/other_process"]


@pytest.mark.parametrize("value", ["str(id(self))", "str(hash('text'))"])
def test_a_source_whose_identity_is_that_of_a_process(failures: Any, value: str) -> None:
    identity = f"    def identity(self):\n        return {{'source.text': {value}}}\n\n    def next(self):"
    found = failures(HEADER + SOURCE, only="other", OFFSET="0", **{"    def next(self):": identity})
    assert found.keys() == {"mine/other_process"}
    assert "expected: the identity" in found["mine/other_process"]


def test_a_loss_that_detaches_its_gradient(failures: Any) -> None:
    assert failures(HEADER + LOSS, DETACH="") == {}
    found = failures(HEADER + LOSS, DETACH=".detach()")
    assert found.keys() == {"mine/terms"}
    assert "got: none: the loss changes no weight" in found["mine/terms"]
    found = failures(HEADER + LOSS, DETACH="* (1 - forward.features.values.detach().tanh())")
    assert found.keys() == {"mine/gradient_features"}
    assert "a `detach()`" in found["mine/gradient_features"]


def test_a_loss_whose_gradient_vanishes_is_compared_by_its_rounding(failures: Any) -> None:
    """Probabilities add up to 1 whatever changes."""
    old, new = (
        LOSS.index("        return {"),
        "        return {'mine': forward.reconstruction.softmax(-1).sum(-1).mean()}",
    )
    source = LOSS[:old] + new + LOSS[LOSS.index("\n", old) :]
    assert failures(HEADER + source, only="parallel", DETACH="") == {}


IN_MODEL = """
class Loss:
    needs_pre = False
    contexts = 3

    def selection(self, tokens, idle_tokens):
        return None

    def runs(self, step, progress):
        return RUNS

    def __call__(self, forward):
        NONE
        surprise = -forward.model.logits.log_softmax(-1).gather(1, forward.model.next_tokens[:, None]).squeeze(1)
        return {"mine": MEAN}

@hookimpl
def clt_losses():
    return [Spec("mine", Config, lambda config, context: Loss())]
"""


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"MEAN": "surprise.mean()"}, "instead of `x.mean()`"),
        ({"MEAN": "surprise.sum()"}, "instead of `x.mean()` or `x.sum()`"),
        ({"NONE": "pass"}, "'NoneType' object has no attribute"),
        ({"RUNS": "step"}, "expected: True or False, the same each time"),
    ],
)
def test_a_loss_that_runs_the_model_wrongly(failures: Any, changed: dict[str, str], text: str) -> None:
    right = {"RUNS": "progress >= 0.5", "NONE": "if forward.model is None: return {}"}
    right["MEAN"] = "forward.model.mean(surprise)"
    only = "" if changed.get("MEAN") == "surprise.mean()" else "runs_model"
    found = failures(HEADER + IN_MODEL, only=only, **{**right, **changed})
    assert found.keys() == {"mine/runs_model"}, "no other check tells the same fault by its consequences"
    assert text in found["mine/runs_model"]


def test_a_loss_that_runs_the_model_and_detaches_a_factor(failures: Any) -> None:
    """Its gradient nearly vanishes: ranks differ by rounding, and what is wrong is wrong on one."""
    right = {"RUNS": "True", "NONE": "if forward.model is None: return {}"}
    divergence = (
        "log_q = forward.model.logits.log_softmax(-1); log_p = forward.model.unchanged.log_softmax(-1); "
        "p, q = log_p.exp(), log_q.exp(); log_m = ((p + q) / 2).log(); "
        "twice = (p * (log_p - log_m) + q.detach() * (log_q - log_m)).sum(-1)\n        surprise"
    )
    changed = {"        surprise": f"        {divergence}", "MEAN": "forward.model.mean(twice)"}
    found = failures(HEADER + IN_MODEL, **right, **changed)
    assert found.keys() == {"mine/gradient_features"}
    assert "model.logits" in found["mine/gradient_features"]


def test_a_loss_that_runs_the_model_conforms(failures: Any) -> None:
    right = {"RUNS": "True", "NONE": "if forward.model is None: return {}", "MEAN": "forward.model.mean(surprise)"}
    assert failures(HEADER + IN_MODEL, **right) == {}


def test_a_logger_that_blocks(failures: Any) -> None:
    assert failures(HEADER + LOGGER, SLOW="", CLOSE="self.file.close()") == {}
    found = failures(HEADER + LOGGER, only="prompt", SLOW="time.sleep(0.06 * (step == 300))", CLOSE="self.file.close()")
    assert "expected: log to return within 0.05 s" in found["mine/prompt"]


def test_a_logger_that_does_not_flush(failures: Any) -> None:
    found = failures(HEADER + LOGGER, only="flush", SLOW="", CLOSE="pass")
    assert "flush and close files" in found["mine/flush"]


STATE = """
import torch

class Activation(torch.nn.Module):
    fixed_size = True

    def __init__(self, context):
        super().__init__()
        self.context, self.k, self.seen = context, 8, 0

    def schedule(self, progress):
        self.k = 8 if progress > 0.4 else 12

    def selection(self, tokens, norms):
        context = self.context
        if self.training and torch.is_grad_enabled():
            self.seen += 1
        shape = tokens, context.n_layers, context.n_features
        top = Top(K, *shape, per="token", kernels=context.kernels, parallel=context.parallel)
        SEE
        return top

    def forward(self, pre, feature):
        return pre.relu()FACTOR

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Activation(context))]
"""
AS_IT_SHOULD_BE = {"K": "self.k if self.training else 8", "SEE": "pass", "FACTOR": ""}


def test_an_activation_whose_evaluation_follows_the_schedule(failures: Any) -> None:
    assert failures(HEADER + STATE, **AS_IT_SHOULD_BE) == {}
    found = failures(HEADER + STATE, **{**AS_IT_SHOULD_BE, "K": "self.k"})
    assert found.keys() == {"mine/schedule"}
    assert "features in eval mode at 50% of the steps as at the first one" in found["mine/schedule"]


def test_a_selection_that_changes_what_it_sees(failures: Any) -> None:
    """What it keeps is right: it took a copy before."""
    see = "inner, top.see = top.see, lambda layer, pre: (inner(layer, pre.clone()), pre.relu_())"
    found = failures(HEADER + STATE, only="selection", **{**AS_IT_SHOULD_BE, "SEE": see})
    assert found.keys() == {"mine/selection"}
    assert "`see` to leave the block as it is" in found["mine/selection"]


def test_an_activation_with_a_state_that_no_checkpoint_holds(failures: Any) -> None:
    factor = " * (1 + 0.1 * self.seen)"
    found = failures(HEADER + STATE, only="resume", **{**AS_IT_SHOULD_BE, "FACTOR": factor})
    assert found.keys() == {"mine/resume"}
    assert "resumed after step 3, as if never stopped" in found["mine/resume"]
    assert "no checkpoint holds it" in found["mine/resume"]


LOSS_WITH_STATE = """
import torch

class Loss(torch.nn.Module):
    needs_pre = False

    def __init__(self, context):
        super().__init__()
        self.context = context
        STATE

    def selection(self, tokens, idle_tokens):
        return SELECTION

    def forward(self, forward):
        mean = forward.features.values.sum() / forward.features.shape[0]
        CHANGE
        total = forward.sum_features(forward.features.values.square().sum()) / forward.features.shape[0]
        return {"mine": (1 + RUNNING) * total}

@hookimpl
def clt_losses():
    return [Spec("mine", Config, lambda config, context: Loss(context))]
"""
BUFFER = {
    "STATE": 'self.register_buffer("running", torch.zeros(()))',
    "CHANGE": "if torch.is_grad_enabled(): self.running += 1",
    "RUNNING": "self.running.clone()",
    "SELECTION": "None",
}


def test_a_loss_with_a_state_that_no_checkpoint_holds(failures: Any) -> None:
    assert failures(HEADER + LOSS_WITH_STATE, only="resume", **BUFFER) == {}, "a buffer is in checkpoints"
    number = {**BUFFER, "STATE": "self.running = 0", "RUNNING": "self.running"}
    found = failures(HEADER + LOSS_WITH_STATE, only="resume", **number)
    assert found.keys() == {"mine/resume"}


def test_a_loss_whose_selection_changes_what_it_sees(failures: Any) -> None:
    selection = """Selecting(tokens, self.context.kernels)

class Selecting:
    def __init__(self, tokens, kernels):
        self.top = Top(2, tokens, 3, 41, per="token", kernels=kernels)

    def see(self, layer, pre):
        self.top.see(layer, pre.clone())
        pre.clamp_(max=1.0)

    def finish(self):
        return self.top.finish()

class Loss(Loss):"""
    found = failures(HEADER + LOSS_WITH_STATE, only="selection", **{**BUFFER, "SELECTION": selection})
    assert found.keys() == {"mine/selection"}
    assert "other selections read it too" in found["mine/selection"]


@pytest.mark.parametrize(
    "name", ["b_enc", "b_dec", "normaliser.input_shift", "W_skip", "feature_offset", "feature_scale"]
)
def test_an_exporter_that_drops_a_tensor(failures: Any, name: str) -> None:
    assert failures(HEADER + EXPORTER, DROP="") == {}
    found = failures(HEADER + EXPORTER, DROP=f"tensors.pop({name!r}, None)")
    assert found.keys() == {"mine/every_tensor"}
    assert f"expected: {name} " in found["mine/every_tensor"]


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ("['activation: not to my taste']", "got: it wrote, though ['activation: not to my taste']"),
        ("['activation: unseen'] if transcoder.W_enc.is_meta else []", "the same of a transcoder on the device meta"),
        ("['not to my taste']", "expected: a list of texts `setting: what is wrong: remedy`"),
        ("None", "got: None"),
    ],
)
def test_an_exporter_whose_check_is_not_what_it_does(failures: Any, faults: str, text: str) -> None:
    def with_check(returned: str) -> dict[str, str]:
        method = f"class Exporter:\n    def check(self, transcoder):\n        return {returned}\n"
        return failures(HEADER + EXPORTER, DROP="", **{"class Exporter:": method})

    assert with_check("[]") == {}
    found = with_check(faults)
    assert found.keys() == {"mine/before_training"}
    assert text in found["mine/before_training"]


@pytest.mark.parametrize(
    ("body", "check", "text"),
    [
        ("weight = 1.0", "load", "Config.weight: has no type, so that no recipe can set it"),
        ("weight = field(default=1.0)", "load", "Config.weight: has no type"),
        ("weight: object = 1.0", "load", "a recipe cannot hold <class 'object'>"),
        ("weight: float = 1.0", "config", "a string literal under each field"),
    ],
)
def test_a_config_with_an_untyped_or_silent_field(failures: Any, body: str, check: str, text: str) -> None:
    header = HEADER[: HEADER.index("    weight: float")] + f"    {body}\n"
    found = failures(header + LOSS, only=check, DETACH="")
    assert len(found) == 1
    assert text in next(iter(found.values()))


WRONG_SELECT = """
import torch

class Wrong:
    def __init__(self, right):
        self.right = right

    def see(self, layer, pre, **given):
        SEE
        self.right.see(layer, pre, **given)

    def finish(self, ranks=None):
        return self.right.finish(RANKS)

@hookimpl
def clt_kernels()"""


@pytest.mark.parametrize(
    ("see", "ranks", "check", "text"),
    [
        ("pass", "ranks", "", ""),
        ("pre.nan_to_num_(nan=float('-inf'))", "ranks", "select", "special numbers"),
        # Of equal scores the higher feature.
        (
            "given['score'] = given.get('score', pre).double() + 1e-9 * torch.arange(pre.shape[1])",
            "ranks",
            "select",
            "normal numbers",
        ),
        ("pre = pre.bfloat16().to(pre.dtype)", "ranks", "select", "normal numbers"),
        ("given.pop('shift', None)", "ranks", "select", "by shift"),
        ("pass", "None", "select_by_ranks", "rank 0 of 4"),
    ],
)
def test_kernels_whose_selection_is_wrong(failures: Any, see: str, ranks: str, check: str, text: str) -> None:
    source = KERNELS.replace("return self.inner.select(*shape", "return Wrong(self.inner.select(*shape")
    source = source.replace("capacity=capacity)", "capacity=capacity))").replace(
        "@hookimpl\ndef clt_kernels()", WRONG_SELECT
    )
    found = failures(HEADER + source, only="mine/select", CUT="", SEE=see, RANKS=ranks)
    assert f"mine/{check}" in found if check else not found
    assert text in found.get(f"mine/{check}", "")


def test_kernels_that_are_wrong_at_ragged_shapes(failures: Any) -> None:
    assert failures(HEADER + KERNELS, only="mine/edges", CUT="") == {}
    tile = "out[len(out) // 16 * 16 :] = 0 if len(out) > 16 else out[len(out) // 16 * 16 :]"
    found = failures(HEADER + KERNELS, CUT=tile)
    assert "mine/edges" in found
    assert "mine/products" not in found
    assert "B 40, L 3, F 40, D 33" in found["mine/edges"]
