"""A decoder that stays on disk: the same numbers, in little memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.support.commands import python
from tests.support.exports import ACTIVATIONS, circuit_tracer_forward, close, export, inputs, load, make


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_left_on_disk_it_computes_the_same_and_saves_the_same(activation, dtype, tmp_path):
    transcoder = make(ACTIVATIONS[activation])
    folder = export(transcoder, "circuit-tracer", tmp_path / "out", dtype=dtype)
    eager = load(folder, lazy=False)
    lazy = load(folder, lazy=True)
    assert type(eager.tying) is not type(lazy.tying)
    x = inputs()
    for dense in (True, False):
        eager.runs_dense = lazy.runs_dense = dense
        close(lazy(x).detach(), eager(x).detach(), 1e-6)
    close(lazy.tying.norms(), eager.tying.norms(), 1e-6)
    lazy.save(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert saved.choices["tying"].name == "untied"
    close(saved(x).detach(), eager(x).detach(), 1e-6)
    further = export(lazy, "circuit-tracer", tmp_path / "further")
    close(circuit_tracer_forward(further, x), eager(x).detach(), 1e-5)


def test_a_large_decoder_is_not_read_whole(tmp_path):
    """The most memory a process takes, where it looks at five features of a decoder of 168 MB."""
    features, width, layers = 20_000, 100, 6
    for i in range(layers):
        encoder = {f"W_enc_{i}": torch.zeros(features, width), f"b_enc_{i}": torch.full((features,), -1.0)}
        encoder[f"b_enc_{i}"][:5] = 1.0
        save_file(encoder, tmp_path / f"W_enc_{i}.safetensors")
        rows = torch.zeros(features, layers - i, width)
        rows[:5] = 1.0
        save_file({f"W_dec_{i}": rows}, tmp_path / f"W_dec_{i}.safetensors")
    decoder = sum(path.stat().st_size for path in tmp_path.glob("W_dec_*")) / 2**20
    script = f"""
import pathlib, torch
from clt_plugins import CrossLayerTranscoder
from clt_plugins.registry.build import build

def most():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

transcoder = CrossLayerTranscoder.load({str(tmp_path)!r}, lazy=LAZY)
out = transcoder(torch.zeros(1, {layers}, {width}))
assert torch.equal(out, 5.0 * torch.arange(1, {layers} + 1)[None, :, None].expand(1, {layers}, {width}))
print(most())
"""
    most = {}
    for lazy in (True, False):
        done = python("-c", script.replace("LAZY", str(lazy)))
        assert done.returncode == 0, done.stderr
        most[lazy] = float(done.stdout.split()[-1])
    assert most[True] < most[False] - 0.6 * decoder, f"MB: {most}, decoder {decoder:.0f}"
