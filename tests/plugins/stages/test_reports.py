"""Evaluations and conversions as text, as JSON and as metrics; and layers whose scores are not defined."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from clt_plugins.data.batch import Batch
from clt_plugins.files.records import as_data, from_data, json_text, read_json, write_json
from clt_plugins.model.scores import score
from clt_stages import EvaluateConfig
from clt_stages import convert as conversion
from clt_stages import evaluate as evaluation
from clt_stages.convert import Conversion, convert
from clt_stages.evaluate import Evaluation, evaluate
from tests.support.helpers import convert_config, parts, stir
from tests.support.language_models import save_model, save_text

CONFIG = EvaluateConfig(tokens=300, model_tokens=300)


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Evaluation:
    folder = tmp_path_factory.mktemp("gpt2")
    save_model(folder / "gpt2")
    save_text(folder / "text.jsonl", 200)
    source = {"name": "stream", "text": str(folder / "text.jsonl"), "context": 32, "held_out": 0.3, "model_batch": 4}
    built = parts(
        model={"path": str(folder / "gpt2")},
        source={**source, "buffer_tokens": 64},
        transcoder={"features": 128},
        normalisation={"name": "none"},
        train={"batch_tokens": 32},
    )
    return evaluate(built.transcoder, built.source, CONFIG)


class Constant:
    """A source whose targets of layer 1 never change."""

    def __init__(self, source: Any, number: float):
        self.source, self.number = source, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def _changed(self, batch: Batch) -> Batch:
        targets = batch.targets.clone()
        targets[:, 1] = self.number
        return Batch(batch.inputs, targets)

    def next(self) -> Batch:
        return self._changed(self.source.next())

    def held_out(self, tokens: int) -> Iterator[Batch]:
        return map(self._changed, self.source.held_out(tokens))


def test_an_evaluation_as_text_json_and_metrics(judged):
    table = evaluation.as_table(judged)
    assert "zero-ablated" in table and "CE recovered" in table
    assert len([line for line in table.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]) == 3
    again = json.loads(json_text(judged))
    assert again["model"]["cross_entropy"].keys() == {"model", "transcoder", "with_errors", "mean", "zero"}
    metrics = evaluation.as_metrics(judged)
    assert metrics["evaluate/nmse_by_layer"].shape == (3,) and metrics["evaluate/density"].shape == (3, 128)
    assert metrics["evaluate/kl_transcoder"] == judged.model.kl.transcoder


def test_an_evaluation_has_the_keys_that_users_read(judged):
    """Users' scripts read these files: keys and their order stay."""
    TOLD = ["notes", "made_from"]
    scores = ["nmse", "explained_variance", "l0", "dead_fraction", "dense_fraction"]
    data = as_data(judged)
    assert list(data) == ["tokens", *scores, "by_layer", "dense_above", "density_histogram", "model", *TOLD]
    assert list(data["by_layer"]) == scores
    assert list(data["density_histogram"]) == ["log10_edges", "counts"]
    recovered = ["ce_recovered", "ce_recovered_of_mean", "largest_logit_error_with_errors"]
    assert list(data["model"]) == ["tokens", "cross_entropy", "kl", "top1", *recovered]


def test_reports_are_read_back_as_they_were_written(judged, tmp_path):
    write_json(tmp_path / "evaluation.json", judged)
    again = read_json(tmp_path / "evaluation.json", Evaluation)
    assert as_data(again) == as_data(judged)
    assert again.density is None, "the file does not hold it"


