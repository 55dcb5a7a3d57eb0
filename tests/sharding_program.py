"""Runs in a process of its own that has eight devices; prints what it found as one line of JSON."""

import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from conftest import SMALL_RUN, flags_for_devices

os.environ["XLA_FLAGS"] = flags_for_devices(8)

import jax
import numpy as np
from test_sharding import PARALLEL_CHANGES

import convert
from tinyllm_jax import train
from tinyllm_jax.config import Config, load_config
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.weights import initial_weights, model_structure
from tinyllm_jax.objectives.pretrain import count_targets, next_token_loss
from tinyllm_jax.training.checkpoint import open_checkpoint, read_checkpoint
from tinyllm_jax.training.dry_run import compile_step, made_up_batches
from tinyllm_jax.training.metrics import read_metrics
from tinyllm_jax.training.optim import read_moments
from tinyllm_jax.training.parallel import make_parallel
from tinyllm_jax.training.start import Start, first_state
from tinyllm_jax.training.step import NOTHING_FIXED, make_train_step, new_state, scan_steps

COMMON = [
    *SMALL_RUN,
    *("--model.num_attention_heads", "4", "--model.num_key_value_heads", "2"),
    *("--train.batch_size", "8", "--data.packing", "packed", "--max-new-tokens", "8"),
    *("--max-steps", "50", "--warmup-steps", "10", "--checkpoint.interval_steps", "25"),
    *("--train.eval_interval_steps", "50", "--checkpoint.keep", "9"),
]
EXPERTS = ["--model.num_experts", "4", "--model.num_shared_experts", "1"]
DENSE = ["--train.gradient_accumulation_steps", "2"]
EVERY_AXIS = ["--parallel.fsdp", "2", "--parallel.tensor", "2"]
# Each is compared with the first of its kind, which has one device.
RUNS = {
    "dense, one": ["--parallel.data", "1", *DENSE],
    "dense, data 8": DENSE,
    "dense, fsdp 8": ["--parallel.fsdp", "8", *DENSE],
    "dense, data 2 x fsdp 2 x tensor 2": [*EVERY_AXIS, *DENSE],
    "dense, pmap 8": ["--parallel.strategy", "pmap", *DENSE],
    "experts, one": ["--parallel.data", "1", *EXPERTS],
    "experts, data 4 x expert 2": ["--parallel.expert", "2", *EXPERTS],
    "experts, fsdp 2 x expert 2 x tensor 2 in loops": [
        *(*EVERY_AXIS, "--parallel.expert", "2"),
        *("--model.scan_layers", "true", "--model.activation_checkpointing", "full"),
        *EXPERTS,
    ],
}
SOURCE = "dense, fsdp 8"
RESUMED = {
    "dense, one": ["--parallel.fsdp", "1", "--parallel.data", "1"],
    "dense, data 2 x fsdp 2 x tensor 2": EVERY_AXIS,
}
RESTORED = RESUMED | {
    "dense, pmap 4": ["--parallel.strategy", "pmap", "--parallel.data", "4", "--parallel.fsdp", "1"]
}


def config_of(*flags: str) -> Config:
    preset, overrides, problems = train.read_command([*COMMON, *flags])
    return load_config(preset or "tiny", overrides, problems)


def path_of(folder: Path, name: str) -> Path:
    return folder / name.replace(", ", "_").replace(" ", "_")


def rows_of(folder: Path) -> dict[str, Any]:
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    return {
        "step": [row["step"] for row in steps],
        "loss": [row["loss"] for row in steps],
        "targets": [row["targets"] for row in steps],
        "evaluation": [row["loss"] for row in rows if row["kind"] == "eval"],
        "sample": [row["text"] for row in rows if row["kind"] == "sample"][-1],
    }


def trained(folder: Path) -> dict[str, Any]:
    found = {}
    for name, flags in RUNS.items():
        out = path_of(folder, name)
        assert train.main([*COMMON, *flags, "--out", str(out)]) == 0
        found[name] = rows_of(out)
    return found


def resumed(folder: Path) -> dict[str, Any]:
    """Go on from the middle of the run over `fsdp`, on other grids."""
    source, found = path_of(folder, SOURCE) / "checkpoints" / "25", {}
    for name, flags in RESUMED.items():
        out = path_of(folder, f"again, {name}")
        assert train.main(["--resume", str(source), *flags, "--out", str(out)]) == 0
        found[name] = rows_of(out)
    return found


def restored(folder: Path) -> dict[str, float]:
    """Give the largest difference between a checkpoint and the state that is made of it."""
    found = {}
    source = open_checkpoint(path_of(folder, SOURCE) / "checkpoints" / "25", on_damaged=print)
    for name, flags in RESTORED.items():
        config = config_of(*flags)
        state = first_state(Start(config, folder, source, None), make_parallel(config))
        moments = read_moments(state.optimizer_state)
        pairs = (
            (state.weights, source.weights),
            (moments.first, source.moments.first),
            (moments.second, source.moments.second),
        )
        found[name] = max(
            float(np.abs(np.asarray(actual[key]) - expected[key]).max())
            for actual, expected in pairs
            for key in expected
        )
    return found


