"""What the forms of the model cost on this machine: experts, recomputing, scanning, blocks of attention and head.

    python -m benchmarks.model_forms

Steps of different things alternate, and every figure is a median, so that what else the machine does
falls on all of them. The attention table needs PyTorch.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import alternate
from tinyllm_jax.config import Config, load_config
from tinyllm_jax.model.attention import reference_attention
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.weights import (
    flops_per_token,
    initial_weights,
    merge_weights,
    model_structure,
)
from tinyllm_jax.objectives.head_blocks import measure_logits
from tinyllm_jax.objectives.log_probs import target_log_probs
from tinyllm_jax.objectives.losses import cross_entropy_sum, head_cross_entropy_sum
from tinyllm_jax.training.dry_run import compile_step, first_state, made_up_batches
from tinyllm_jax.training.step import NOTHING_FIXED

MODES = [(policy, scan) for scan in (False, True) for policy in ("none", "dots", "full")]


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


def measure_head(tokens: int, vocab: int, rounds: int) -> None:
    """Compare losses of a tied head in blocks and of all logits: head, loss and gradients."""
    changes = {"model.vocab_size": vocab, "model.num_hidden_layers": 1}
    config = load_config("stories_15m", {**changes, "model.compute_dtype": "float32"}).model
    structure, weights = model_structure(config)[0], initial_weights(config, seed=0)
    numbers = np.random.default_rng(0)
    states = jnp.asarray(numbers.standard_normal((tokens // 256, 256, 288), np.float32))
    targets = jnp.asarray(numbers.integers(0, vocab, states.shape[:2]), jnp.int32)
    everywhere = jnp.ones(targets.shape, bool)
    losses: dict[str, Callable[[Any, Any], Any]] = {
        "cross-entropy, all logits": lambda model, states: cross_entropy_sum(
            model.logits(states), targets, everywhere
        ),
        "cross-entropy, in blocks": lambda model, states: head_cross_entropy_sum(
            model, states, targets, everywhere
        ),
        # Each token counts in its own way, as in the losses of pairs and of a policy.
        "log-probabilities, all logits": lambda model, states: jnp.vdot(
            target_log_probs(model.logits(states), targets), states[..., 0]
        ),
        "log-probabilities, in blocks": lambda model, states: jnp.vdot(
            measure_logits(model, states, target_log_probs, targets), states[..., 0]
        ),
    }
    jobs, held = {}, {}
    for name, loss in losses.items():
        program = compiled(
            jax.value_and_grad(
                lambda weights, states, loss=loss: loss(merge_weights(structure, weights), states),
                argnums=(0, 1),
            )
        )
        program = program.lower(weights, states).compile()
        held[name] = program.memory_analysis().temp_size_in_bytes
        jobs[name] = lambda program=program: jax.block_until_ready(program(weights, states))
    seconds = alternate(jobs, rounds=rounds)
    for name in jobs:
        shape = f"{name} | {tokens:,} | {vocab:,}"
        print(f"| {shape} | {1000 * seconds[name]:.0f} ms | {held[name] / 1e6:.0f} MB |")


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
    print("\nHead and loss, forward and backward, float32, 288 wide\n")
    print("| loss | tokens | vocabulary | time | working memory |\n" + "| --- " * 5 + "|")
    for tokens, vocab in ((4096, 4096), (4096, 32000)):
        measure_head(tokens, vocab, arguments.rounds)
    measure_modes(arguments.rounds)
    measure_experts(arguments.rows, arguments.rounds)


if __name__ == "__main__":
    main()
