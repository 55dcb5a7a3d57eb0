"""Which device computes, and what it can do, for model FLOPs utilisation (MFU)."""

import time

import torch


def default_device() -> torch.device:
    """Name the device that weights and batches live on: the first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device() -> str:
    """Name it for people."""
    device = default_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"1 x {device.type}"


def measured_tflops(*, seconds: float) -> float:
    """Measure the best rate of a square product for about `seconds`.

    Of 1024 x 1024 matrices in float32 on a CPU, of 8192 x 8192 in bfloat16 on a GPU.
    """
    device = default_device()
    is_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if is_gpu else (1024, torch.float32)
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    (matrix @ matrix)[0, 0].item()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def peak_flops() -> float:
    """Give the peak of the device in use, in FLOP/s, as measured."""
    return measured_tflops(seconds=0.2) * 1e12
