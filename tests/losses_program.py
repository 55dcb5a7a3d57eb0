"""Takes steps on pairs and sampled answers with eight devices; prints what it found as JSON."""

import dataclasses
import json
import os
from typing import Any

from conftest import flags_for_devices

os.environ["XLA_FLAGS"] = flags_for_devices(8)

import jax
import numpy as np
from llama_oracle import SMALL

from tinyllm_jax.config import Config, ParallelConfig, PreferenceConfig, RlhfConfig, TrainConfig
from tinyllm_jax.model.weights import initial_weights, model_structure
from tinyllm_jax.objectives import head_blocks
from tinyllm_jax.objectives.policy import make_policy_loss, make_policy_weight
from tinyllm_jax.objectives.preference import count_pairs, make_preference_loss
from tinyllm_jax.objectives.reward import make_reward_loss
from tinyllm_jax.training.parallel import make_parallel
from tinyllm_jax.training.step import NOTHING_FIXED, make_train_step, new_state, scan_steps

MODEL = dataclasses.replace(
    SMALL,
    vocab_size=64,
    num_hidden_layers=1,
    score_head=True,
    tie_word_embeddings=False,
    initializer_range=0.1,
)
GRIDS = {
    "one": ParallelConfig(data=1),
    "data 2 x fsdp 2 x tensor 2": ParallelConfig(fsdp=2, tensor=2),
    "pmap": ParallelConfig(strategy="pmap", data=4),
}
PPO = RlhfConfig(algorithm="ppo", loss_level="sequence")
LOSSES: dict[str, Any] = {
    "preference": (make_preference_loss(PreferenceConfig()), count_pairs),
    "reward": (make_reward_loss(), count_pairs),
    "ppo": (make_policy_loss(PPO), make_policy_weight(PPO)),
}
ROWS, PLACES, PASSES, STEPS = 16, 13, 2, 2


def batch_of(name: str, numbers: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw rows of answers of any length, some rows of padding among them."""

    def answers(prefix: str, targets: str) -> dict[str, np.ndarray]:
        tokens = numbers.integers(0, 64, (ROWS, PLACES + 1)).astype(np.int32)
        lengths = numbers.integers(3, PLACES + 1, (ROWS, 1)) * (np.arange(ROWS) % 7 > 0)[:, None]
        places = np.arange(PLACES)[None]
        mask = (places >= 2) & (places < lengths)
        return {f"{prefix}tokens": tokens[:, :-1], f"{prefix}targets": tokens[:, 1:], targets: mask}

    if name == "ppo":
        names = ("old_log_probs", "reference_log_probs", "advantages", "returns", "old_values")
        drawn = {each: numbers.normal(size=(ROWS, PLACES)).astype(np.float32) for each in names}
        drawn["old_log_probs"] -= 4.0
        drawn["reference_log_probs"] -= 4.0
        return answers("", "loss_mask") | drawn
    batch = answers("chosen_", "chosen_mask") | answers("rejected_", "rejected_mask")
    batch["rejected_mask"] &= batch["chosen_mask"].any(axis=1, keepdims=True)
    for kind in ("chosen", "rejected"):
        drawn = -20.0 * numbers.random(ROWS)
        batch[f"reference_{kind}"] = drawn.astype(np.float32)
    return batch


def main() -> None:
    # Logits come in blocks on every grid, and the last one is short.
    head_blocks.CPU_BLOCK_TOKENS = 8
    structure, _ = model_structure(MODEL)
    found: dict[str, Any] = {}
    for name, (loss_sums, loss_weight) in LOSSES.items():
        numbers = np.random.default_rng(0)
        batches = [batch_of(name, numbers) for _ in range(STEPS)]
        for grid, parallel_config in GRIDS.items():
            config = Config(
                model=MODEL,
                train=TrainConfig(batch_size=ROWS // PASSES, gradient_accumulation_steps=PASSES),
                parallel=parallel_config,
            )
            parallel = make_parallel(config)
            state = parallel.make_state(
                lambda config=config: new_state(config, initial_weights(MODEL, seed=1))
            )
            take = parallel.compile_train_steps(
                scan_steps(make_train_step(config, structure, loss_sums, loss_weight))
            )
            state, told = take(state, parallel.place_steps(batches, passes=PASSES), NOTHING_FIXED)
            weights = {key: np.asarray(w).ravel().tolist() for key, w in state.weights.items()}
            means = {key: np.asarray(value).tolist() for key, value in jax.device_get(told).items()}
            described = parallel.description
            found[f"{name}, {grid}"] = {"told": means, "weights": weights, "grid": described}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
