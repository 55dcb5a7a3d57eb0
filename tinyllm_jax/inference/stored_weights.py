"""Weights in fewer bits, for inference: bfloat16, or 8-bit whole numbers with a scale per channel.

Only matrices are rounded to 8 bits; each output channel (a row of the embedding) has its own scale,
so one large weight spoils no other channel. They are turned back where they are used, so activations
and sums keep the model's precision.

Source: symmetric, weight-only, per channel: Dettmers et al. 2022, arXiv:2208.07339, section 2.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from tinyllm_jax.model.moe import ROUTER
from tinyllm_jax.model.weights import Weights


class Rounded(NamedTuple):
    """A matrix as whole numbers from -127 to 127, times the scale of each channel."""

    numbers: Int8[Array, "*shape"]
    scales: Float[Array, "*broadcast"]


def store(weights: Mapping[str, Any], *, kind: str, dtype: jnp.dtype) -> dict[str, Any]:
    """Bring weights into the form in which they are kept while a model is used.

    Args:
        weights: The flat dictionary of `tinyllm_jax.model.weights`.
        kind: "auto" (the type that the model computes in), float32, bfloat16 or int8.
        dtype: The type that the model computes in.
    """
    kept: dict[str, Any] = {}
    for name, value in weights.items():
        value = jnp.asarray(value)
        if name.endswith(ROUTER):
            kept[name] = value
        elif kind == "int8" and value.ndim > 1:
            kept[name] = round_to_int8(value, channel_axis=0 if is_table(name) else -1)
        elif kind in ("auto", "int8"):
            kept[name] = value.astype(dtype)
        else:
            kept[name] = value.astype(kind)
    return kept


def restore(stored: Mapping[str, Any], *, dtype: jnp.dtype) -> Weights:
    """Give weights in the type that the model computes in, from the form that `store` made."""
    found = {}
    for name, value in stored.items():
        if isinstance(value, Rounded):
            found[name] = value.numbers.astype(dtype) * value.scales.astype(dtype)
        else:
            found[name] = value if name.endswith(ROUTER) else value.astype(dtype)
    return found


def is_table(name: str) -> bool:
    """Tell the embedding, whose rows are its channels, from a kernel [in, out]."""
    return name == "embed_tokens.weight"


def round_to_int8(value: Float[Array, "*shape"], *, channel_axis: int) -> Rounded:
    """Round to the nearest of 255 steps between minus and plus the largest of each channel."""
    # Of stacked experts, each has channels of its own.
    summed = 1 if channel_axis == 0 else value.ndim - 2
    largest = jnp.abs(value).max(axis=summed, keepdims=True).astype(jnp.float32)
    scales = jnp.where(largest > 0, largest / 127.0, 1.0)
    numbers = jnp.round(value.astype(jnp.float32) / scales).astype(jnp.int8)
    return Rounded(numbers, scales)
