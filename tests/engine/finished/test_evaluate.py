"""Evaluation in the language model, against transformers' own forward pass and transcoders that are known exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from clt_plugins.contract.recipe import EvaluateConfig
from clt_plugins.finished.evaluate import as_json, as_metrics, as_table, evaluate
from clt_plugins.model.assemble import Parts
from clt_plugins.model.transcoder import CrossLayerTranscoder
from tests.support.helpers import ACTIVATIONS, parts, stir
from tests.support.language_models import save_model, save_text

SHIPPED = Path(__file__).parents[3] / "examples/models/stdlib-gpt2"
CONFIG = EvaluateConfig(tokens=300, model_tokens=300)
UNMOVED = ("model", "with_errors", "mean", "zero")


def stream(folder: Path, family: str = "gpt2", **changes: Any) -> Parts:
    """A small transcoder of a random model of 3 layers x 32, and the stream that it reads."""
    if not (folder / family).exists():
        save_model(folder / family, family)
        save_text(folder / "text.jsonl", 200)
    model = {"path": str(folder / family), **changes.pop("model", {})}
    source = {"name": "stream", "text": str(folder / "text.jsonl"), "context": 32, "held_out": 0.3, "model_batch": 4}
    settings = {"features": 128, "normalisation": "none", **changes.pop("transcoder", {})}
    source.update({"buffer_tokens": 64, **changes.pop("source", {})})
    return parts(model=model, source=source, transcoder=settings, train={"batch_tokens": 32}, **changes)


def memorise(transcoder: CrossLayerTranscoder, folder: Path) -> None:
    """Make a ReLU transcoder the MLPs of a GPT-2 with ReLU: each feature a neuron that writes to its own layer only."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tensors = transcoder.tensors()
    with torch.no_grad():
        for layer, block in enumerate(model.transformer.h):
            tensors["W_enc"][layer] = block.mlp.c_fc.weight.T
            tensors["b_enc"][layer] = block.mlp.c_fc.bias
            tensors[f"W_dec.{layer:02}"].zero_()
            tensors[f"W_dec.{layer:02}"][:, 0] = block.mlp.c_proj.weight
            tensors["b_dec"][layer] = block.mlp.c_proj.bias


