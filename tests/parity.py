"""What the parity tests share: models of every preset's form, and both sides' numbers.

Errors are relative to the largest magnitude of what is expected, so that a small number beside a
large one is held to what the large one can be computed to.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import SMALL_RUN
from llama_oracle import random_weights

from convert.parity import TOLERANCES
from tinyllm_jax.config import Config, ModelConfig, load_config
from tinyllm_jax.data.prepare import PreparedData, prepare
from tinyllm_jax.model import weights as jax_weights
from tinyllm_jax.objectives import pretrain as jax_pretrain
from tinyllm_jax.train import read_command
from tinyllm_torch.model import weights as torch_weights
from tinyllm_torch.objectives import pretrain as torch_pretrain

# AdamW divides a gradient by its own size, so where one is nearly zero, the last bit of it moves the
# weight by a share of the learning rate, and the next gradients with it. Measured: 4e-5; the loss
# hardly feels it and is held to TOLERANCES.
FLOAT32_NORM_AFTER_50_STEPS = 2e-4
PACKINGS = ("stream", "packed", "padded")

# Two threads of torch on such small matrices only wait for each other.
torch.set_num_threads(1)


def relative_error(actual: Any, expected: Any) -> float:
    """Give the largest difference, relative to the largest magnitude of `expected`."""
    actual, expected = as_float64(actual), as_float64(expected)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    assert np.isfinite(expected).all()
    largest = np.abs(expected).max()
    return float(np.abs(actual - expected).max() / (largest or 1.0))


def as_float64(values: Any) -> np.ndarray:
    """Widen numbers, JAX's arrays or tensors, so that their difference is exact."""
    values = values.detach().numpy() if isinstance(values, torch.Tensor) else values
    return np.asarray(values).astype(np.float64)


def errors(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, float]:
    """Give the relative error of every array of two flat dictionaries with the same names."""
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def assert_equal_in(dtype: str, actual: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Assert that every array is equal to what its type can hold, and name all that are not."""
    tolerance = TOLERANCES[dtype]
    wrong = {name: error for name, error in errors(actual, expected).items() if error > tolerance}
    wrong |= {name: np.nan for name in actual if not np.isfinite(as_float64(actual[name])).all()}
    assert not wrong, f"differ by more than {tolerance} of the largest: {wrong}"


def scaled_down(preset: str) -> ModelConfig:
    """Shrink a preset's model: the same groups, tying and proportions, and odd theta and eps."""
    model = load_config(preset).model
    kv_heads = min(model.num_key_value_heads, 2)
    heads = kv_heads * (model.num_attention_heads // model.num_key_value_heads)
    hidden = heads * 6
    return dataclasses.replace(
        model,
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=round(hidden * model.intermediate_size / model.hidden_size),
        moe_intermediate_size=round(hidden * model.moe_intermediate_size / model.hidden_size),
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=0,
        max_position_embeddings=64,
        rope_theta=model.rope_theta * 1.23456,
        rms_norm_eps=3e-3,
        compute_dtype="float64",
    )


def small_config(packing: str, **settings: Any) -> Config:
    """Give the settings of the small run on toy stories, packed in this way; `__` is a dot."""
    preset, overrides, _ = read_command(SMALL_RUN)
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    odd = {"model.rope_theta": 12345.6, "model.rms_norm_eps": 3e-3}
    return load_config(
        preset or "tiny", {**overrides, **odd, "data.packing": packing, **dotted}, []
    )


def prepared_data(config: Config, folder: Path) -> PreparedData:
    """Prepare a configuration's corpus in this data folder, or find it there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(folder))
        return prepare(config, progress=False)


@functools.cache
def real_batch(packing: str, folder: Path) -> dict[str, np.ndarray]:
    """Gather training rows of toy stories: of 200, those with the most documents and padding.

    The stories are longer than a row, so of most rows each token sees all before it.
    """
    config = small_config(packing)
    objective = jax_pretrain.make_pretraining(config, prepared_data(config, folder))
    batches = [objective.train_batch(number) for number in range(50)]
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    documents = rows.get("segment_ids", np.ones_like(rows["tokens"])).max(axis=1)
    order = np.lexsort([rows["loss_mask"].sum(axis=1), -documents])
    return {name: array[order[:4]] for name, array in rows.items()}


def precision(config: ModelConfig) -> contextlib.AbstractContextManager[Any]:
    """Let JAX keep float64 where the model asks for it."""
    return jax.enable_x64(config.compute_dtype == "float64")


def torch_model(config: ModelConfig, weights: Mapping[str, Any]) -> torch_weights.Transformer:
    """Build the twin around weights under JAX's names."""
    structure, _ = torch_weights.model_structure(config)
    tensors = torch_weights.as_tensors(
        torch_weights.from_jax_weights(weights), config, device="cpu"
    )
    return torch_weights.merge_weights(structure, tensors)


def as_torch_batch(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(rows) for name, rows in batch.items()}


@functools.cache
def _jax_numbers(config: ModelConfig) -> Any:
    structure, _ = jax_weights.model_structure(config)

    def loss_and_logits(weights: Any, batch: Any) -> Any:
        model = jax_weights.merge_weights(structure, weights)
        logits = model(batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
        minimised, sums = jax_pretrain.next_token_loss(model, batch, None)
        targets = jax_pretrain.count_targets(batch)
        told = {name: value / targets for name, value in sums.items()}
        return minimised / targets, {"logits": logits, **told}

    return jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))


def jax_numbers(
    config: ModelConfig, weights: Mapping[str, Any], batch: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Compute logits, loss and every gradient in JAX, gradients under the twin's names."""
    with precision(config):
        (minimised, told), gradients = _jax_numbers(config)(
            {name: jnp.asarray(value) for name, value in weights.items()},
            {name: jnp.asarray(rows) for name, rows in batch.items()},
        )
        named = torch_weights.from_jax_weights(gradients)
    return {"minimised": np.asarray(minimised), **jax.device_get(told), **named}


def torch_numbers(
    config: ModelConfig, weights: Mapping[str, Any], batch: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Compute logits, loss and every gradient in the twin."""
    model, tensors = torch_model(config, weights), as_torch_batch(batch)
    logits = model(tensors["tokens"], tensors.get("positions"), tensors.get("segment_ids"))
    minimised, sums = torch_pretrain.next_token_loss(model, tensors, None)
    targets = torch_pretrain.count_targets(tensors)
    (minimised / targets).backward()
    found = {"logits": logits, "minimised": minimised / targets}
    found |= {name: value / targets for name, value in sums.items()}
    found |= {name: weight.grad for name, weight in model.named_parameters()}
    return {name: value.detach().numpy() for name, value in found.items() if value is not None}


def both_numbers(
    config: ModelConfig, batch: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Compute (twin's, JAX's) numbers with the same weights, of standard deviation 0.1."""
    weights = random_weights(config)
    return torch_numbers(config, weights, batch), jax_numbers(config, weights, batch)
