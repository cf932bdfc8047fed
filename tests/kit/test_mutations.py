"""Mutations of a stranger's plugins that the kit once let pass: each is found, by one failure; without it all is well.

The plugins: an activation with state, losses, a logger that draws, an exporter that is read back, and a command.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import pytest

from clt_plugins.registry.plugins import load_plugins
from clt_plugins.testing import Nonconformance, cases
from tests.support.faulty import HEADER, LOGGER, LOSS, SOURCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Distributions


@pytest.fixture
def check(distributions: Distributions) -> Callable[..., dict[str, str]]:
    """What the kit says of a plugin with some texts replaced, by check: `pass`, a failure, or `skip: why`."""

    def run(source: str, only: tuple[str, ...], settings: Any = None, **replaced: str) -> dict[str, str]:
        for word, text in replaced.items():
            assert word in source, word
            source = source.replace(word, text)
        distributions.forget("plugin_under_test")
        distributions.module("plugin_under_test", source)
        found = {}
        for case in cases("plugin_under_test", settings=settings):
            if case.check in only:
                try:
                    case.run()
                    found[case.check] = "pass"
                except Nonconformance as error:
                    found[case.check] = str(error)
                except SkipTest as reason:
                    found[case.check] = f"skip: {reason}"
        return found

    return run


def assert_only(found: dict[str, str], name: str, text: str) -> None:
    """One check failed, the one of that name, and says why."""
    failed = [check for check, said in found.items() if said != "pass" and not said.startswith("skip: ")]
    assert failed == [name], "\n".join(found[each] for each in failed)
    assert text in found[name]


FBT = """
import torch

class Counting(Top):
    def __init__(self, activation, *shape, **how):
        super().__init__(*shape, **how)
        self.activation = activation

    def finish(self):
        pairs, pre = super().finish()
        self.activation.count(pairs)
        return pairs, pre

class Activation(torch.nn.Module):
    fixed_size = True

    def __init__(self, context):
        super().__init__()
        self.context, self.k = context, 8
        shard = context.parallel.shard(context.n_features)
        zeros = torch.zeros(context.n_layers, len(shard), dtype=context.dtype, device=context.device)
        STATE

    @torch.no_grad()
    def count(self, pairs):
        if not self.training:
            return
        LAZY
        counts = torch.zeros_like(self.frequency).flatten()
        counts.index_add_(0, pairs.feature, torch.ones_like(pairs.feature, dtype=counts.dtype))
        share = TOTAL / (pairs.tokens * self.context.parallel.batch_ranks)
        self.frequency.lerp_(share.view_as(self.frequency).to(self.frequency.dtype), 0.1)

    def schedule(self, progress):
        self.k = 8 if progress > 0.4 else 12

    def selection(self, tokens, norms):
        context = self.context
        return Counting(
            self, SCHEDULED, tokens, context.n_layers, context.n_features, per="batch", kernels=context.kernels,
            parallel=context.parallel, affine=lambda layer, pre: (None, PENALTY),
        )

    def forward(self, pre, feature):
        return pre.RELU()

@hookimpl
def clt_activations():
    return [Spec("mine", Config, lambda config, context: Activation(context))]