def parts(*flags: str) -> dict[str, Any]:
    """Give what one device holds of weights and moments, and how much memory a step takes there."""
    config = config_of(*flags)
    parallel = make_parallel(config)
    state = parallel.make_state(lambda: new_state(config, initial_weights(config.model, seed=1)))
    second = read_moments(state.optimizer_state).second
    shapes: dict[str, Any] = {}
    for name, weight in state.weights.items():
        of_weight = {shard.data.shape for shard in weight.addressable_shards}
        of_moment = {shard.data.shape for shard in second[name].addressable_shards}
        assert of_weight == of_moment
        assert len(of_weight) == 1
        shapes[name] = [weight.shape, *of_weight]
    initial = initial_weights(config.model, seed=1)
    compiled = compile_step(config)
    return {
        "shapes": shapes,
        "initial": max(
            float(abs(np.asarray(state.weights[name]) - np.asarray(initial[name])).max())
            for name in initial
        ),
        "state_bytes": compiled.state,
        "whole_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }


def nonfinite(*flags: str) -> list[Any]:
    """Take a step from a weight that is no number: it must change nothing but counters."""
    config = config_of(*flags)
    parallel, (structure, _) = make_parallel(config), model_structure(config.model)

    def broken() -> Any:
        weights = initial_weights(config.model, seed=1)
        return new_state(config, weights | {"norm.weight": weights["norm.weight"] * np.nan})

    steps = parallel.compile_train_steps(
        scan_steps(make_train_step(config, structure, next_token_loss, count_targets))
    )
    before = jax.device_get(parallel.make_state(broken))
    made_up = jax.device_get(made_up_batches(config))
    batch = {name: rows[0] for name, rows in made_up.items()}
    placed = parallel.place_steps([batch], passes=1)
    after, _ = steps(parallel.make_state(broken), placed, NOTHING_FIXED)
    same = all(
        np.array_equal(np.asarray(after.weights[name]), before.weights[name], equal_nan=True)
        for name in before.weights
    )
    return [same, int(after.step), int(after.nonfinite_streak)]


def refused(*flags: str) -> str:
    """Give what the command says, and make sure that nothing was written."""
    try:
        train.main([*COMMON, *flags, "--out", "refused"])
    except InputError as error:
        return str(error) if not Path("refused").exists() else "written"
    return "accepted"


def collectives(*flags: str) -> dict[str, list[list[int]]]:
    """List the shapes that the compiled step moves between devices, by kind of operation."""
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    found: dict[str, list[list[int]]] = {}
    for line in compile_step(config_of(*flags)).steps.as_text().splitlines():
        for kind in kinds:
            made, operation, _ = line.partition(f" {kind}(")
            if operation:
                shapes = re.findall(r"\w\d+\[([\d,]*)\]", made.split("=", 1)[1])
                found.setdefault(kind, []).extend(
                    [int(size) for size in shape.split(",") if size] for shape in shapes
                )
    return found


def main() -> None:
    warnings.simplefilter("error", UserWarning)  # a buffer that cannot be donated, among others
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {"trained": trained(folder), "resumed": resumed(folder)}
    found["restored"] = restored(folder)
    found["parts"] = {
        "dense": parts(*EVERY_AXIS),
        "experts": parts("--parallel.expert", "2", "--parallel.fsdp", "2", *EXPERTS),
    }
    found["nonfinite"] = [
        nonfinite("--parallel.fsdp", "8"),
        nonfinite("--parallel.strategy", "pmap"),
    ]
    found["collectives"] = collectives("--parallel.fsdp", "8")
    found["described"] = {}
    for name, (value, _) in PARALLEL_CHANGES.items():
        of_experts = EXPERTS if name == "expert" else []
        config = config_of(f"--parallel.{name}", str(value), *of_experts)
        found["described"][name] = make_parallel(config).description
    found["refused"] = [
        refused("--parallel.data", "3"),
        refused("--parallel.fsdp", "16"),
        refused("--parallel.data", "4", "--train.batch_size", "6"),
    ]
    newest = path_of(folder, SOURCE)
    bundle = convert.read(newest, say=print)
    last = read_checkpoint(newest / "checkpoints" / "50")
    found["converted"] = len(bundle.weights) == len(last.weights)
    start = ["--init-from", str(newest), *EVERY_AXIS, "--max-steps", "2"]
    found["initialised"] = train.main([*COMMON, *start, "--out", str(folder / "initialised")])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