@pytest.fixture(scope="module")
def relu_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("relu")
    save_model(folder / "gpt2")
    save_text(folder / "text.jsonl", 200)
    config = json.loads((folder / "gpt2/config.json").read_text())
    (folder / "gpt2/config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    return folder


@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_a_transcoder_that_is_the_mlps_changes_nothing(relu_model, path):
    found = stream(relu_model, activation={"name": "relu"}, transcoder={"path": path})
    memorise(found.transcoder, relu_model / "gpt2")
    report = evaluate(found.transcoder, found.source, CONFIG)
    assert report["nmse"] < 1e-10 and report["explained_variance"] > 1 - 1e-10
    inside = report["model"]
    assert inside["ce_recovered"] == pytest.approx(1, abs=1e-6)
    assert inside["kl"]["transcoder"] == pytest.approx(0, abs=1e-6)
    assert inside["top1"]["transcoder"] == 1
    assert inside["cross_entropy"]["transcoder"] == pytest.approx(inside["cross_entropy"]["model"], abs=1e-6)
    assert inside["kl"]["zero"] > 0.01 and inside["kl"]["mean"] > 0.01, "the MLPs matter"


@pytest.mark.parametrize("pack", [True, False])
def test_cross_entropies_are_those_of_transformers(relu_model, pack):
    """Each piece of text alone, plain transformers, the MLPs of positions after the first put to zero by a hook."""
    found = stream(relu_model, source={"pack": pack})
    report = evaluate(found.transcoder, found.source, CONFIG)["model"]
    model = transformers.AutoModelForCausalLM.from_pretrained(relu_model / "gpt2").eval()
    language = found.source.language_model()
    sums = {"model": 0.0, "zero": 0.0}
    count = 0
    for text in language.held_out(CONFIG.model_tokens):
        wanted = {int(row): int(after) for row, after in zip(text.rows, language.following(text), strict=True)}
        length = text.ids.shape[1]
        for context in range(len(text.ids)):
            starts = [p for p in range(length) if text.position_ids[context, p] == 0]
            for begin, end in zip(starts, [*starts[1:], length], strict=True):
                ids = text.ids[context, begin:end]
                rows = [row for row in range(begin, end) if wanted.get(context * length + row, -1) >= 0]
                if not rows:
                    continue
                for row in rows:
                    assert wanted[context * length + row] == int(text.ids[context, row + 1])
                kept = torch.tensor([context * length + row in wanted for row in range(begin, end)])
                places = torch.tensor(rows) - begin
                for name in sums:
                    hooks = []
                    if name == "zero":
                        zero = lambda _, args, out, kept=kept: out.masked_fill(kept[None, :, None], 0)  # noqa: E731
                        hooks = [block.mlp.register_forward_hook(zero) for block in model.transformer.h]
                    with torch.no_grad():
                        logits = model(ids[None]).logits[0, places]
                    sums[name] += float(torch.nn.functional.cross_entropy(logits, ids[places + 1], reduction="sum"))
                    for hook in hooks:
                        hook.remove()
                count += len(rows)
    assert report["tokens"] == count > 100
    for name, total in sums.items():
        assert report["cross_entropy"][name] == pytest.approx(total / count, abs=1e-4)


FAMILIES = {
    "gpt2": {},
    "llama": {},
    "gemma2": {"outputs": "model.layers.{}.post_feedforward_layernorm"},
    "gpt_neox": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_errors_added_back_it_is_the_model_in_every_family(family, tmp_path):
    found = stream(tmp_path, family, model=FAMILIES[family])
    stir(found.transcoder)
    inside = evaluate(found.transcoder, found.source, CONFIG)["model"]
    assert inside["largest_logit_error_with_errors"] <= 1e-4
    assert inside["kl"]["transcoder"] > 1e-3, "without the errors it is not"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tying", ["untied-skip", "per_target"])
def test_with_errors_added_back_it_is_the_model_whatever_the_choices(activation, tying, relu_model):
    from tests.support.helpers import TYINGS

    found = stream(relu_model, activation=ACTIVATIONS[activation], tying=TYINGS[tying])
    stir(found.transcoder)
    for dense in {False, found.transcoder.runs_dense}:
        found.transcoder.runs_dense = dense
        inside = evaluate(found.transcoder, found.source, CONFIG)["model"]
        assert inside["largest_logit_error_with_errors"] <= 1e-4
        assert inside["kl"]["transcoder"] > 1e-3


def test_later_layers_read_what_earlier_replacements_wrote(relu_model):
    """Only the first layer is badly replaced; a perfect second layer then answers to what it reads now."""
    found = stream(relu_model, activation={"name": "relu"})
    memorise(found.transcoder, relu_model / "gpt2")
    with torch.no_grad():
        # (A shift of all dimensions alike would vanish in the next normalisation.)
        found.transcoder.tensors()["b_dec"][0] += torch.arange(32).remainder(3.0)
    inside = evaluate(found.transcoder, found.source, CONFIG)["model"]
    model = transformers.AutoModelForCausalLM.from_pretrained(relu_model / "gpt2").eval()
    language = found.source.language_model()
    text = next(language.held_out(40))
    kept = torch.zeros(text.ids.numel(), dtype=torch.bool)
    kept[text.rows] = True
    shift = kept.view(text.ids.shape)[..., None] * torch.arange(32).remainder(3.0)
    model.transformer.h[0].mlp.register_forward_hook(lambda _, args, out: out + shift)
    with torch.no_grad():
        wanted = model(text.ids, position_ids=text.position_ids, use_cache=False).logits.flatten(0, 1)[text.rows]
    from clt_plugins.finished.in_model import Replacement

    clean: list[torch.Tensor] = []
    language.run(text, lambda layer, read, written: clean.append(read))
    replaced = Replacement(found.transcoder, torch.stack(clean, 1))
    logits = language.run(text, lambda layer, read, written: replaced(layer, read))
    assert (logits - wanted).abs().max() < 1e-4
    assert inside["kl"]["transcoder"] > 1e-3


def test_dead_and_dense_features_and_densities_are_counted(relu_model):
    found = stream(relu_model, activation={"name": "relu"})
    with torch.no_grad():
        found.transcoder.W_enc.zero_()
        found.transcoder.b_enc.fill_(-1.0)
        found.transcoder.b_enc[0, :32] = 1.0
        found.transcoder.b_enc[2, :64] = 1.0
    report = evaluate(found.transcoder, found.source, EvaluateConfig(tokens=300, model_tokens=0))
    assert report["model"] is None
    assert report["by_layer"]["dead_fraction"] == [0.75, 1.0, 0.5]
    assert report["by_layer"]["dense_fraction"] == [0.25, 0.0, 0.5]
    assert report["by_layer"]["l0"] == [32, 0, 64]
    counts = report["density_histogram"]["counts"]
    assert [sum(each) for each in counts] == [32, 0, 64]
    assert [each[-1] for each in counts] == [32, 0, 64], "all at a density of 1"


# Where training takes each number of a report, by its path there: "falls", "rises", "stays" (to the last bit, but for
# rounding); of a list, in every layer. None: either, as chance has it.
SPLICED: dict[str, str | None] = {
    "tokens": "stays",
    "nmse": "falls",
    "by_layer.nmse": "falls",
    "explained_variance": "rises",
    "by_layer.explained_variance": "rises",
    "dead_fraction": "rises",  # nothing here revives features, and of random ones hardly any is never chosen
    "by_layer.dead_fraction": "rises",
    "dense_above": "stays",
    "density_histogram.log10_edges": "stays",
    "lower_quartile_of_density": "falls",
    "model.tokens": "stays",
    "model.cross_entropy.transcoder": "falls",
    "model.kl.transcoder": "falls",
    "model.top1.transcoder": "rises",
    "model.ce_recovered": "rises",
    "model.ce_recovered_of_mean": "rises",
    "model.largest_logit_error_with_errors": "stays",
    # What does not depend on the transcoder, or only by errors that cancel.
    **{f"model.{of}.{name}": "stays" for of in ("cross_entropy", "kl", "top1") for name in UNMOVED},
}
TRAINED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, str | None]]] = {
    # k is given; a random encoder spreads it over its features by chance, a trained one has frequent and rare ones.
    "batchtopk": (
        {"name": "batchtopk", "k": 12},
        [{"name": "mse"}],
        {
            "l0": "stays",
            "by_layer.l0": None,  # the layers share k out anew
            "dense_fraction": "rises",
            "by_layer.dense_fraction": None,  # few features are dense, in some layers none
            "density_histogram.frequent": "rises",
            "density_histogram.rare": "falls",
        },
    ),
    # The penalty makes features rare that a random encoder activates at every tenth token.
    "jumprelu": (
        {"name": "jumprelu", "threshold": 0.5, "bandwidth": 0.5},
        [{"name": "mse"}, {"name": "tanh_sparsity", "weight": 0.05, "schedule": "constant"}],
        {
            "l0": "falls",
            "by_layer.l0": "falls",
            "dense_fraction": "falls",
            "by_layer.dense_fraction": "falls",
            "density_histogram.frequent": "falls",
            "density_histogram.rare": "rises",
        },
    ),
}


