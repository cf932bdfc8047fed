"""The number of threads of the compiled kernels: what the environment says, and one for small products."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PRODUCT = """
import sys, numba, torch
from clt_kernels.cpu.kernels import NumbaKernels
from clt_plugins import Layout, Pairs

tokens, d_model = map(int, sys.argv[1:])
layout = Layout.untied(3, 8)
pairs = Pairs.from_mask(torch.ones(tokens, 3, 8, dtype=torch.bool))
out = torch.empty(tokens, 3, d_model)
NumbaKernels().decode(torch.ones(len(pairs.token)), pairs, layout, torch.ones(layout.rows, d_model), out)
print(torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.parametrize(
    "omp, tokens, threads",
    [
        ("1", 2000, "1 1"),  # torchrun sets OMP_NUM_THREADS=1: Numba's own number must not raise torch's
        ("2", 2000, "2 2"),
        ("2", 4, "2 1"),  # a product of microseconds does not wait for a second thread
    ],
)
def test_kernels_use_the_threads_that_the_environment_allows(omp, tokens, threads):
    environment = {**os.environ, "OMP_NUM_THREADS": omp, "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-c", PRODUCT, str(tokens), "64"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == threads.split(), done.stderr
