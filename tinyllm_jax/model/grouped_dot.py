"""Rows sorted by group, each times its own group's matrix, without a product too many.

The twin needs no such room: it loops over experts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int

# Rows of one product on the CPU: fewer cut the matrices' reuse, more are wasted at a group's end.
LARGEST_BLOCK, SMALLEST_BLOCK = 256, 8


def grouped_dot(
    rows: Float[Array, "rows in"],
    kernels: Float[Array, "groups in out"],
    group_sizes: Int[Array, "groups"],
    *,
    precision: Precision,
) -> Float[Array, "rows out"]:
    """Multiply the first `group_sizes[0]` rows by `kernels[0]`, the next by `kernels[1]`, and so on.

    Args:
        group_sizes: They add up to the number of rows, or to fewer: of the rows behind, nothing is
            promised.

    XLA has a grouped product for accelerators, `jax.lax.ragged_dot`. On the CPU that multiplies
    every row by every matrix and masks, so blocks of rows are multiplied there one after another.
    """
    if jax.default_backend() == "cpu":
        return blockwise_dot(rows, kernels, group_sizes)
    return jax.lax.ragged_dot(rows, kernels, group_sizes, precision=precision)


@jax.custom_vjp
def blockwise_dot(
    rows: Float[Array, "rows in"],
    kernels: Float[Array, "groups in out"],
    group_sizes: Int[Array, "groups"],
) -> Float[Array, "rows out"]:
    """Do what `grouped_dot` does, block after block of one group's rows."""
    return _multiply_blocks("re,ef->rf", rows, kernels, group_sizes)


def _forward(rows: Array, kernels: Array, group_sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return blockwise_dot(rows, kernels, group_sizes), (rows, kernels, group_sizes)


def _backward(saved: tuple[Array, ...], change: Array) -> tuple[Array, Array, None]:
    rows, kernels, group_sizes = saved
    of_rows = _multiply_blocks("rf,ef->re", change, kernels, group_sizes)
    size = block_size(rows.shape[0], kernels.shape[0])
    groups, starts, ends, count = _blocks(group_sizes, rows=rows.shape[0], size=size)
    padded_rows, padded_change = (jnp.pad(x, ((0, size), (0, 0))) for x in (rows, change))

    def add_block(block: Array, sums: Array) -> Array:
        start = starts[block]
        left = jax.lax.dynamic_slice_in_dim(padded_rows, start, size)
        right = jax.lax.dynamic_slice_in_dim(padded_change, start, size)
        inside = (start + jnp.arange(size) < ends[block])[:, None]
        product = jnp.einsum(
            "re,rf->ef", jnp.where(inside, left, 0), right, preferred_element_type=wide
        )
        return sums.at[groups[block]].add(product)

    # As in one product: rounded once, not at each block.
    wide = jnp.promote_types(kernels.dtype, jnp.float32)
    zeros = jnp.zeros(kernels.shape, wide)
    of_kernels = jax.lax.fori_loop(0, count, add_block, zeros).astype(kernels.dtype)
    return of_rows, of_kernels, None


blockwise_dot.defvjp(_forward, _backward)


def block_size(rows: int, groups: int) -> int:
    """Choose how many rows are multiplied at once: about those of one group, within bounds."""
    even = max(rows // groups, 1)
    return min(max(1 << (even - 1).bit_length(), SMALLEST_BLOCK), LARGEST_BLOCK)


def _multiply_blocks(equation: str, rows: Array, kernels: Array, group_sizes: Array) -> Array:
    """Multiply blocks in the order of their rows.

    The last block of a group may reach into the next group's rows: what it writes there is
    overwritten by that group's first block, which comes after it.
    """
    size = block_size(rows.shape[0], kernels.shape[0])
    groups, starts, _, count = _blocks(group_sizes, rows=rows.shape[0], size=size)
    padded = jnp.pad(rows, ((0, size), (0, 0)))
    multiply = functools.partial(jnp.einsum, equation)
    width = jax.eval_shape(multiply, padded, kernels[0]).shape[1]

    def write_block(block: Array, out: Array) -> Array:
        product = multiply(
            jax.lax.dynamic_slice_in_dim(padded, starts[block], size), kernels[groups[block]]
        )
        return jax.lax.dynamic_update_slice_in_dim(out, product, starts[block], axis=0)

    empty = jnp.zeros((padded.shape[0], width), rows.dtype)
    return jax.lax.fori_loop(0, count, write_block, empty)[: rows.shape[0]]


def _blocks(
    group_sizes: Int[Array, "groups"], *, rows: int, size: int
) -> tuple[Array, Array, Array, Array]:
    """Cut every group into blocks: the group, first row and group's end of each, and how many."""
    group_ends = jnp.cumsum(group_sizes)
    counts = (group_sizes + size - 1) // size
    last_blocks = jnp.cumsum(counts)
    blocks = jnp.arange(rows // size + group_sizes.shape[0])
    groups = jnp.searchsorted(last_blocks, blocks, side="right")
    groups = jnp.minimum(groups, group_sizes.shape[0] - 1)
    within = blocks - (last_blocks - counts)[groups]
    starts = (group_ends - group_sizes)[groups] + within * size
    return groups, starts, group_ends[groups], last_blocks[-1]
