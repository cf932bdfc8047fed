"""GPUs by their published ceilings, and the shares of them that a training step is assumed to reach.

The ceilings are those of NVIDIA's data sheets and architecture white papers: "NVIDIA H100 Tensor Core GPU Architecture"
and the data sheets of H100 and H200; "NVIDIA A100 Tensor Core GPU Architecture"; "NVIDIA Ada GPU Architecture" and the
data sheets of L40S and L4; "NVIDIA Ampere GA102 GPU Architecture" and the data sheet of RTX A6000. They are dense,
without sparsity, accumulated in float32. A link is one direction of NVLink, or of PCIe where there is none.

The shares are assumptions. They are not measured on a device.
"""

from __future__ import annotations

import attrs

from clt_plugins.errors import Refused

MEMORY_SHARE = 0.8
"""Of the memory's bandwidth: a copy reaches 90 %, and a kernel with several streams 90 % of that."""
PRODUCT_SHARE = 0.4
"""Of the tensor cores: what large products of whole training steps sustain."""
FP32_SHARE = 0.75
"""Of the float32 units, for products without tensor cores."""
ISSUE_SHARE = 0.6
"""Of the instructions: integer chains that depend on each other leave gaps."""
NETWORK_SHARE = 0.7
"""Of the links between GPUs."""
CONTEXT_BYTES = 1_000_000_000
"""CUDA's context, the workspaces of cuBLAS, and what the allocator cannot use."""
USABLE = 0.97
"""The share of a GPU's memory that a process can get."""


@attrs.frozen(kw_only=True)
class Gpu:
    """A GPU as published."""

    memory: float
    """10^9 bytes."""
    bandwidth: float
    """Of the memory, 10^9 bytes/s."""
    cache: float
    """The last level of cache, 10^6 bytes."""
    bf16: float
    """Tensor cores, 10^12 operations/s in bfloat16; in TF32 half as many, in 8 bits twice as many."""
    fp8: bool = True
    """Whether they have 8-bit numbers."""
    fp32: float
    """Without tensor cores, 10^12 operations/s in float32."""
    cores: int
    """Streaming multiprocessors; each starts 4 warp instructions in a cycle."""
    clock: float
    """At most, GHz."""
    link: float
    """To other GPUs, 10^9 bytes/s in each direction."""


GPUS = {
    "h100": Gpu(memory=80, bandwidth=3350, cache=50, bf16=989, fp32=67, cores=132, clock=1.83, link=450),
    "h100-pcie": Gpu(memory=80, bandwidth=2000, cache=50, bf16=756, fp32=51, cores=114, clock=1.755, link=64),
    "h200": Gpu(memory=141, bandwidth=4800, cache=50, bf16=989, fp32=67, cores=132, clock=1.83, link=450),
    "a100": Gpu(memory=80, bandwidth=2039, cache=40, bf16=312, fp32=19.5, cores=108, clock=1.41, link=300, fp8=False),
    "a100-40": Gpu(
        memory=40, bandwidth=1555, cache=40, bf16=312, fp32=19.5, cores=108, clock=1.41, link=300, fp8=False
    ),
    "l40s": Gpu(memory=48, bandwidth=864, cache=96, bf16=362, fp32=91.6, cores=142, clock=2.52, link=32),
    "a6000": Gpu(memory=48, bandwidth=768, cache=6, bf16=155, fp32=38.7, cores=84, clock=1.8, link=32, fp8=False),
    "4090": Gpu(memory=24, bandwidth=1008, cache=72, bf16=165, fp32=82.6, cores=128, clock=2.52, link=32),
    "l4": Gpu(memory=24, bandwidth=300, cache=48, bf16=121, fp32=30.3, cores=58, clock=2.04, link=32),
    "3090": Gpu(memory=24, bandwidth=936, cache=6, bf16=71, fp32=35.6, cores=82, clock=1.695, link=32, fp8=False),
}


@attrs.frozen(kw_only=True)
class Rates:
    """What a machine does in a second."""

    name: str
    basis: str
    memory: float
    """Bytes read from or written to memory."""
    products: dict[str, float]
    """Operations of a large matrix product, by type."""
    numbers: float
    """Pre-activations that a selection looks at."""
    decoded: float
    """Numbers of decoder rows that are multiplied by pairs' values and added up."""
    differentiated: float
    """The same for the gradients of values and rows, both together."""
    touched: float
    """Rows of a matrix whose gradient is begun."""
    copied: float
    """Bytes between the CPU and the device."""
    link: float
    """Bytes that a rank sends to others; infinite where nothing is known of them."""
    cached: float = float("inf")
    """Bytes of rows read from the cache."""
    launches: float = float("inf")
    """Operations that the CPU starts."""
    capacity: int | None = None
    """Bytes of memory; None if it is not known."""
    context: int = 0
    """Bytes that the libraries take."""


SELECT_INSTRUCTIONS = 53 / 32
"""Warp instructions for each pre-activation: counted, then collected, 16 numbers of a lane in 936 instructions."""
DECODE_INSTRUCTIONS = 76 / 8 / 64
"""Warp instructions for each number of a row: 76 for 8 rows of 64 columns."""
GRADIENT_INSTRUCTIONS = 60 / 256
"""The same for both gradients at once: a row of 256 columns is read, multiplied twice and summed."""
ROW_INSTRUCTIONS = 500
"""For the gradient of a row: its pairs are looked up, and three times 256 columns are written."""
CACHE_BYTES_PER_CYCLE = 24
"""That a multiprocessor reads from the last level of cache: 5.5 TB/s on an H100."""
LAUNCHES = 250_000.0
"""Operations that a CPU starts in a second: 4 µs each."""
PCIE = 25e9
"""Bytes/s between the CPU and a GPU, from pinned memory."""


def gpu_rates(name: str) -> Rates:
    """The rates of a GPU by its published ceilings.

    Raises:
        Refused: it is not in the table.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise Refused("--gpu", f"unknown GPU {name!r} (known: {', '.join(GPUS)}); --measure measures this machine")
    instructions = gpu.cores * 4 * gpu.clock * 1e9 * ISSUE_SHARE
    return Rates(
        name=name.lower(),
        basis="a model by published ceilings, not measured on a device",
        memory=gpu.bandwidth * 1e9 * MEMORY_SHARE,
        products={
            "float8": (2 if gpu.fp8 else 1) * gpu.bf16 * 1e12 * PRODUCT_SHARE,
            "bfloat16": gpu.bf16 * 1e12 * PRODUCT_SHARE,
            "tf32": gpu.bf16 / 2 * 1e12 * PRODUCT_SHARE,
            "float16": gpu.bf16 * 1e12 * PRODUCT_SHARE,
            "float32": gpu.fp32 * 1e12 * FP32_SHARE,
        },
        numbers=instructions / SELECT_INSTRUCTIONS,
        decoded=instructions / DECODE_INSTRUCTIONS,
        differentiated=instructions / GRADIENT_INSTRUCTIONS,
        touched=instructions / ROW_INSTRUCTIONS,
        copied=PCIE,
        link=gpu.link * 1e9 * NETWORK_SHARE,
        cached=gpu.cores * gpu.clock * 1e9 * CACHE_BYTES_PER_CYCLE,
        launches=LAUNCHES,
        capacity=int(gpu.memory * 1e9),
        context=CONTEXT_BYTES,
    )