"""
FBT_RIGHT = {
    "STATE": "self.frequency = parameter(zeros, feature_axis=1).requires_grad_(False)",
    "LAZY": "pass",
    "TOTAL": "self.context.parallel.total(counts, over='tokens')",
    "SCHEDULED": "self.k if self.training else 8",
    "PENALTY": "-3 * self.frequency[layer]",
    "RELU": "relu",
}
FBT_CHECKS = ("selection", "schedule", "gradient", "own_gradient", "sparse_is_dense", "resume", "determinism")


def needs_ranks() -> None:
    if "tensor" not in load_plugins().choices("parallel"):
        pytest.skip("no choice 'tensor' for [parallel] is installed")


def test_an_activation_with_state_passes_all_checks(check: Any) -> None:
    """Also `gradient`: its state is taken back before each evaluation."""
    needs_ranks()
    found = check(HEADER + FBT, (*FBT_CHECKS, "tensor_parallel", "data_parallel", "save_load", "no_sync"), **FBT_RIGHT)
    assert found.pop("own_gradient") == "skip: it has no parameters"
    assert set(found.values()) == {"pass"}


@pytest.mark.parametrize(
    ("part", "name", "text"),
    [
        ({"RELU": "relu_"}, "selection", "`forward` to leave the pre-activations as they are"),
        ({"SCHEDULED": "self.k"}, "schedule", "features in eval mode at 50%"),
        ({"STATE": "self.frequency = zeros"}, "resume", "`frequency`"),
        (
            {
                "STATE": "self.frequency = None",
                "LAZY": "self.frequency = torch.zeros(self.context.n_layers, 41) if self.frequency is None "
                "else self.frequency",
                "PENALTY": "None if self.frequency is None else -3 * self.frequency[layer].to(pre.dtype)",
            },
            "resume",
            "`frequency`",
        ),
        ({"STATE": "self.frequency = parameter(zeros, feature_axis=1)"}, "own_gradient", "requires_grad_(False)"),
    ],
    ids=["inplace_fwd", "evaldep", "plainattr", "lazy", "reqgrad"],
)
def test_an_activation_that_is_wrong_in_one_way(check: Any, part: dict[str, str], name: str, text: str) -> None:
    found = check(HEADER + FBT, FBT_CHECKS, **{**FBT_RIGHT, **part})
    assert_only(found, name, text)


def test_an_activation_whose_state_is_that_of_one_data_rank(check: Any) -> None:
    needs_ranks()
    found = check(HEADER + FBT, ("data_parallel",), **{**FBT_RIGHT, "TOTAL": "counts"})
    assert_only(found, "data_parallel", "state activation.frequency in step 1 on data rank 0 of 2")
    assert 'over="tokens"' in found["data_parallel"]


def test_a_parameter_that_has_all_features_on_every_rank(check: Any) -> None:
    needs_ranks()
    whole = "self.frequency = torch.nn.Parameter(zeros[:, :1].expand(-1, context.n_features).contiguous(), False)"
    found = check(
        HEADER + FBT, ("tensor_parallel",), **{**FBT_RIGHT, "STATE": whole + "; self.frequency.feature_axis = 1"}
    )
    assert_only(found, "tensor_parallel", "of 41 features")  # of the rank that is first
    assert "context.parallel.shard" in found["tensor_parallel"]


def test_a_gradient_of_a_float32_parameter_is_checked_in_float64(check: Any) -> None:
    scaled = {
        "STATE": "self.frequency = parameter(zeros, feature_axis=1).requires_grad_(False); "
        "self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float32, device=context.device))",
        "pre.RELU()": "pre.relu() * self.scale.square().to(pre.dtype)",
    }
    right = {name: text for name, text in FBT_RIGHT.items() if name not in ("STATE", "RELU")}
    assert check(HEADER + FBT, ("own_gradient",), **scaled, **right) == {"own_gradient": "pass"}


def test_a_loss_that_adds_up_over_tokens(check: Any) -> None:
    needs_ranks()
    assert check(HEADER + LOSS, ("data_parallel",), DETACH="") == {"data_parallel": "pass"}
    found = check(HEADER + LOSS.replace(" / forward.features.shape[0]", ""), ("terms", "data_parallel"), DETACH="")
    assert_only(found, "data_parallel", "term mine in step 1: the mean of 2 data ranks as in one process")
    assert "a mean over this rank's tokens, not a sum" in found["data_parallel"]


SHARE = "share = forward.share(); error = (share.reconstruction - share.targets).square().mean()"


def test_a_loss_of_a_share_of_the_tokens(check: Any) -> None:
    needs_ranks()
    value = "forward.sum_features(values.square().sum()) / forward.features.shape[0]"
    source = HEADER + LOSS.replace(f'return {{"mine": {value}}}', f'{SHARE}; return {{"mine": MEAN}}')
    assert "MEAN" in source
    checks = ("terms", "gradient_reconstruction", "tensor_parallel")
    assert set(check(source, checks, DETACH="", MEAN="share.mean(error)").values()) == {"pass"}
    assert_only(check(source, checks, DETACH="", MEAN="error"), "tensor_parallel", "goes through `share.mean`")


@pytest.mark.parametrize(
    ("wrong", "right", "text"),
    [
        (
            "values.square().sum() / values.sum()",
            "values.square().sum() / values.sum().clamp(min=1e-6)",
            "a finite term 'mine' for a batch where no feature is kept",
        ),
        (
            "values.square().sum().sqrt()",
            "values.square().sum().clamp(min=1e-12).sqrt()",
            "a finite gradient of 'mine' for a batch where all features are 0",
        ),
        (
            "values.sum() + (forward.reconstruction - forward.targets).square().sum() / forward.targets.norm()",
            "values.sum() + (forward.reconstruction - forward.targets).square().sum() / (1 + forward.targets.norm())",
            "a finite term 'mine' for a batch of zeros",
        ),
    ],
)
def test_a_loss_that_is_not_finite_where_nothing_is_active(check: Any, wrong: str, right: str, text: str) -> None:
    value = "forward.sum_features(values.square().sum()) / forward.features.shape[0]"
    source = HEADER + LOSS.replace(value, "VALUE")
    assert check(source, ("terms",), DETACH="", VALUE=right) == {"terms": "pass"}
    assert_only(check(source, ("terms", "bf16", "determinism"), DETACH="", VALUE=wrong), "terms", text)


BALANCED = """
import torch

