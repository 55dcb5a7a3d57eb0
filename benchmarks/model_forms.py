"""What the forms of the model cost on this machine: experts, recomputing, scanning, attention blocks.

    python benchmarks/model_forms.py

Steps of different things alternate, and every figure is a median, so that what else the machine does
falls on all of them. The attention table needs PyTorch.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyllm_jax.config import Config, load_config
from tinyllm_jax.model.attention import reference_attention
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.weights import flops_per_token
from tinyllm_jax.training.dry_run import compile_step, first_state, made_up_batches
from tinyllm_jax.training.step import NOTHING_FIXED

MODES = [(policy, scan) for scan in (False, True) for policy in ("none", "dots", "full")]


def alternate(jobs: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Run every job once unmeasured, then in turns, and give the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def stepper(config: Config) -> tuple[Callable[[], Any], float, int]:
    """Compile a train step: what runs it, the seconds it took, and the bytes it works in."""
    start = time.perf_counter()
    compiled = compile_step(config)
    seconds = time.perf_counter() - start
    held = {"state": first_state(config)}
    batch = made_up_batches(config)

    def run() -> None:
        held["state"], numbers = compiled.steps(held["state"], batch, NOTHING_FIXED)
        jax.block_until_ready(numbers)

    return run, seconds, compiled.working


def measure_experts(rows: int, rounds: int) -> None:
    """Compare the operations a second of experts with those of the dense model beside it."""
    one_pass = {"train.batch_size": rows, "train.gradient_accumulation_steps": 1}
    configs = {name: load_config(name, one_pass) for name in ("minimind_26m", "minimind_moe")}
    seconds = alternate({n: stepper(c)[0] for n, c in configs.items()}, rounds=rounds)
    print(f"\n{rows} rows of 512 tokens a step\n\n| model | MFLOP a token | tokens/s | GFLOP/s |")
    print("| --- " * 4 + "|")
    rates = {}
    for name, config in configs.items():
        length = config.data.sequence_length
        work, speed = (
            flops_per_token(config.model, sequence_length=length),
            rows * length / seconds[name],
        )
        rates[name] = work * speed
        print(f"| {name} | {work / 1e6:.1f} | {speed:,.0f} | {rates[name] / 1e9:.1f} |")
    print(f"\nexperts / dense: {rates['minimind_moe'] / rates['minimind_26m']:.2f}")


def measure_modes(rounds: int) -> None:
    """Compare compile time, memory and step time of every way to execute the blocks."""
    base = {"train.batch_size": 16, "model.num_hidden_layers": 12}
    jobs, facts = {}, {}
    for policy, scan in MODES:
        own = {"model.activation_checkpointing": policy, "model.scan_layers": scan}
        name = f"{policy}, {'scanned' if scan else 'straight'}"
        jobs[name], *facts[name] = stepper(load_config("tinystories_7m", base | own))
    seconds = alternate(jobs, rounds=rounds)
    print("\ntinystories_7m with 12 layers, 16 rows of 256\n")
    print("| recomputed, blocks | compiled in | working memory | step |\n" + "| --- " * 4 + "|")
    for name, (compiling, working) in facts.items():
        print(f"| {name} | {compiling:.1f} s | {working / 1e6:.0f} MB | {seconds[name]:.2f} s |")


def measure_attention(length: int, rounds: int) -> None:
    """Compare forward and backward of causal attention in blocks, in one piece, and in PyTorch."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shape = (16, length, 6, 48)
    arrays = [np.random.default_rng(0).standard_normal(shape, np.float32) for _ in range(4)]
    query, key, value, change = map(jnp.asarray, arrays)
    triangle = jnp.asarray(np.tril(np.ones((1, length, length), bool)).repeat(16, axis=0))

    def ours(mask: jax.Array | None) -> Callable[[], Any]:
        def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return reference_attention(
                query,
                key,
                value,
                mask=mask,
                causal=mask is None,
                dropout_rate=0.0,
                dropout_key=None,
            )

        both = compiled(lambda *inputs: jax.vjp(run, *inputs[:3])[1](inputs[3]))
        return lambda: jax.block_until_ready(both(query, key, value, change))

    tensors = [torch.from_numpy(array).transpose(1, 2).contiguous() for array in arrays]

    def theirs() -> None:
        one, two, three = (tensor.detach().requires_grad_() for tensor in tensors[:3])
        scaled_dot_product_attention(one, two, three, is_causal=True).backward(tensors[3])

    jobs = {"in blocks": ours(None), "in one piece": ours(triangle), "PyTorch's own": theirs}
    seconds = alternate(jobs, rounds=rounds)
    row = " | ".join(f"{1000 * seconds[name]:.0f} ms" for name in jobs)
    print(f"| 16 x {length}, 6 heads of 48 | {row} |")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4, help="rows of the experts' step")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind} ({device.platform}), jax {jax.__version__}")
    print("\nCausal attention, forward and backward, float32\n")
    print("| shape | in blocks | in one piece | PyTorch's own |\n" + "| --- " * 4 + "|")
    for length in (256, 512):
        measure_attention(length, 3 * arguments.rounds)
    measure_modes(arguments.rounds)
    measure_experts(arguments.rows, arguments.rounds)


if __name__ == "__main__":
    main()
