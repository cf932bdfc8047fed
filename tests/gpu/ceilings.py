"""What an H100 SXM sustains, as far as it is known without one. Times are a model: expect ± 40 %, and rely on ratios.

Nothing here was measured by this project on a device.
"""

COPY = 3.0e12
"""Bytes per second of a large copy, read and written together. The data sheet says 3.35e12; published copies reach 2.9
to 3.1e12."""
COPY_SHARE = 0.9
"""Of that, what kernels with several streams reach."""
SORT_SHARE = 0.7
"""Of that, what radix sorts reach: they scatter."""
L2 = 5.5e12
"""Bytes per second from the level-2 cache (published microbenchmarks of reads)."""
L2_BYTES = 40e6
"""Of its 50 MB, what one set of data can hold."""
BF16 = 400e12
"""Operations per second of a large product in bfloat16; the data sheet says 989e12, trainers sustain about 400e12."""
FP32 = 50e12
"""Operations per second of a product in float32 without TF32; the data sheet says 67e12."""
TF32 = 200e12
"""The same where TF32 is allowed; the data sheet says 495e12."""
ISSUE = 132 * 4 * 1.75e9
"""Warp instructions per second: 132 multiprocessors of 4 schedulers at 1.75 GHz, 924e9."""
ISSUE_SHARE = 0.6
"""Of that, what chains of dependent integer instructions leave."""
LAUNCH = 2e-6
"""Seconds that the smallest kernel takes on the device."""
HOST = 4e-6
"""Seconds of the host for each operation of torch in eager mode."""
SUMMED = 275e9
"""Bytes per second of a sum of which all of eight ranks get the whole, over NVLink with SHARP (NVIDIA's own figure, in
nccl-tests#212)."""
SHARED = 355e9 * 8 / 7
"""Bytes of the whole per second of a sum of which each rank gets a share, or of shares that are put together: 7/8 of
them cross the links, at 350e9 to 360e9 (NVIDIA/nccl#1281); the data sheet says 450e9."""
TOPK = 4e-12
"""Seconds for each byte that the passes of torch's topk read, from times in pytorch#164459 (an H20)."""