class Loss(BASE):
    needs_pre = False

    def __init__(self, context):
        super().__init__()
        self.s = PARAMETER

    def selection(self, tokens, idle_tokens):
        return None

    def __call__(self, forward):
        error = (forward.reconstruction - forward.targets).square().mean((0, 2))
        s = USED
        return {"mine": (error * torch.exp(-s) + s).mean()}

@hookimpl
def clt_losses():
    return [Spec("mine", Config, lambda config, context: Loss(context))]
"""
ZEROS = "torch.nn.Parameter(torch.zeros(context.n_layers, device=context.device))"
BALANCED_RIGHT = {"BASE": "torch.nn.Module", "PARAMETER": ZEROS, "USED": "self.s"}


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"BASE": "object"}, "its parameter `s` would never be trained"),
        ({"PARAMETER": f"[{ZEROS}]", "USED": "self.s[0]"}, "its parameter `s[0]` would never be trained"),
        ({"PARAMETER": f"lambda s={ZEROS}: s", "USED": "self.s()"}, "a tensor of shape [[3]] gets one too"),
        ({"USED": "self.s.detach()"}, "got: none"),
        ({"USED": "self.s + 0.5 * self.s.detach()"}, "the gradient of the loss by its parameter 's'"),
    ],
    ids=["no module", "in a list", "in a function", "detached", "half detached"],
)
def test_a_loss_whose_parameter_is_not_trained(check: Any, part: dict[str, str], text: str) -> None:
    checks = ("terms", "own_gradient", "resume")
    assert set(check(HEADER + BALANCED, checks, **BALANCED_RIGHT).values()) == {"pass"}
    name = "resume" if "never" in text else "own_gradient"
    assert_only(check(HEADER + BALANCED, checks, **{**BALANCED_RIGHT, **part}), name, text)


def test_a_source_whose_statistics_are_not_numbers(check: Any) -> None:
    statistics = """
    def statistics(self):
        shapes = {"mean": (2, 4), "std": (2, 4), "rms": (2,)}
        names = [(side, name) for side in ("inputs", "targets") for name in shapes]
        found = {f"{side}.{name}": torch.ones(shapes[name]) for side, name in names}
        found["inputs.mean"][0, 0] = NUMBER
        return found

    def old(self):"""
    source = (HEADER + SOURCE).replace("    def statistics(self):", statistics)
    assert check(source, ("statistics",), OFFSET="0", NUMBER="1.0") == {"statistics": "pass"}
    found = check(source, ("batches", "statistics"), OFFSET="0", NUMBER="float('nan')")
    assert_only(found, "statistics", "source 'mine' of plugin 'plugin_under_test'")
    assert "finite inputs.mean" in found["statistics"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("return rows[:, 0]", "a clt_plugins.Batch\n     got: Tensor"),
        ("return Batch(rows[1:, 0], rows[1:, 1])", "batch 0"),
    ],
)
def test_a_source_that_gives_no_batch_or_a_short_one(check: Any, line: str, text: str) -> None:
    checks = ("batches", "determinism", "resume", "exactly_once", "held_out", "ranks", "epochs")
    found = check(HEADER + SOURCE.replace("return Batch(rows[:, 0], rows[:, 1])", line, 1), checks, OFFSET="0")
    assert_only(found, "batches", text)


def test_held_out_batches_that_are_cut_by_a_rank_s_share(check: Any) -> None:
    cut = """for rows in self.rows[-tokens:].split(self.context.SIZE):
            yield Batch(rows[:, 0], rows[:, 1])

    def statistics"""
    source = HEADER + SOURCE[: SOURCE.index("rows = self.rows[-tokens:]")] + cut + SOURCE.partition("def statistics")[2]
    assert check(source, ("held_out",), OFFSET="0", SIZE="batch_tokens") == {"held_out": "pass"}
    found = check(source, ("batches", "held_out", "ranks"), OFFSET="0", SIZE="batch_share()")
    assert_only(found, "held_out", "on two ranks, as on one")


LOGGER_PARTS = {
    "START": "kept = [line for line in lines if int(line.split()[0]) <= step]",
    "MODE": '"w"',
    "DRAW": "pass",
    "FLUSH": "self.file.flush()",
}
DRAWING = (
    LOGGER.replace(
        'self.file = (self.folder / "log.txt").open("a")',
        """path = self.folder / "log.txt"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        START
        self.file = path.open(MODE)
        self.file.writelines(kept)
        self.file.flush()""",
    )
    .replace("sorted(metrics)", "metrics.get('loss/total')")
    .replace("        SLOW\n", "        DRAW\n")
    .replace("\n    def close", "        FLUSH\n\n    def close")
    .replace("CLOSE", "self.file.close()")
)
LOGGER_CHECKS = ("protocol", "resume", "prompt")


@pytest.mark.parametrize(
    ("part", "name", "text"),
    [
        ({}, "", ""),
        ({"START": "kept = []"}, "resume", "step 1 in the files after a resume from step 4\n     got: it is lost"),
        ({"START": "kept = lines"}, "resume", "step 5 once in a file after a resume from step 4"),
        ({"START": "kept = []", "MODE": '"a"'}, "resume", "step 5 once in a file"),
        ({"START": "kept = [line for line in lines if int(line.split()[0]) < step]"}, "resume", "step 4 in the files"),
        ({"FLUSH": "pass"}, "resume", "step 1 in the files"),
        ({"DRAW": "time.sleep(0.06 * (step % 100 == 0))"}, "prompt", "s at step "),
        ({"DRAW": "assert step < 50, 'far'"}, "prompt", "AssertionError: far"),
    ],
    ids=["right", "overwrite", "notrunc", "dup", "loses the last", "noflush", "syncdraw", "lograise"],
)
def test_a_logger_that_is_wrong_in_one_way(check: Any, part: dict[str, str], name: str, text: str) -> None:
    found = check(HEADER + DRAWING, LOGGER_CHECKS, **{**LOGGER_PARTS, **part})
    if name:
        assert_only(found, name, text)
    else:
        assert set(found.values()) == {"pass"}


def test_a_logger_may_begin_a_file_with_each_start(check: Any) -> None:
    source = (HEADER + DRAWING).replace('"log.txt"', 'f"log{step}.txt"')
    assert check(source, ("resume",), **LOGGER_PARTS) == {"resume": "pass"}


def test_a_logger_that_writes_no_file_is_not_asked_for_its_history(check: Any) -> None:
    source = (HEADER + LOGGER).replace('(self.folder / "log.txt").open("a")', "__import__('io').StringIO()")
    found = check(source, ("resume",), SLOW="", CLOSE="pass")
    assert found == {"resume": "skip: its files do not hold the numbers that it was given"}


EXPORTER = """
import json
from pathlib import Path

