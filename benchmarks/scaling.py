"""How the cost of a train step grows, and what devices tell each other for it.

    python -m benchmarks.scaling [--rounds 1]

The first table is measured: one step on one device, with more rows, longer ones, or wider layers.
The second is read out of compiled programs for 2 and 8 virtual devices of the CPU, which share the
same cores and so have no speed of their own to measure: the bytes that each device receives in one
step. Weak scaling keeps the rows of a device, strong scaling those of all.
"""

import argparse
import math
import multiprocessing
import os
import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.report import report

DEVICES = 8
# (devices, scaling); at 8 devices both are the same step.
CASES = ((2, "weak"), (2, "strong"), (DEVICES, "both"))
# What is doubled, from the same start each: rows, tokens of a row, width of every layer.
START = {"rows": 4, "context": 128, "width": 128}
DOUBLINGS = 3
COST_COLUMNS = ("grows", "rows x context, width", "GFLOP", "ms", "tokens/s", "GFLOP/s", "working MB",
                "time / previous")  # fmt: skip
MOVED_COLUMNS = ("divided by", "devices", "scaling", "rows of all", "all-reduce MB", "all-gather MB",
                 "reduce-scatter MB", "all-to-all MB", "collective-permute MB", "received MB",
                 "of the weights")  # fmt: skip
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "f64": 8,
}
ITEM_BYTES |= {"s64": 8, "u64": 8}
COLLECTIVE = re.compile(
    r"= (?P<shape>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)


def shaped(rows: int, context: int, width: int) -> dict[str, Any]:
    """Describe a dense model of four layers and the rows of its step."""
    return {
        "model.vocab_size": 1024,
        "model.hidden_size": width,
        "model.intermediate_size": 3 * width,
        "model.num_hidden_layers": 4,
        "model.num_attention_heads": width // 32,
        "model.num_key_value_heads": width // 32,
        "model.max_position_embeddings": context,
        "data.sequence_length": context,
        "data.packing": "stream",
        "train.batch_size": rows,
        "parallel.data": 1,
    }


def measure_cost(rounds: int) -> list[dict[str, Any]]:
    """Time a step of every size on one device."""
    from tinyllm_jax.config import load_config
    from tinyllm_jax.model.weights import flops_per_token
    from tinyllm_jax.training.dry_run import compile_step, time_step

    rows, before = [], 0.0
    for name in START:
        for doubling in range(DOUBLINGS + 1):
            size = START | {name: START[name] << doubling}
            config = load_config("tiny", shaped(**size))
            compiled = compile_step(config)
            seconds = statistics.median(time_step(config, compiled) for _ in range(rounds))
            tokens = size["rows"] * size["context"]
            work = tokens * flops_per_token(config.model, sequence_length=size["context"])
            rows.append({
                "grows": name,
                "rows x context, width": "{rows} x {context}, {width}".format(**size),
                "GFLOP": work / 1e9,
                "ms": 1000 * seconds,
                "tokens/s": tokens / seconds,
                "GFLOP/s": work / seconds / 1e9,
                "working MB": compiled.working / 1e6,
                "time / previous": f"{seconds / before:.2f}x" if doubling else "",
            })  # fmt: skip
            before = seconds
    return rows


def array_bytes(shape: str) -> int:
    """Add up the bytes of an array, or of a tuple of arrays, as a compiled program writes it."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        ITEM_BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in found
    )


def group_size(line: str) -> int:
    """Read how many devices take part in each group of a collective."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    raise ValueError(f"a collective whose groups are written in an unknown way: {line}")


def received_bytes(program: str) -> dict[str, float]:
    """Add up what one device receives for each kind of collective, sent around in rings.

    A ring of n passes (n - 1) / n of the whole array for a gather or a scatter, twice that for a
    sum. A collective inside a loop counts once: a step of one pass has none.
    """
    found: dict[str, float] = {}
    for line in program.splitlines():
        match = COLLECTIVE.search(line)
        if not match:
            continue
        kind, size, group = match["kind"], array_bytes(match["shape"]), group_size(line)
        if match["start"] and kind == "all-gather":  # a pair of what goes in and what comes out
            size = size * group // (group + 1)
        share = {"all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1.0,
                 "collective-permute": 1.0}.get(kind, (group - 1) / group)  # fmt: skip
        found[kind] = found.get(kind, 0.0) + share * size
    return found


def grids() -> dict[str, Callable[[int], dict[str, Any]]]:
    """Name each way to divide a step, with its settings for a number of devices."""
    experts = {"model.num_experts": 8, "model.num_experts_per_tok": 2}
    experts |= {"model.moe_intermediate_size": 192}
    return {
        "data": lambda n: {"parallel.data": n},
        "fsdp": lambda n: {"parallel.data": 1, "parallel.fsdp": n},
        "tensor": lambda n: {"parallel.data": 1, "parallel.tensor": n},
        "expert": lambda n: {"parallel.data": 1, "parallel.expert": n, **experts},
    }


def read_programs(per_device: int) -> list[dict[str, Any]]:
    """Compile a step for every grid and read what its devices receive."""
    from tinyllm_jax.config import load_config
    from tinyllm_jax.model.weights import count_parameters
    from tinyllm_jax.training.dry_run import compile_step

    base, rows = shaped(rows=8, context=128, width=256), []
    for name, settings in grids().items():
        for devices, scaling in CASES:
            batch = per_device * (devices if scaling == "weak" else DEVICES)
            config = load_config("tiny", base | settings(devices) | {"train.batch_size": batch})
            moved = received_bytes(compile_step(config).steps.as_text())
            whole = 4 * count_parameters(config.model)[0]
            kinds = {f"{kind} MB": size / 1e6 for kind, size in moved.items()}
            named = [column for column in MOVED_COLUMNS if column.endswith(" MB")]
            rows.append(
                {column: kinds.get(column, 0.0) for column in named}
                | {
                    "divided by": name,
                    "devices": devices,
                    "scaling": scaling,
                    "rows of all": batch,
                    "received MB": sum(moved.values()) / 1e6,
                    "of the weights": f"{sum(moved.values()) / whole:.2f}x",
                }
            )
    return rows


def in_a_process(function: Callable[..., Any], argument: Any) -> Any:
    """Call a function in a process of its own, which sees this environment before it imports jax."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, argument).result()


def main() -> None:
    """Measure, read, and print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1, help="timings of each step, each of 5 s")
    parser.add_argument("--rows-per-device", type=int, default=2)
    parser.add_argument("--json", type=Path, help="folder for the numbers of both tables")
    arguments = parser.parse_args()
    folder = arguments.json or Path("benchmarks/results")
    given = {"rounds": arguments.rounds, "rows_per_device": arguments.rows_per_device}
    rows = in_a_process(measure_cost, arguments.rounds)
    report("scaling, one device", COST_COLUMNS, rows, settings=given, packages=["jax", "flax"],
           json_path=folder / "scaling_one_device.json")  # fmt: skip
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = in_a_process(read_programs, arguments.rows_per_device)
    report("scaling, what devices receive", MOVED_COLUMNS, rows, settings=given,
           packages=["jax", "flax"], json_path=folder / "scaling_devices.json")  # fmt: skip


if __name__ == "__main__":
    main()
