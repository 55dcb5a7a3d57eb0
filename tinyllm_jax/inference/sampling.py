"""From logits to the next token: repetition penalty, then temperature, then top-k, then top-p.

Settings are arrays with one value for each row, so that other values never compile again and rows
of one batch may differ.

Source: the order and every rule are those of transformers, generation/logits_process.py; the
penalty: Keskar et al. 2019, arXiv:1909.05858, section 4.1; top-p: Holtzman et al. 2020,
arXiv:1904.09751, section 3.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


class RowSettings(NamedTuple):
    """How each row of a batch is sampled; the fields mean what they mean in `SamplingConfig`."""

    temperature: Float[Array, "batch"]
    top_k: Int[Array, "batch"]
    top_p: Float[Array, "batch"]
    repetition_penalty: Float[Array, "batch"]
    seed: UInt32[Array, "batch"]
    sample_number: Int[Array, "batch"]  # counts the samples of one prompt


def next_tokens(
    logits: Float[Array, "batch vocab"],
    *,
    present: Bool[Array, "batch vocab"],
    settings: RowSettings,
    token_number: Int[Array, "batch"],
) -> Int[Array, "batch"]:
    """Pick the next token of each row: the likeliest at temperature 0, else a drawn one.

    A row's noise depends on its seed, sample number and token number alone, so its text does not
    depend on what else is in the batch.

    Args:
        present: True for the tokens that stand in the row's prompt or output.
        token_number: How many new tokens the row already has.
    """
    # Probabilities at least in float32, whatever the model computes in.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logits = penalise_repetition(logits, present=present, penalty=settings.repetition_penalty)
    drawing = settings.temperature > 0

    def draw() -> Int[Array, "batch"]:
        noisy = filtered(logits, settings=settings) + row_noise(logits, settings, token_number)
        return first_largest(jnp.where(drawing[:, None], noisy, logits))

    return jax.lax.cond(drawing.any(), draw, lambda: first_largest(logits))


def first_largest(logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """Give the first of the largest logits of each row, NaN counting as the smallest.

    XLA's CPU backend takes four times as long for `argmax` of a few rows, and makes its input again
    for each of the two numbers that it keeps.
    """
    # Else no logit might equal the largest, and a token be picked that has been ruled out.
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    last = logits.shape[1] - 1
    largest = logits.max(axis=1, keepdims=True)
    ids = jnp.arange(last + 1, dtype=jnp.int32)[None]
    return jnp.where(logits == largest, ids, last).min(axis=1)


def filtered(
    logits: Float[Array, "batch vocab"], *, settings: RowSettings
) -> Float[Array, "batch vocab"]:
    """Scale by temperature and put -inf where top-k or top-p leaves a token out.

    Top-k and top-p cost time, so each is skipped when no row asks for it. Rows of temperature 0 are
    not scaled.
    """
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
    logits = logits / temperature.astype(logits.dtype)[:, None]
    logits = jax.lax.cond(
        (settings.top_k > 0).any(), lambda: keep_top_k(logits, top_k=settings.top_k), lambda: logits
    )
    return jax.lax.cond(
        (settings.top_p < 1).any(), lambda: keep_top_p(logits, top_p=settings.top_p), lambda: logits
    )


def penalise_repetition(
    logits: Float[Array, "batch vocab"],
    *,
    present: Bool[Array, "batch vocab"],
    penalty: Float[Array, "batch"],
) -> Float[Array, "batch vocab"]:
    """Divide positive and multiply negative logits of tokens that are already there."""
    penalty = penalty.astype(logits.dtype)[:, None]
    return jnp.where(present, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(
    logits: Float[Array, "batch vocab"], *, top_k: Int[Array, "batch"]
) -> Float[Array, "batch vocab"]:
    """Keep the k largest logits of each row, and every equal of the k-th; 0 keeps all."""
    vocab = logits.shape[1]
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    return _keep_likeliest(logits, jnp.ones_like(logits, jnp.int32), reach=wanted)


def keep_top_p(
    logits: Float[Array, "batch vocab"], *, top_p: Float[Array, "batch"]
) -> Float[Array, "batch vocab"]:
    """Keep the fewest, likeliest tokens of each row that together reach `top_p`; 1 keeps all.

    Every equal of the last one stays too, where transformers' choice depends on its sort.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    # Infinity is never reached, so all stay, and rounding of the sum cannot cost a token.
    reach = jnp.where(top_p >= 1, jnp.inf, top_p).astype(probabilities.dtype)
    return _keep_likeliest(logits, probabilities, reach=reach)


def _keep_likeliest(
    logits: Float[Array, "batch vocab"],
    amounts: Array,
    *,
    reach: Array,
) -> Float[Array, "batch vocab"]:
    """Keep the largest logits, as few as it takes for their amounts to add up to `reach`.

    The smallest logit to keep is found bit by bit, since sorting a vocabulary takes ten times as
    long. Flipping the sign bit of positive floats and all bits of negative ones makes unsigned
    integers of the same order.
    """
    bits = jnp.finfo(logits.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    one = jnp.ones((), unsigned)
    raw = jax.lax.bitcast_convert_type(logits, unsigned)
    ordered = jnp.where(raw >> (bits - 1) == 1, ~raw, raw | (one << (bits - 1)))

    def narrow(step: Array, threshold: Array) -> Array:
        higher = threshold | (one << (bits - 1 - step).astype(unsigned))
        total = jnp.where(ordered >= higher[:, None], amounts, jnp.zeros_like(amounts)).sum(axis=1)
        return jnp.where(total >= reach, higher, threshold)

    threshold = jax.lax.fori_loop(0, bits, narrow, jnp.zeros(logits.shape[0], unsigned))
    return jnp.where(ordered >= threshold[:, None], logits, -jnp.inf)


def row_noise(
    logits: Float[Array, "batch vocab"], settings: RowSettings, token_number: Int[Array, "batch"]
) -> Float[Array, "batch vocab"]:
    """Draw the Gumbel noise whose sum with log-probabilities is largest at a fair sample."""

    def one_row(seed: Array, sample_number: Array, number: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed), sample_number)
        key = jax.random.fold_in(key, number)
        return jax.random.gumbel(key, logits.shape[1:], logits.dtype)

    return jax.vmap(one_row)(settings.seed, settings.sample_number, token_number)