class Exporter:
    def export(self, transcoder, folder):
        from safetensors.torch import save_file

        EARLY
        encoder = transcoder.choices["encoder"]
        if encoder.name != "plain" or encoder.config.pre_bias:
            raise Refused("encoder", "it has no place for another: train with plain")
        if not ASKED:
            raise Refused("activation", "it has no thresholds: convert it")
        tensors = {name: x.contiguous() for name, x in transcoder.tensors().items()}
        DROP
        save_file(tensors, folder / "mine.safetensors")
        about = {"activation": transcoder.choices["activation"], "tying": transcoder.choices["tying"]}
        about = {name: {"name": each.name, **plain(each)} for name, each in about.items()}
        (folder / "mine.json").write_text(json.dumps(about))

def plain(selected):
    import attrs
    return attrs.asdict(selected.config)

class Reader(Exporter):
    def recognises(self, folder):
        return RECOGNISED

    def read(self, folder):
        about = json.loads((folder / "mine.json").read_text())
        names = tensor_shapes(folder / "mine.safetensors")
        return Imported(
            kind="mine", n_layers=3, d_model=6, n_features=41, model={}, **about,
            tensor=lambda name: read_tensor(folder / "mine.safetensors", name) if name in names else None,
        )

@hookimpl
def clt_exporters():
    return [Spec("mine", Config, lambda config, context: Exporter(), reader=Reader)]
