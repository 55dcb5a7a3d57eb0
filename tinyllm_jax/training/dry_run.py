"""Memory and time of a run before it is run: what `train --dry-run` prints."""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyllm_jax.config import Config
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.layers import compute_dtype
from tinyllm_jax.model.lora import (
    describe_adapters,
    initial_adapters,
    is_adapter,
    trained_names,
)
from tinyllm_jax.model.weights import (
    describe_size,
    flops_per_token,
    initial_weights,
)
from tinyllm_jax.objectives.pretrain import count_targets, next_token_loss
from tinyllm_jax.training.adapters import trained_structure
from tinyllm_jax.training.devices import peak_flops
from tinyllm_jax.training.parallel import grid_sizes, make_parallel
from tinyllm_jax.training.step import Fixed, TrainState, make_train_step, new_state, scan_steps

# The clock runs for at least two steps, and for more while they fit into this time.
TIMING_SECONDS = 5.0
GIGABYTE = 1e9


class Compiled(NamedTuple):
    """A dispatch of train steps, ready to run, and the memory that its compiler says it takes, in bytes."""

    steps: Any
    state: int  # weights, trained or not, and moments, which stay
    batch: int
    working: int  # gradients, activations and whatever else lives only within a step

    @property
    def total(self) -> int:
        """Give all that is held at once."""
        return self.state + self.batch + self.working


def dry_run(config: Config, *, done_steps: int, say: Callable[[str], None]) -> int:
    """Compile the train step, and time it on made-up rows if it fits.

    Args:
        config: All settings; no data is needed, nothing is read and nothing written.
        done_steps: Steps that a resumed run has behind it.
        say: Takes each line.

    Returns:
        The exit code: 0 if the run fits into the memory, else 1.
    """
    device, model, parallel = jax.devices()[0], config.model, make_parallel(config)
    per_token = flops_per_token(model, sequence_length=config.data.sequence_length)
    tokens = config.rows_per_step * config.data.sequence_length
    steps = max(config.train.max_steps - done_steps, 0)
    say(f"Device   {device.device_kind} ({device.platform}), {compute_dtype(model).name}")
    if parallel.description:
        say(f"Divided  {parallel.description}; memory is that of one device")
    say(f"Model    {describe_size(model)}")
    if config.lora.rank > 0:
        say(f"Trained  {describe_adapters(model, config.lora)}")
    say(f"Work     {per_token / 1e6:,.1f} MFLOP a token, {tokens:,} tokens a step, "
        f"{steps:,} steps")  # fmt: skip
    start = time.perf_counter()
    compiled = compile_step(config)
    say(f"Compiled in {time.perf_counter() - start:.1f} s")
    limit = memory_limit()
    say(
        f"Memory   weights and optimizer {compiled.state / GIGABYTE:.3g} GB, gradients and "
        f"activations {(compiled.total - compiled.state) / GIGABYTE:.3g} GB: "
        f"{compiled.total / GIGABYTE:.3g} GB of {limit / GIGABYTE:.3g} GB"
    )
    if compiled.total > limit:
        say_what_is_lighter(config, limit=limit, say=say)
        return 1
    seconds = time_step(config, compiled)
    speed, peak = tokens / seconds, peak_flops(devices=parallel.devices)
    say(f"Speed    {speed:,.0f} tokens/s, MFU {speed * per_token / peak:.0%}")
    say(
        f"Run      {in_words(steps * seconds)} for {steps:,} steps, evaluations and checkpoints "
        "not counted"
    )
    return 0


def compile_step(config: Config) -> Compiled:
    """Compile the train step of a run without making a weight or a row."""
    step, parallel = (
        make_train_step(config, trained_structure(config), next_token_loss, count_targets),
        make_parallel(config),
    )
    passes = config.train.gradient_accumulation_steps
    first, held, rows = jax.eval_shape(
        lambda: (first_state(config), frozen_state(config), made_up_batches(config))
    )
    state, batch = parallel.shapes(first, rows, passes=passes)
    fixed = Fixed(parallel.shapes(held, rows, passes=passes)[0].weights, {})
    compiled = parallel.compile_train_steps(scan_steps(step)).lower(state, batch, fixed).compile()
    memory: Any = compiled.memory_analysis()
    of_state, of_batch = (
        sum(bytes_of_one_device(shape) for shape in jax.tree.leaves(tree))
        for tree in ((state, fixed), batch)
    )
    # The new state takes the place of the old one.
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    working = memory.temp_size_in_bytes + max(fresh, 0) + memory.generated_code_size_in_bytes
    return Compiled(compiled, of_state, of_batch, working)


def bytes_of_one_device(shape: jax.ShapeDtypeStruct) -> int:
    """Count the bytes of an array, or of the part of it that one device holds."""
    part = shape.sharding.shard_shape(shape.shape) if shape.sharding else shape.shape
    return math.prod(part) * shape.dtype.itemsize


