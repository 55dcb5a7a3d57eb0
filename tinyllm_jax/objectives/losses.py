"""Losses on logits, summed over targets; what they are divided by is the train step's business."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinyllm_jax.model.layers import matmul_precision
from tinyllm_jax.model.placement import placement
from tinyllm_jax.objectives.head_blocks import count_blocks, in_blocks


def cross_entropy_sum(
    logits: Float[Array, "batch seq vocab"],
    targets: Int[Array, "batch seq"],
    loss_mask: Bool[Array, "batch seq"],
) -> Float[Array, ""]:
    """Sum -log p(target) over the targets where `loss_mask` is True.

    Computed in the type of the logits, which is float32 or wider.

    Returns:
        Nats.
    """
    # It cancels; without a gradient of its own three passes over the logits are saved.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1)) + largest[..., 0]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(loss_mask, log_sum - chosen, 0.0))


def head_cross_entropy_sum(
    model: Any,
    hidden: Float[Array, "batch seq hidden"],
    targets: Int[Array, "batch seq"],
    loss_mask: Bool[Array, "batch seq"],
) -> Float[Array, ""]:
    """Do the `cross_entropy_sum` of a model's logits without ever holding all of them.

    Args:
        model: A `Transformer`; its head is what counts here.
        hidden: Final hidden states.

    Returns:
        Nats.
    """
    tied = model.config.tie_word_embeddings
    matrix = model.embed_tokens.weight[...] if tied else model.lm_head.kernel[...]
    vocab_axis = 0 if tied else 1
    blocks = count_blocks(*hidden.shape[:2], vocab=matrix.shape[vocab_axis])
    if blocks == 1:
        return cross_entropy_sum(model.logits(hidden), targets, loss_mask)
    return _blocked_sum(hidden, matrix, targets, loss_mask, blocks, vocab_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocked_sum(
    hidden: Array, matrix: Array, targets: Array, loss_mask: Array, blocks: int, vocab_axis: int
) -> Array:
    kernel = matrix.astype(hidden.dtype)

    def add_block(loss: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        states, targets, loss_mask = block
        logits = _block_logits(states, kernel, vocab_axis)
        return loss + cross_entropy_sum(logits, targets, loss_mask), None

    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    cut: Any = tuple(in_blocks(array, blocks) for array in (hidden, targets, loss_mask))
    return jax.lax.scan(add_block, jnp.zeros((), wide), cut)[0]


def _blocked_sum_with_gradients(
    hidden: Array, matrix: Array, targets: Array, loss_mask: Array, blocks: int, vocab_axis: int
) -> tuple[Array, tuple[Array, Array]]:
    """Make the gradients beside the loss, while a block's logits are there."""
    kernel, width = matrix.astype(hidden.dtype), hidden.shape[-1]
    wide, precision = jnp.promote_types(hidden.dtype, jnp.float32), matmul_precision(hidden.dtype)
    product: Any = functools.partial(
        jax.lax.dot_general, precision=precision, preferred_element_type=wide
    )

    def add_block(sums: tuple[Array, Array], block: tuple[Array, Array, Array]) -> Any:
        states, targets, loss_mask = block
        logits = _block_logits(states, kernel, vocab_axis)
        loss, back = jax.vjp(lambda x: cross_entropy_sum(x, targets, loss_mask), logits)
        (change,) = back(jnp.ones((), wide))
        # Products take the model's own type, as they do everywhere in it; sums are wide.
        rows = change.astype(hidden.dtype).reshape(-1, change.shape[-1])
        states_change = product(rows, kernel, (((1,), (vocab_axis,)), ((), ())))
        # The vocabulary last: see `Linear`.
        matrix_change = product(states.reshape(-1, width), rows, (((0,), (0,)), ((), ())))
        sums = (sums[0] + loss, sums[1] + matrix_change)
        return sums, states_change.astype(hidden.dtype).reshape(states.shape)

    start = (jnp.zeros((), wide), jnp.zeros((width, matrix.shape[vocab_axis]), wide))
    cut: Any = tuple(in_blocks(array, blocks) for array in (hidden, targets, loss_mask))
    (loss, matrix_change), changes = jax.lax.scan(add_block, start, cut)
    if vocab_axis == 0:
        matrix_change = matrix_change.T
    changes = changes.swapaxes(0, 1).reshape(hidden.shape[0], -1, width)
    return loss, (changes[:, : hidden.shape[1]], matrix_change.astype(matrix.dtype))


def _scaled_gradients(
    _blocks: int, _vocab_axis: int, gradients: tuple[Array, Array], change: Array
) -> tuple[Array, Array, None, None]:
    hidden, matrix = ((change * each.astype(change.dtype)).astype(each.dtype) for each in gradients)
    return hidden, matrix, None, None


_blocked_sum.defvjp(_blocked_sum_with_gradients, _scaled_gradients)


def _block_logits(states: Array, kernel: Array, vocab_axis: int) -> Array:
    """Score the vocabulary as `Transformer.logits` does."""
    logits = jax.lax.dot_general(
        states.reshape(-1, states.shape[-1]),
        kernel,
        (((1,), (1 - vocab_axis,)), ((), ())),
        precision=matmul_precision(states.dtype),
        preferred_element_type=jnp.promote_types(states.dtype, jnp.float32),
    )
    return placement().logits(logits.reshape(*states.shape[:-1], -1))
