"""Exports to SAELens and crosslayer-coding, loaded by these tools, each in its own environment.

`python -m tests.interop` makes the environments and runs these tests.
"""

from __future__ import annotations

import pytest

from tests.interop.common import ACTIVATIONS, TYINGS, export, interpreter, make, script

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("skip", [False, True])
def test_sae_lens_computes_the_same(activation, skip, tmp_path):
    python = interpreter("sae-lens")
    transcoder = make(ACTIVATIONS[activation], {"name": "per_source", "feature_scale": True, "skip": skip})
    folder, expected = export(transcoder, "saelens", tmp_path)
    result = script(python, "sae_lens_check.py", folder, expected)
    assert max(result["features"]) < 1e-5, result
    assert max(result["decoded"]) < 1e-5, result
    kind = ("jumprelu_" if activation == "jumprelu" else "") + ("skip_transcoder" if skip else "transcoder")
    assert set(result["architectures"]) == {kind}


@pytest.mark.parametrize("tying", [*TYINGS, "affine"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_library_computes_the_same(tying, activation, tmp_path):
    python = interpreter("crosslayer-coding")
    affine = {"name": "per_target", "feature_offset": True, "feature_scale": True, "skip": True}
    transcoder = make(ACTIVATIONS[activation], {**TYINGS, "affine": affine}[tying])
    folder, expected = export(transcoder, "crosslayer-coding", tmp_path)
    assert script(python, "reference_check.py", folder, expected)["decoded"] < 1e-5
