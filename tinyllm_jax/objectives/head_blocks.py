"""The head in blocks of positions, since the logits of a whole batch are the largest array by far."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinyllm_jax.model.placement import placement

# On a CPU blocks of 512 tokens were the fastest of 256, 512 and 1024 for the cross-entropy, at vocabularies
# of 4,096 and 32,000: smaller ones read the sum of the head's gradient too often, larger ones leave the
# cache. An accelerator needs larger products to be busy; its number, in bytes of float32 logits, is a guess
# that keeps memory small.
CPU_BLOCK_TOKENS = 512
BLOCK_BYTES = 256 * 2**20


def count_blocks(rows: int, positions: int, *, vocab: int) -> int:
    """Say in how many blocks of positions the logits of `rows` x `positions` tokens are made."""
    rows = math.ceil(rows / placement().row_groups)
    on_cpu = jax.default_backend() == "cpu"
    tokens = CPU_BLOCK_TOKENS if on_cpu else BLOCK_BYTES // (4 * vocab)
    return math.ceil(positions / max(tokens // rows, 1))


def in_blocks(array: Array, blocks: int) -> Array:
    """Cut positions into blocks, as a first axis; rows stay together, since devices divide them."""
    size = math.ceil(array.shape[1] / blocks)
    missing = blocks * size - array.shape[1]
    # What is added counts nowhere: a mask is padded with False, and what is made of each position is cut off.
    array = jnp.pad(array, ((0, 0), (0, missing), *((0, 0),) * (array.ndim - 2)))
    return array.reshape(array.shape[0], blocks, size, *array.shape[2:]).swapaxes(0, 1)


def measure_logits(
    model: Any,
    hidden: Float[Array, "batch seq hidden"],
    measure: Callable[..., Any],
    *arrays: Array,
) -> Any:
    """Do `measure(model.logits(hidden), *arrays)` without ever holding all logits.

    Where there are several blocks, a gradient makes the logits of each anew: one product more, and
    memory for one block.

    Args:
        model: A `Transformer`; its head is what counts here.
        hidden: Final hidden states.
        measure: Makes arrays [batch, seq] of logits [batch, seq, vocab] and of `arrays`, each
            position by itself.
        arrays: [batch, seq] each.
    """
    rows, positions = hidden.shape[:2]
    blocks = count_blocks(rows, positions, vocab=model.config.vocab_size)
    if blocks == 1:
        return measure(model.logits(hidden), *arrays)
    measured = jax.checkpoint(
        lambda states, *cut: measure(model.logits(states), *cut),
        prevent_cse=False,  # a loop does that by itself
    )
    found = jax.lax.map(
        lambda block: measured(*block), tuple(in_blocks(each, blocks) for each in (hidden, *arrays))
    )
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :positions], found)
