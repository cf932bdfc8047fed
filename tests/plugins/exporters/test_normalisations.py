"""What exporters do with a normalisation that no weights can hold, or that their format has no place for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clt_plugins import AffineNormalisation, Faults, Folding, Refused
from tests.support.exports import MODEL, exporter, make
from tests.support.helpers import parts

FORMATS = ("circuit-tracer", "saelens", "safetensors", "crosslayer-coding")


class LayerNorm(AffineNormalisation):
    """Inputs are divided by the deviation of each token."""

    def inputs(self, raw: Tensor) -> Tensor:
        return (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True)

    def fold(self) -> Folding:
        raise Refused("normalisation", "layer_norm differs between tokens: train with another one to export")


@pytest.mark.parametrize("name", FORMATS)
def test_what_cannot_be_folded_is_refused_before_training_and_nothing_is_written(name, tmp_path):
    one = exporter(name)
    for transcoder in (parts(activation={"name": "jumprelu"}).transcoder, make()):
        transcoder.described_model = dict(MODEL)
        assert one.check(transcoder) == []
        transcoder.normaliser = LayerNorm(transcoder.context)
        (complaint,) = one.check(transcoder)
        assert complaint == "normalisation: layer_norm differs between tokens: train with another one to export"
    with pytest.raises(Faults, match="layer_norm differs between tokens"):
        one.export(transcoder, tmp_path)
    assert not list(tmp_path.iterdir())
    assert transcoder(torch.randn(5, 3, 6)).shape == (5, 3, 6), "it trains and evaluates all the same"


def test_a_matrix_has_no_place_in_a_checkpoint_of_crosslayer_coding(tmp_path):
    one, transcoder = exporter("crosslayer-coding"), make(normalisation="whitening")
    (complaint,) = one.check(transcoder)
    assert complaint.startswith("normalisation: whitening mixes dimensions, and crosslayer-coding has a mean and a")
    with pytest.raises(Faults, match="whitening mixes dimensions"):
        one.export(transcoder, tmp_path)
    assert not list(tmp_path.iterdir())
