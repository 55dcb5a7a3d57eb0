"""Adapters over eight virtual devices: what steps tell, what they leave, and the merged model."""

import json
import os
from typing import Any

from conftest import flags_for_devices

os.environ["XLA_FLAGS"] = flags_for_devices(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from tinyllm_jax.config import (
    Config,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from tinyllm_jax.model.lora import initial_adapters
from tinyllm_jax.model.weights import initial_weights
from tinyllm_jax.objectives.pretrain import count_targets, next_token_loss
from tinyllm_jax.training.adapters import make_whole, trained_structure
from tinyllm_jax.training.parallel import make_parallel
from tinyllm_jax.training.step import Fixed, make_train_step, new_state, scan_steps

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    compute_dtype="float32",
)
GRIDS = {
    "one": ParallelConfig(data=1),
    "data 2 x fsdp 2 x tensor 2": ParallelConfig(data=2, fsdp=2, tensor=2),
    "pmap": ParallelConfig(strategy="pmap", data=4),
}
PASSES, ROWS, STEPS = 2, 8, 2


def main() -> None:
    """Print, for each grid, what two steps told, the adapters, their parts and the whole model."""
    assert jax.device_count() == 8
    numbers = np.random.default_rng(0)
    rows = [numbers.integers(0, 64, (ROWS, 17), dtype=np.int32) for _ in range(STEPS)]
    batches = [
        {"tokens": r[:, :-1], "targets": r[:, 1:], "loss_mask": numbers.random((ROWS, 16)) < 0.8}
        for r in rows
    ]
    print(json.dumps({name: steps_on(grid, batches) for name, grid in GRIDS.items()}))


def steps_on(grid: ParallelConfig, batches: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    config = Config(
        model=MODEL,
        train=TrainConfig(batch_size=ROWS // PASSES, gradient_accumulation_steps=PASSES),
        optimizer=OptimizerConfig(warmup_steps=0),
        parallel=grid,
        lora=LoraConfig(rank=3, alpha=6.0),
    )
    parallel = make_parallel(config)
    frozen = parallel.place_weights(
        {name: np.asarray(w) for name, w in initial_weights(MODEL, seed=1).items()}, jnp.float32
    )

    def first() -> Any:
        adapters = initial_adapters(MODEL, config.lora, seed=0)
        # Off the start, where half of the gradients are zero.
        return new_state(config, {name: w + 0.02 for name, w in adapters.items()})

    state = parallel.make_state(first)
    step = make_train_step(config, trained_structure(config), next_token_loss, count_targets)
    take = parallel.compile_train_steps(scan_steps(step))
    state, told = take(state, parallel.place_steps(batches, passes=PASSES), Fixed(frozen, {}))
    whole = make_whole(config, frozen, parallel)(state.weights)
    parts = {n: w.addressable_shards[0].data.size / w.size for n, w in state.weights.items()}
    return {
        "grid": parallel.description,
        "told": {key: np.asarray(value).tolist() for key, value in told.items()},
        "adapters": {key: np.asarray(w).ravel().tolist() for key, w in state.weights.items()},
        "whole": {key: np.asarray(w).ravel().tolist() for key, w in whole.items()},
        "parts": parts,
        "frozen_alike": all(whole[n].sharding == frozen[n].sharding for n in frozen),
    }


if __name__ == "__main__":
    main()
