"""Loggers, exporters and kernels that are wrong in one way each: the kit finds the fault and says where to look."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.faulty import HEADER, LOGGER

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


def test_a_logger_that_blocks(failures: Any) -> None:
    assert failures(HEADER + LOGGER, SLOW="", CLOSE="self.file.close()") == {}
    found = failures(HEADER + LOGGER, only="prompt", SLOW="time.sleep(0.06 * (step == 300))", CLOSE="self.file.close()")
    assert "expected: log to return within 0.05 s" in found["mine/prompt"]


def test_a_logger_that_does_not_flush(failures: Any) -> None:
    found = failures(HEADER + LOGGER, only="flush", SLOW="", CLOSE="pass")
    assert "flush and close files" in found["mine/flush"]


@pytest.mark.parametrize(
    "name", ["b_enc", "b_dec", "normaliser.input_shift", "W_skip", "feature_offset", "feature_scale"]
)
def test_an_exporter_that_drops_a_tensor(failures: Any, name: str) -> None:
    found = failures(HEADER + EXPORTER, DROP=f"tensors.pop({name!r}, None)")
    assert found.keys() == {"mine/every_tensor"}
    assert f"expected: {name} " in found["mine/every_tensor"]


def test_an_exporter_that_drops_nothing(failures: Any) -> None:
    assert failures(HEADER + EXPORTER, DROP="") == {}


@pytest.mark.parametrize(
    ("faults", "text"),
    [
        ("['activation: not to my taste']", "got: it wrote, though ['activation: not to my taste']"),
        ("['activation: unseen'] if transcoder.W_enc.is_meta else []", "the same of a transcoder on the device meta"),
        ("['not to my taste']", "expected: a list of texts `setting: what is wrong: remedy`"),
        ("None", "got: None"),
        ("[]", ""),
    ],
)
def test_an_exporter_whose_check_is_not_what_it_does(failures: Any, faults: str, text: str) -> None:
    method = f"class Exporter:\n    def check(self, transcoder):\n        return {faults}\n"
    found = failures(HEADER + EXPORTER, DROP="", **{"class Exporter:": method})
    assert found.keys() == ({"mine/before_training"} if text else set())
    assert text in found.get("mine/before_training", "")


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