"""
EXPORTER_RIGHT = {
    "EARLY": "pass",
    "ASKED": "isinstance(transcoder.activation, Thresholded)",
    "DROP": "pass",
    "RECOGNISED": "(folder / 'mine.json').is_file()",
}
EXPORTER_CHECKS = ("export", "every_choice", "every_tensor", "round_trip", "recognises")


@pytest.mark.parametrize(
    ("part", "name", "text"),
    [
        ({}, "", ""),
        ({"DROP": "tensors.pop('W_skip', None)"}, "every_tensor", "expected: W_skip"),
        ({"DROP": "tensors.pop('feature_offset', None)"}, "every_tensor", "expected: feature_offset"),
        (
            {"DROP": "tensors['W_enc'] = tensors['W_enc'].mT.contiguous()"},
            "round_trip",
            "W_enc is [3, 6, 41], expected",
        ),
        ({"DROP": "tensors['b_enc'] = tensors['b_enc'] + 0.1"}, "round_trip", "the outputs of the transcoder"),
        (
            {"ASKED": "hasattr(transcoder.activation.threshold(), 'shape')"},
            "every_choice",
            "has no attribute 'threshold'",
        ),
        ({"EARLY": "(folder / 'mine.json').write_text('{}')"}, "every_choice", "nothing written where it refuses"),
        ({"RECOGNISED": "True"}, "recognises", "an empty folder not recognised"),
        ({"RECOGNISED": "any(folder.glob('*.safetensors'))"}, "recognises", "a language model's folder"),
        ({"RECOGNISED": "False"}, "recognises", "its own folder recognised"),
    ],
    ids=[
        "right",
        "noskip",
        "nooffset",
        "transposed",
        "wrong bias",
        "nothr",
        "partial",
        "recogall",
        "recogmodel",
        "recognone",
    ],
)
def test_an_exporter_that_is_wrong_in_one_way(check: Any, part: dict[str, str], name: str, text: str) -> None:
    found = check(HEADER + EXPORTER, EXPORTER_CHECKS, **{**EXPORTER_RIGHT, **part})
    if name:
        assert_only(found, name, text)
    else:
        assert set(found.values()) == {"pass"}


LIGHT = """
import click
from clt_plugins import hookimpl
TOP

@click.command(NAME)
def histogram():
    HELP
    import torch

@hookimpl
def clt_commands():
    return [histogram]

@hookimpl
def clt_check(recipe):
    return COMPLAINTS
"""
LIGHT_RIGHT = {"TOP": "", "NAME": '"histogram"', "HELP": '"""Draw a histogram."""', "COMPLAINTS": "[]"}


@pytest.mark.parametrize(
    ("part", "name", "text"),
    [
        ({}, "", ""),
        ({"TOP": "import torch"}, "imports", "a module that imports nothing heavy\n     got: "),
        ({"TOP": "import matplotlib"}, "imports", "matplotlib"),
        ({"TOP": "import time; time.sleep(1.6)"}, "imports", "an import of at most 0.15 s"),
        ({"TOP": "sum(range(30_000_000))"}, "imports", "an import of at most 0.15 s"),
        ({"NAME": '"run"'}, "commands", "'run' is the engine's, which is found first"),
        ({"HELP": "pass"}, "commands", "help of 'histogram'"),
        ({"COMPLAINTS": "None"}, "complaints", "`clt_check` to return a list"),
        ({"COMPLAINTS": "'text'"}, "complaints", "must return a list of str, got 'text'"),
        ({"COMPLAINTS": "['transcoder.features: must be even']"}, "", ""),
    ],
)
def test_a_module_its_commands_and_its_complaints(check: Any, part: dict[str, str], name: str, text: str) -> None:
    if "matplotlib" in part.get("TOP", ""):
        pytest.importorskip("matplotlib")
    found = check(LIGHT, ("imports", "commands", "complaints"), **{**LIGHT_RIGHT, **part})
    if name:
        assert_only(found, name, text)
    else:
        assert set(found.values()) == {"pass"}
    assert sys.modules["plugin_under_test"].__name__ == "plugin_under_test"