@pytest.mark.parametrize("number", [0.0, 0.1, 1e4])
def test_a_layer_with_constant_targets_has_no_nmse_and_the_rest_is_as_ever(number, tmp_path):
    built = parts()
    stir(built.transcoder)
    source = Constant(built.source, number)
    report = evaluate(built.transcoder, source, EvaluateConfig(tokens=2000, model_tokens=0))
    plain = evaluate(built.transcoder, built.source, EvaluateConfig(tokens=2000, model_tokens=0))
    for name in ("nmse", "explained_variance"):
        scores, others = getattr(report.by_layer, name), getattr(plain.by_layer, name)
        assert scores[1] is None
        assert [scores[0], scores[2]] == [others[0], others[2]]
        assert getattr(report, name) == pytest.approx((scores[0] + scores[2]) / 2)
    assert report.by_layer.l0 == plain.by_layer.l0
    write_json(tmp_path / "evaluation.json", report)
    assert json.loads((tmp_path / "evaluation.json").read_text())["by_layer"]["nmse"][1] is None
    assert from_data(Evaluation, as_data(report)).by_layer == report.by_layer
    row = next(line for line in evaluation.as_table(report).splitlines() if line.split()[0] == "1")
    assert row.split()[1:3] == ["-", "-"]
    metrics = evaluation.as_metrics(report)["evaluate/nmse_by_layer"]
    assert metrics.isnan().tolist() == [False, True, False]


def test_a_transcoder_without_any_score_is_reported_all_the_same():
    """Every layer constant: null for the mean too, and no such metric."""
    built = parts()
    still = [Batch(batch.inputs, torch.ones_like(batch.targets)) for batch in built.source.held_out(64)]
    scores = score(built.transcoder, still)
    assert math.isnan(scores.nmse) and scores.nmse_by_layer.isnan().all()
    source = Constant(built.source, 1.0)
    source.held_out = lambda tokens: iter(still)
    report = evaluate(built.transcoder, source, EvaluateConfig(tokens=64, model_tokens=0))
    assert report.nmse is None and report.l0 == pytest.approx(5)
    assert "evaluate/nmse" not in evaluation.as_metrics(report)
    assert json.loads(json_text(report))["nmse"] is None
    assert "-" in evaluation.as_table(report)


def test_a_conversion_with_a_constant_layer_is_reported_too():
    built = parts()
    stir(built.transcoder)
    config = convert_config(tokens=512, calibration_tokens=512, tolerance=0.05)
    _, report = convert(built.transcoder, Constant(built.source, 2.0), config)
    assert report.before.nmse[1] is None and report.after.nmse[1] is None
    assert report.before.nmse[0] is not None
    assert from_data(Conversion, json.loads(json_text(report))) == report
    assert "- ->      -" in conversion.as_table(report)


def test_a_conversion_has_the_keys_that_users_read():
    built = parts()
    stir(built.transcoder)
    config = convert_config(tokens=512, calibration_tokens=512, tolerance=0.05)
    _, report = convert(built.transcoder, built.source, config)
    data = as_data(report)
    tokens = ["calibration_tokens", "report_tokens"]
    assert list(data) == [
        "thresholds",
        "calibrated_to",
        "scales",
        "unseen_features",
        *tokens,
        "before",
        "after",
        "l0_change",
        "made_from",
    ]
    assert list(data["before"]) == list(data["after"]) == ["l0", "nmse", "explained_variance"]


def test_one_held_out_token_is_too_few_to_score():
    built = parts()
    with pytest.raises(ValueError, match=r"source: yields 1 held-out tokens .* but a variance needs 2"):
        score(built.transcoder, built.source.held_out(1))


def test_files_of_another_format_say_so(tmp_path: Path):
    from clt_plugins import CrossLayerTranscoder

    parts().transcoder.save(tmp_path / "t")
    file, manifest = tmp_path / "t/transcoder.json", tmp_path / "t/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=rf"^{manifest}: written in format 2, this version reads 1$"):
        CrossLayerTranscoder.load(tmp_path / "t")
    data = json.loads(file.read_text())
    assert list(data) == [
        *("format", "clt_plugins", "layers", "d_model", "features", "dtype", "normalisation", "model"),
        *("encoder", "activation", "tying", "step", "tokens"),
    ]
