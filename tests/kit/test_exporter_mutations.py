"""Mutations of an exporter that is read back, which the kit once let pass: each is found, by one failure."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER, assert_only

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
        (
            {"DROP": "assert all(x.detach().numpy().size for x in tensors.values())"},
            "every_choice",
            "numpy has no bfloat16, so widen tensors first: `x.float()`",
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
        "numpy",
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