def numbers(report: dict[str, Any]) -> dict[str, Any]:
    """Every number and list of a report by its dotted path; of what is counted by feature, a summary."""
    report = dict(report)
    density = report.pop("density")
    assert float(density.sum()) == pytest.approx(report["l0"])
    assert float((density == 0).double().mean()) == pytest.approx(report["dead_fraction"])
    out = {"lower_quartile_of_density": float(density.flatten().quantile(0.25))}

    def walk(table: dict[str, Any], above: str) -> None:
        for name, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{above}{name}.")
            else:
                out[above + name] = value

    walk(report, "")
    edges = out["density_histogram.log10_edges"]
    counts = torch.tensor(out.pop("density_histogram.counts")).sum(0)
    frequent = torch.tensor(edges[:-1]) >= -1.5
    out["density_histogram.frequent"] = int(counts[frequent].sum())
    out["density_histogram.rare"] = int(counts[~frequent].sum())
    return out


@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_every_number_in_the_direction_it_should(name, tmp_path):
    from clt_plugins import run
    from tests.support.helpers import tables

    activation, losses, directions = TRAINED[name]
    chosen = tables(
        model={"path": str(SHIPPED)},
        source={"name": "stream", "context": 64, "buffer_tokens": 4096},
        transcoder={"features": 256, "normalisation_tokens": 4096, "normalisation": "mean_std"},
        activation=activation,
        losses=losses,
        train={"steps": 40, "batch_tokens": 512, "lr": 4e-3, "log_every": 40, "eval_every": 40, "checkpoint_every": 40},
    )
    config = EvaluateConfig(tokens=2048, model_tokens=1024, dense_above=0.05)
    trained = run(chosen, out=tmp_path / "run")
    fresh = parts(**chosen)
    fresh.transcoder.normaliser.load_state_dict(trained.normaliser.state_dict())
    before, after = (numbers(evaluate(each, fresh.source, config)) for each in (fresh.transcoder, trained))
    directions = {**SPLICED, **directions}
    assert before.keys() == after.keys() == directions.keys(), "a direction for every number, and none for another"
    for path, direction in directions.items():
        old, new = (each if isinstance(each, list) else [each] for each in (before[path], after[path]))
        for a, b in zip(old, new, strict=True):
            if direction == "stays":
                assert b == pytest.approx(a, rel=1e-5, abs=1e-5), path
            elif direction is not None:
                assert (b < a) if direction == "falls" else (b > a), (path, a, b)
    # Well beyond chance, where it counts.
    assert after["nmse"] < 0.8 * before["nmse"]
    assert after["model.ce_recovered"] > before["model.ce_recovered"] + 0.1
    for inside in (before, after):
        assert inside["model.cross_entropy.with_errors"] == pytest.approx(inside["model.cross_entropy.model"], abs=1e-5)
        assert inside["model.cross_entropy.model"] < inside["model.cross_entropy.transcoder"]
        assert inside["model.cross_entropy.model"] < inside["model.cross_entropy.mean"]
        assert inside["model.largest_logit_error_with_errors"] <= 1e-4


def test_reports_as_text_json_and_metrics(relu_model):
    found = stream(relu_model)
    report = evaluate(found.transcoder, found.source, CONFIG)
    table = as_table(report)
    assert "zero-ablated" in table and "CE recovered" in table
    assert len([line for line in table.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]) == 3
    again = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert again["model"]["cross_entropy"].keys() == {"model", "transcoder", "with_errors", "mean", "zero"}
    metrics = as_metrics(report)
    assert metrics["evaluate/nmse_by_layer"].shape == (3,) and metrics["evaluate/density"].shape == (3, 128)
    assert metrics["evaluate/kl_transcoder"] == report["model"]["kl"]["transcoder"]


def test_another_model_is_refused(relu_model):
    found = stream(relu_model)
    other = stream(relu_model, model={"layers": [0, 2]})
    with pytest.raises(ValueError, match="gives 2 layers of d_model 32, but the transcoder is for 3 layers"):
        evaluate(found.transcoder, other.source, CONFIG)
