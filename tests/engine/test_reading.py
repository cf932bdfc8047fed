"""What ranks compare of what they read: every bit, and the order of rows."""

from __future__ import annotations

import pytest
import torch

from clt_plugins.data.batch import Batch
from clt_plugins.distributed.reading import fingerprint


def batch(dtype: torch.dtype, d_model: int, rows: int = 7) -> Batch:
    draw = torch.Generator().manual_seed(0)
    return Batch(*(torch.randn(rows, 3, d_model, generator=draw).to(dtype) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("d_model", [5, 8])
def test_a_change_of_any_bit_and_of_the_order_changes_the_fingerprint(dtype, d_model):
    one = batch(dtype, d_model)
    first = fingerprint(one)
    assert first.shape == () and first.dtype == torch.int64
    assert torch.equal(first, fingerprint(Batch(one.inputs.clone(), one.targets.clone())))
    order = torch.tensor([1, 0, *range(2, 7)])
    changed = [one.rows(order), Batch(one.targets, one.inputs), Batch(one.inputs[order], one.targets)]
    bits = torch.int16 if one.inputs.element_size() == 2 else torch.int32
    for side in range(2):
        for bit in range(8 * one.inputs.element_size() * 2):  # of two neighbouring numbers
            tensors = [one.inputs.clone(), one.targets.clone()]
            words = tensors[side][4, 1, 2:4].view(bits)
            width = 8 * words.element_size()
            words[bit // width] ^= torch.tensor(1, dtype=bits) << (bit % width)
            changed.append(Batch(*tensors))
    assert int(first) not in {int(fingerprint(other)) for other in changed}


def test_a_batch_that_is_a_part_of_a_larger_one_has_the_same_fingerprint():
    whole = batch(torch.bfloat16, 5, rows=8)  # rows of 30 bytes: a part may begin between words
    for begin in range(4):
        part = whole.rows(slice(begin, begin + 4))
        own = Batch(part.inputs.clone(), part.targets.clone())
        assert torch.equal(fingerprint(part), fingerprint(own))
