"""Evaluation in the language model, against transformers' own forward pass and transcoders that are known exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from clt_plugins.model.assemble import Parts
from clt_plugins.model.transcoder import CrossLayerTranscoder
from clt_stages import EvaluateConfig
from clt_stages.evaluate import evaluate
from tests.support.helpers import ACTIVATIONS, parts, stir
from tests.support.language_models import save_model, save_text

CONFIG = EvaluateConfig(tokens=300, model_tokens=300)


def stream(folder: Path, family: str = "gpt2", **changes: Any) -> Parts:
    """A small transcoder of a random model of 3 layers x 32, and the stream that it reads."""
    if not (folder / family).exists():
        save_model(folder / family, family)
        save_text(folder / "text.jsonl", 200)
    model = {"path": str(folder / family), **changes.pop("model", {})}
    source = {"name": "stream", "text": str(folder / "text.jsonl"), "context": 32, "held_out": 0.3, "model_batch": 4}
    settings = {"features": 128, **changes.pop("transcoder", {})}
    changes = {"normalisation": {"name": "none"}, **changes}
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
    assert report.nmse < 1e-10 and report.explained_variance > 1 - 1e-10
    inside = report.model
    if inside.cross_entropy.zero > inside.cross_entropy.model:  # else there is nothing to recover in this random model
        assert inside.ce_recovered == pytest.approx(1, abs=1e-6)
    assert inside.kl.transcoder == pytest.approx(0, abs=1e-6)
    assert inside.top1.transcoder == 1
    assert inside.cross_entropy.transcoder == pytest.approx(inside.cross_entropy.model, abs=1e-6)
    assert inside.kl.zero > 0.01 and inside.kl.mean > 0.01, "the MLPs matter"


@pytest.mark.parametrize("pack", [True, False])
def test_cross_entropies_are_those_of_transformers(relu_model, pack):
    """Each piece of text alone, plain transformers, the MLPs of positions after the first put to zero by a hook."""
    found = stream(relu_model, source={"pack": pack})
    report = evaluate(found.transcoder, found.source, CONFIG).model
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
    assert report.tokens == count > 100
    for name, total in sums.items():
        assert getattr(report.cross_entropy, name) == pytest.approx(total / count, abs=1e-4)


FAMILIES = {
    "gpt2": {},
    "llama": {},
    "gemma2": {},
    "granite": {},
    "gpt_neox": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_errors_added_back_it_is_the_model_in_every_family(family, tmp_path):
    found = stream(tmp_path, family, model=FAMILIES[family])
    stir(found.transcoder)
    inside = evaluate(found.transcoder, found.source, CONFIG).model
    assert inside.largest_logit_error_with_errors <= 1e-4
    assert inside.kl.transcoder > 1e-3, "without the errors it is not"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tying", ["untied-skip", "per_target"])
def test_with_errors_added_back_it_is_the_model_whatever_the_choices(activation, tying, relu_model):
    from tests.support.helpers import TYINGS

    found = stream(relu_model, activation=ACTIVATIONS[activation], tying=TYINGS[tying])
    stir(found.transcoder)
    for dense in {False, found.transcoder.runs_dense}:
        found.transcoder.runs_dense = dense
        inside = evaluate(found.transcoder, found.source, CONFIG).model
        assert inside.largest_logit_error_with_errors <= 1e-4
        assert inside.kl.transcoder > 1e-3


def test_later_layers_read_what_earlier_replacements_wrote(relu_model):
    """Only the first layer is badly replaced; a perfect second layer then answers to what it reads now."""
    found = stream(relu_model, activation={"name": "relu"})
    memorise(found.transcoder, relu_model / "gpt2")
    with torch.no_grad():
        # (A shift of all dimensions alike would vanish in the next normalisation.)
        found.transcoder.tensors()["b_dec"][0] += torch.arange(32).remainder(3.0)
    inside = evaluate(found.transcoder, found.source, CONFIG).model
    model = transformers.AutoModelForCausalLM.from_pretrained(relu_model / "gpt2").eval()
    language = found.source.language_model()
    text = next(language.held_out(40))
    kept = torch.zeros(text.ids.numel(), dtype=torch.bool)
    kept[text.rows] = True
    shift = kept.view(text.ids.shape)[..., None] * torch.arange(32).remainder(3.0)
    model.transformer.h[0].mlp.register_forward_hook(lambda _, args, out: out + shift)
    with torch.no_grad():
        wanted = model(text.ids, position_ids=text.position_ids, use_cache=False).logits.flatten(0, 1)[text.rows]
    from clt_plugins.model.in_model.replacement import Replacement

    clean: list[torch.Tensor] = []
    language.run(text, lambda layer, read, written: clean.append(read))
    replaced = Replacement(found.transcoder, torch.stack(clean, 1))
    logits = language.run(text, lambda layer, read, written: replaced(layer, read))
    assert (logits - wanted).abs().max() < 1e-4
    assert inside.kl.transcoder > 1e-3


def test_dead_and_dense_features_and_densities_are_counted(relu_model):
    found = stream(relu_model, activation={"name": "relu"})
    with torch.no_grad():
        found.transcoder.W_enc.zero_()
        found.transcoder.b_enc.fill_(-1.0)
        found.transcoder.b_enc[0, :32] = 1.0
        found.transcoder.b_enc[2, :64] = 1.0
    report = evaluate(found.transcoder, found.source, EvaluateConfig(tokens=300, model_tokens=0))
    assert report.model is None
    assert report.by_layer.dead_fraction == [0.75, 1.0, 0.5]
    assert report.by_layer.dense_fraction == [0.25, 0.0, 0.5]
    assert report.by_layer.l0 == [32, 0, 64]
    counts = report.density_histogram.counts
    assert [sum(each) for each in counts] == [32, 0, 64]
    assert [each[-1] for each in counts] == [32, 0, 64], "all at a density of 1"
