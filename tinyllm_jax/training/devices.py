"""What the devices can do, for model FLOPs utilisation (MFU)."""

import re
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 peak of one device in TFLOP/s, from the makers' data sheets; the first name that
# the device's name contains counts. TPU v2 and v3 devices are cores, later ones chips.
PEAK_TFLOPS = {
    "gb200": 2500.0,
    "b200": 2250.0,
    "gh200": 989.0,
    "h200": 989.0,
    "h100 pcie": 756.0,
    "h100 nvl": 835.0,
    "h100": 989.0,
    "a100": 312.0,
    "a10g": 70.0,
    "a10": 125.0,
    "a40": 149.7,
    "a30": 165.0,
    "a6000": 154.8,
    "l40s": 362.0,
    "l40": 181.0,
    "l4": 121.0,
    "rtx 5090": 209.5,
    "rtx 4090": 165.2,
    "rtx 3090": 71.0,
    "v100": 125.0,
    "t4": 65.0,
    "tpu v6": 918.0,
    "tpu v5p": 459.0,
    "tpu v5 lite": 197.0,
    "tpu v5e": 197.0,
    "tpu v5": 459.0,
    "tpu v4": 275.0,
    "tpu v3": 61.0,
    "tpu v2": 23.0,
}


def known_peak_tflops(device_kind: str) -> float | None:
    """Look up a device's dense bfloat16 peak, or None when it is not in the table."""
    kind = device_kind.lower()
    found = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", kind))
    return next(found, None)


def measured_tflops(*, seconds: float) -> float:
    """Measure the best rate of a 1024 x 1024 x 1024 float32 product for about `seconds`."""
    size = 1024
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def peak_flops(*, devices: int) -> float:
    """Give the peak of the devices in use, in FLOP/s: from the table, else measured.

    What is measured is a CPU, or so new that its share of a machine is not known, and counts once.
    """
    known = known_peak_tflops(jax.devices()[0].device_kind)
    return (measured_tflops(seconds=0.2) if known is None else known * devices) * 1e12
