"""A look at every layer in the middle of a run: a program of its own beside the train step.

It takes the coming step as the train step will and gives only norms, so a run that is looked at computes
the very same numbers as one that is not, and one that never is has nothing of this in its programs.

Letters: b batch, n key/value head, q query row, k key position, d head width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tinyllm_jax.config import Config
from tinyllm_jax.model.attention import segment_mask
from tinyllm_jax.model.attention_rows import block_size, head_product, visible_keys
from tinyllm_jax.model.layers import compute_dtype
from tinyllm_jax.model.placement import placement
from tinyllm_jax.model.rope import rope_tables
from tinyllm_jax.model.weights import Weights, merge_weights
from tinyllm_jax.training.adapters import trained_structure
from tinyllm_jax.training.step import (
    DeviceBatch,
    Fixed,
    LossSums,
    LossWeight,
    ReadRows,
    TrainState,
    make_train_step,
)

Parts = dict[str, dict[str, Array]]


def is_layer_look(config: Config, steps: range) -> bool:
    """Tell whether the layers are looked at before a dispatch, which its steps' numbers alone decide."""
    interval = config.monitor.interval_steps
    return interval > 0 and any(step % interval == 0 for step in steps)


def make_layer_look(
    config: Config, loss_sums: LossSums, loss_weight: LossWeight, read_rows: ReadRows | None
) -> Callable[[tuple[TrainState, Fixed], DeviceBatch], Parts]:
    """Build the function that looks at the first step of stacked batches, before it is taken.

    It gives, by layer, with all else under the names of the model:

    - `gradient_norm`, before clipping; `weight_norm`, before the step; `update_ratio`, the norm of the
      change over that of the weights.
    - `activation_rms`: root mean square of what each block hands on, of the step's first pass, without
      dropout, padding counted.
    - `attention_logit_max`: largest scaled product of a query and a key that it may see, of the same rows.
    """
    structure = trained_structure(config)
    step = make_train_step(
        config, structure, loss_sums, loss_weight, read_rows, tell=describe_weights
    )
    passes = config.train.gradient_accumulation_steps

    def look(given: tuple[TrainState, Fixed], batches: DeviceBatch) -> Parts:
        state, fixed = given
        batch = {name: rows[0] for name, rows in batches.items()}
        numbers: dict[str, Any]
        _, numbers = step(state, batch, fixed)
        told: Parts = {
            name: numbers[name] for name in ("gradient_norm", "weight_norm", "update_ratio")
        }
        if read_rows is not None and fixed.corpus:
            batch = read_rows(fixed.corpus, batch)
        if passes > 1:
            batch = jax.tree.map(lambda rows: rows[0], placement().passes(batch, count=passes))
        weights = placement().other_weights({**fixed.weights, **state.weights})
        return told | describe_activations(merge_weights(structure, weights), batch)

    return look


def part_of(name: str) -> str:
    """Name the layer that a weight belongs to, or what it is outside the layers."""
    first, second, *_ = [*name.split("."), ""]
    return f"{first}.{second}" if first == "layers" else first


def describe_weights(gradients: Weights, before: Weights, after: Weights) -> Parts:
    """Give the norms of gradient and weights, and how large a change is beside them, by layer."""

    def norms(arrays: Weights) -> dict[str, Array]:
        squares: dict[str, Array] = {}
        for name, array in arrays.items():
            wide = array.astype(jnp.promote_types(array.dtype, jnp.float32))
            part = part_of(name)
            squares[part] = squares.get(part, jnp.zeros((), wide.dtype)) + jnp.sum(wide**2)
        return {part: jnp.sqrt(square) for part, square in squares.items()}

    weights = norms(before)
    changes = norms({name: after[name] - before[name] for name in before})
    # A layer of zeros, as adapters begin, has no size to compare with.
    ratios = {
        part: jnp.where(norm > 0, changes[part] / jnp.where(norm > 0, norm, 1.0), 0.0)
        for part, norm in weights.items()
    }
    return {"gradient_norm": norms(gradients), "weight_norm": weights, "update_ratio": ratios}


def describe_activations(model: Any, batch: DeviceBatch) -> Parts:
    """Give what a forward pass without dropout shows of each layer."""
    config = model.config
    # Pairs have two answers.
    rows = [array for name, array in batch.items() if name == "tokens" or name.endswith("_tokens")]
    tokens = jnp.concatenate(rows)
    dtype = compute_dtype(config)
    positions = batch.get("positions")
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    segments = batch.get("segment_ids")
    mask = None if segments is None else segment_mask(segments)
    rope = rope_tables(positions, config, dtype=dtype)
    counted = jnp.ones(tokens.shape, bool)

    def block(layer: Any, x: Array, _cache: None, _key: None) -> tuple[Array, None, Any]:
        query, key, _ = layer.self_attn.project(layer.input_layernorm(x), rope, (None,) * 3)
        logit = largest_logit(query, key, mask)
        x, _, _ = layer(
            x, rope, mask, cache=None, positions=positions, counted=counted, dropout_key=None
        )
        return x, None, (mean_square(x), logit)

    x = placement().residual(model.embed_tokens(tokens, dtype=dtype))
    _, _, seen = model.run_blocks(block, x, None, None)
    squares, logits = seen
    names = [f"layers.{index}" for index in range(config.num_hidden_layers)]
    return {
        "activation_rms": dict(zip(names, jnp.sqrt(squares), strict=True)),
        "attention_logit_max": dict(zip(names, logits, strict=True)),
    }


def mean_square(x: Float[Array, "batch seq hidden"]) -> Float[Array, ""]:
    """Average the squares over all devices' rows, in float32 (float64 stays float64)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    total, count = placement().total((jnp.sum(wide**2), jnp.asarray(wide.size, wide.dtype)))
    return total / count


def largest_logit(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq kv_heads head_dim"],
    mask: Bool[Array, "batch seq seq"] | None,
) -> Float[Array, ""]:
    """Find the largest scaled product of a query with a key that it may see.

    Queries go in blocks, so that the products of one block are held at a time.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.transpose(0, 2, 1, 3)
    grouped = grouped.reshape(batch, kv_heads, heads // kv_heads, queries, head_dim)
    key, size, found = key.transpose(0, 2, 1, 3), block_size(queries), []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        visible = visible_keys(mask, start=start, end=end, keys=end)
        rows = grouped[:, :, :, start:end].reshape(batch, kv_heads, -1, head_dim)
        scores = head_product("bnqd,bnkd->bnqk", rows, key[:, :, :end])
        scores = scores.reshape(batch, heads, end - start, end) * head_dim**-0.5
        found.append(jnp.max(jnp.where(visible[:, None], scores, jnp.finfo(scores.dtype).min)))
    return placement().largest(jnp.max(jnp.stack(found)))
