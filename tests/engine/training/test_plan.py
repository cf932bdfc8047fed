"""What a plan predicts, against counting; and what it prints."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from clt_plugins.cli.main import main_group
from clt_plugins.errors import Faults
from clt_plugins.files.records import as_data, from_data, json_text
from clt_plugins.recipe.read import as_toml, read_recipe
from clt_plugins.registry.plugins import load_plugins
from clt_plugins.training.plan.build import estimate, plan
from clt_plugins.training.plan.memory import LASTING, PHASES
from clt_plugins.training.plan.records import Plan
from clt_plugins.training.plan.table import as_table
from clt_plugins.training.plan.work import work
from tests.support.helpers import ENCODERS, TYINGS, parts, plugins, recipe, tables

B, L, D, F = 16, 3, 6, 10


def test_a_plan_predicts_the_largest_parts_exactly():
    built = parts()
    needs = estimate(built, recipe())
    assert needs.parameters == sum(p.numel() for p in built.transcoder.parameters())
    assert needs.bytes.parameters == 4 * needs.parameters == needs.bytes.optimizer / 2
    assert needs.flops.encoder == 2 * B * L * D * F


@pytest.mark.parametrize("tying", TYINGS)
def test_a_plan_without_memory_is_that_of_the_built_parts(tying):
    changed = recipe(tying=TYINGS[tying])
    needs = plan(changed, plugins())
    assert needs == estimate(parts(tying=TYINGS[tying]), changed)
    assert sum(needs.parameters_by_name.values()) == needs.parameters
    assert needs.total_flops == sum(as_data(needs.flops).values())


def test_the_peak_is_what_lasts_and_the_largest_phase():
    sizes = as_data(plan(recipe(), plugins()).bytes)
    assert sorted({*LASTING, *(name for phase in PHASES for name in phase)}) == sorted(sizes), "each has its place"
    phases = [sum(sizes[name] for name in phase) for phase in PHASES]
    assert plan(recipe(), plugins()).total_bytes == sum(sizes[name] for name in LASTING) + max(phases)


def test_settings_change_what_they_should():
    base = plan(recipe(), plugins())
    half = plan(recipe(optimizer={"name": "adam", "states": "bf16"}), plugins())
    assert half.bytes.optimizer == base.bytes.optimizer / 2
    average = plan(recipe(callbacks=[{"name": "ema"}], optimizer={"name": "adam", "states": "bf16"}), plugins())
    assert average.bytes.plugins == average.bytes.parameters > half.bytes.plugins == 0, "an average of each parameter"
    assert average.total_bytes - half.total_bytes == average.bytes.plugins
    assert average.disk.checkpoint - half.disk.checkpoint == average.bytes.plugins
    dense = plan(recipe(transcoder={"path": "dense"}), plugins())
    assert dense.bytes.pairs == 0 < base.bytes.pairs
    assert dense.flops.encoder == 3 * base.flops.encoder
    assert dense.bytes.pre_activations == 2.5 * L * base.bytes.pre_activations
    double = plan(recipe(train={"batch_tokens": 2 * B}), plugins())
    assert double.bytes.batch == 2 * base.bytes.batch and double.bytes.parameters == base.bytes.parameters
    more = plan(recipe(activation={"name": "batchtopk", "k": 10}), plugins())
    assert more.bytes.pairs == 2 * base.bytes.pairs, "k of the activation is the number of pairs per token"
    of_each = plan(recipe(activation={"name": "batchtopk", "k": [1, 2, 2]}), plugins())
    assert of_each.bytes.pairs == base.bytes.pairs and of_each.bytes.selection == base.bytes.selection
    two = plan(recipe(parallel={"name": "tensor", "tensor": 2}), plugins())
    assert two.ranks == 2 and two.bytes.pairs == base.bytes.pairs / 2, "features are split, and pairs with them"


def test_disk_by_hand():
    disk = plan(recipe(), plugins()).disk
    rows = L * F * (1 + 2)  # of D numbers: the encoder's, and L (L + 1) / 2 * F = 2 L F of the decoder
    numbers = rows * D + L * F + L * D  # with the biases
    assert disk.checkpoint == 3 * 4 * numbers + 8 * L * F, "weights and two moments; idle tokens of each feature"
    assert disk.run == 11 * disk.checkpoint + 4 * numbers, "keep_checkpoints is 10"
    assert disk.activations == (12 * B + 64) * 2 * L * D * 2, "bfloat16; 64 held-out tokens"


def test_the_command_prints_the_keys_that_users_read(tmp_path):
    (tmp_path / "r.toml").write_text(as_toml(recipe()))
    needs = plan(recipe(), plugins())
    done = CliRunner().invoke(main_group, ["plan", str(tmp_path / "r.toml"), "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads(json_text(needs)) and from_data(Plan, printed) == needs
    assert list(printed) == [
        *("layers", "d_model", "features", "parameters", "parameters_by_name", "ranks"),
        *("bytes", "total_bytes", "host_bytes", "flops", "total_flops", "tokens", "disk", "speed"),
    ]
    phases = ["batch", "pre_activations", "selection", "pairs", "written", "model_pass", "in_model", "statistics"]
    assert list(printed["bytes"]) == [*LASTING, *phases]
    assert list(printed["flops"]) == ["encoder", "sparse", "optimizer"]
    for command in (["plan"], ["run", "--dry-run"]):
        done = CliRunner().invoke(main_group, [*command, str(tmp_path / "r.toml")])
        assert done.stdout == as_table(needs) + "\n"
    lines = as_table(needs).splitlines()
    assert lines[:2] == ["layers 3, d_model 6, features 10 per layer", f"parameters {needs.parameters:,}"]
    assert lines[-1] == "times: --gpu NAME, or --measure here"


RELU = {"name": "relu", "target_l0": 20}
STREAM = {"source": {"name": "stream", "text": "python-stdlib", "context": 32}, "model": {"path": "some/model"}}
OUTLINED = '''
from attrs import frozen
from clt_plugins import Outline, Spec, hookimpl

@frozen(kw_only=True)
class Config:
    """A source whose model cannot be trained through."""

@hookimpl
def clt_sources():
    outline = Outline(n_layers=3, d_model=6)
    return [Spec("outlined", Config, lambda config, context: 1 / 0, outline=lambda config, context: outline)]
'''
IN_MODEL = r"losses\[1\]\.name: 'kl' runs the language model in training, which the source '{}' does not"
REFUSED = {
    "nothing leads to the target": ({"activation": RELU}, r"activation\.target_l0: no loss penalises active features"),
    "no model": ({"source": "planted", "losses": ["mse", "kl"]}, IN_MODEL.format("planted")),
    "no model, by the outline": ({"source": "outlined", "losses": ["mse", "kl"]}, IN_MODEL.format("outlined")),
    "contexts": (
        {**STREAM, "losses": ["mse", "kl"], "parallel": {"name": "tensor", "tensor": 1, "data": 8}},
        r"losses\[1\]\.contexts: 4 cannot be divided among 8 data ranks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_refuses_before_its_first_step_is_refused(case, distributions):
    changes, text = REFUSED[case]
    distributions.module("outlined", OUTLINED)
    known = load_plugins(extra=["outlined"])
    changed = read_recipe(tables(**changes), plugins=known)
    sizes = {"n_layers": 3, "d_model": 6} if "model" in changes else {}
    for built in {False, case in ("nothing leads to the target", "no model")}:
        with pytest.raises(Faults, match=text):
            plan(changed, known, built=built, **sizes)


def test_losses_that_run_the_model_of_an_outline_are_planned():
    needs = plan(recipe(**STREAM, losses=["mse", "kl"]), plugins(), n_layers=3, d_model=6)
    assert needs.bytes.in_model > 0
    given = plan(recipe(source="planted", losses=["mse", "kl"]), plugins(), n_layers=3, d_model=6)
    assert given.parameters > 0, "of sizes that are given, nothing tells whether the source runs a model"


@pytest.mark.parametrize(
    ("encoder", "flops", "made"),
    [
        # The product of B x L inputs with F rows of r numbers, then x · W_down and its gradient by W_down.
        ("low_rank", 2 * B * L * F * 2 + 2 * 2 * B * L * D * 2, 2 * 4 * B * L * 2),
        # What the decoder's rows are copied into, with its gradient.
        ("tied", 2 * B * L * F * D, 2 * 4 * L * F * D),
        ("pre_bias", 2 * B * L * F * D, 2 * 4 * B * L * D),
    ],
)
def test_other_encoders_are_counted(encoder: str, flops: int, made: int):
    changed = recipe(encoder=ENCODERS[encoder])
    needs, base = plan(changed, plugins()), plan(recipe(), plugins())
    built = parts(encoder=ENCODERS[encoder])
    assert needs == estimate(built, changed), "without memory it is the same"
    assert needs.parameters == sum(p.numel() for p in built.transcoder.parameters())
    assert needs.flops.encoder == flops
    assert needs.bytes.batch - base.bytes.batch == made


def test_the_precision_of_the_encoder_is_of_no_use_where_it_chooses_nothing():
    """`plan` promised seven times the speed for `train.precision`, where the run has it in no product."""
    for chooses, changes in (
        (False, {"activation": {"name": "relu"}}),  # dense at first
        (False, {"losses": ["mse", "preactivation"]}),  # reads all pre-activations
        (True, {}),
    ):
        for precision, narrow in (("fp32", "float32"), ("bf16", "bfloat16")):
            built = parts(**changes, train={"precision": precision})
            assert work(built, built.context.recipe).product == (narrow if chooses else "float32")