def first_state(config: Config) -> TrainState:
    """Make the state that training would start from."""
    if config.lora.rank > 0:
        weights = initial_weights(config.model, seed=config.train.seed)
        names = trained_names(config.model, config.lora)
        others = {name: weights[name] for name in names if not is_adapter(name)}
        adapters = initial_adapters(config.model, config.lora, seed=config.train.seed)
        return new_state(config, {**adapters, **others})
    return new_state(config, initial_weights(config.model, seed=config.train.seed))


def frozen_state(config: Config) -> TrainState:
    """Make the weights that would not be trained, in the form of a state."""
    zero, weights = jnp.zeros((), jnp.int32), {}
    if config.lora.rank > 0:
        names = trained_names(config.model, config.lora)
        whole = initial_weights(config.model, seed=config.train.seed)
        weights = {name: weight for name, weight in whole.items() if name not in names}
    return TrainState(zero, weights, (), zero)


def made_up_batches(config: Config) -> dict[str, jax.Array]:
    """Make the rows of one dispatch in the form that the corpus would give, of random tokens."""
    steps = config.train.steps_per_dispatch
    shape = (steps, config.rows_per_step, config.data.sequence_length)
    keys = jax.random.split(jax.random.key(0))
    tokens, targets = (
        jax.random.randint(key, shape, 0, config.model.vocab_size, jnp.int32) for key in keys
    )
    batch = {"tokens": tokens, "targets": targets, "loss_mask": jnp.ones(shape, bool)}
    if config.data.packing == "packed":
        batch["positions"] = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
        batch["segment_ids"] = jnp.ones(shape, jnp.int32)
    return batch


def memory_limit() -> int:
    """Give what the device lets JAX have, or on the CPU what the machine has, in bytes."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def say_what_is_lighter(config: Config, *, limit: int, say: Callable[[str], None]) -> None:
    """Name flags that make a run take less memory, up to the first smaller batch that fits."""
    found = lighter(config)
    if not found:
        say("It does not fit. Use a smaller model or a smaller --data.sequence_length.")
        return
    say("It does not fit. These flags train alike in less memory, and in more time:")
    any_fits = False
    for flags, changed in found:
        size = compile_step(changed).total
        fits = size <= limit
        any_fits = any_fits or fits
        say(f"  {flags}: {size / GIGABYTE:.3g} GB, {'fits' if fits else 'does not fit either'}")
        if fits and changed.train != config.train:
            return
    if not any_fits:
        say("Otherwise use a smaller model or a smaller --data.sequence_length.")


def lighter(config: Config) -> list[tuple[str, Config]]:
    """List settings that take less memory and train alike, with the flags that set them."""
    found = []
    train, model = config.train, config.model
    recomputing = dataclasses.replace(model, activation_checkpointing="full", scan_layers=True)
    recompute = "--model.activation_checkpointing full --model.scan_layers true"
    if recomputing != model:
        found.append((recompute, dataclasses.replace(config, model=recomputing)))
    rows, passes = train.batch_size, train.gradient_accumulation_steps
    while rows > 1 and len(found) < 6:
        divisor = next(d for d in range(2, rows + 1) if rows % d == 0)
        smaller = dataclasses.replace(
            train,
            batch_size=rows // divisor,
            gradient_accumulation_steps=passes * divisor,
        )
        changed = dataclasses.replace(config, train=smaller)
        if not keeps_grid(config, changed):
            break
        rows, passes = smaller.batch_size, smaller.gradient_accumulation_steps
        flags = f"--batch-size {rows} --train.gradient_accumulation_steps {passes}"
        found.append((flags, changed))
    if rows < train.batch_size and recomputing != model:
        smallest = dataclasses.replace(found[-1][1], model=recomputing)
        found.append((f"{found[-1][0]} {recompute}", smallest))
    return found


def keeps_grid(config: Config, changed: Config) -> bool:
    """Tell whether the same devices can share the rows of a smaller pass."""
    devices = len(jax.devices())
    try:
        return grid_sizes(changed, devices=devices) == grid_sizes(config, devices=devices)
    except InputError:
        return False


def time_step(config: Config, compiled: Compiled) -> float:
    """Run some dispatches and give the median time of a step, in seconds."""
    parallel, passes = make_parallel(config), config.train.gradient_accumulation_steps
    state = parallel.make_state(lambda: first_state(config))
    fixed = Fixed(parallel.make_state(lambda: frozen_state(config)).weights, {})
    made_up = jax.device_get(made_up_batches(config))
    size = config.train.steps_per_dispatch
    batches = [{name: rows[step] for name, rows in made_up.items()} for step in range(size)]
    batch = parallel.place_steps(batches, passes=passes)
    state, _ = jax.block_until_ready(compiled.steps(state, batch, fixed))
    times: list[float] = []
    while len(times) < 2 or sum(times) < TIMING_SECONDS:
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled.steps(state, batch, fixed))
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / size


def in_words(seconds: float) -> str:
    """Say a time as people do."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.1f} days"
    if hours >= 2:
        return f"{hours:.1f} hours"
    return f"{minutes:.1f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"
