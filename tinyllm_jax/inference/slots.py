"""All slots of an engine as they lie on its device, and what its programs do with them.

One program reads a chunk of a prompt into a slot, one makes a few tokens for each of the first rows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.inference.sampling import RowSettings, next_tokens
from tinyllm_jax.inference.stored_weights import restore
from tinyllm_jax.model.decoding_weights import decoding_model
from tinyllm_jax.model.kv_cache import LayerCache, empty_cache
from tinyllm_jax.model.layers import compute_dtype

# The likeliest tokens that can be told with each token; OpenAI's limit, too.
MOST_ALTERNATIVES = 20


class Rows(NamedTuple):
    """All slots, as they lie on the device."""

    cache: tuple[LayerCache, ...]
    present: Bool[Array, "slots vocab"]
    token: Int[Array, "slots"]  # the last of each text
    position: Int[Array, "slots"]  # where it stands
    made: Int[Array, "slots"]  # new tokens so far
    left: Int[Array, "slots"]  # new tokens still allowed; 0 is a slot at rest
    end_id: Int[Array, "slots"]
    told: Bool[Array, "slots"]  # whether log-probabilities are asked for
    settings: RowSettings


class Begin(NamedTuple):
    """What a slot becomes once its prompt is read."""

    token: Any
    position: Any
    left: Any
    end_id: Any
    told: Any
    settings: RowSettings


class Made(NamedTuple):
    """What one dispatch made."""

    tokens: Int[Array, "rows steps"]
    counts: Int[Array, "rows"]
    met_end: Bool[Array, "rows"]
    log_probs: Float[Array, "rows steps"]
    alternative_ids: Int[Array, "rows steps alternatives"]
    alternative_log_probs: Float[Array, "rows steps alternatives"]


def empty_rows(config: ModelConfig, begin: Begin, *, slots: int, room: int) -> Rows:
    """Make all slots, at rest, with what a slot becomes for nobody.

    As NumPy arrays: JAX would compile a program for each shape.
    """
    cache = jax.eval_shape(
        lambda: empty_cache(config, batch=slots, slots=room, dtype=compute_dtype(config))
    )

    def zeros(form: Any) -> Any:
        return np.zeros(form.shape, form.dtype)

    def spread(value: Any) -> Any:
        return np.full(slots, value)

    return Rows(
        cache=jax.tree.map(zeros, cache),
        present=zeros(jax.ShapeDtypeStruct((slots, config.vocab_size), bool)),
        token=spread(begin.token),
        position=spread(begin.position),
        made=spread(np.int32(0)),
        left=spread(begin.left),
        end_id=spread(begin.end_id),
        told=spread(begin.told),
        settings=RowSettings(*map(spread, begin.settings)),
    )


def read_chunk(
    config: ModelConfig,
    weights: Any,
    rows: Rows,
    chunk: Int[Array, "1 size"],
    places: tuple[Array, Array, Array, Array],
    begin: Begin,
) -> Rows:
    """Write a chunk of one prompt into its slot; behind the last one, let its row begin.

    Args:
        chunk: Tokens, padded at the end.
        places: Slot, position of the first token, number of tokens, whether the prompt ends here.
    """
    slot, start, count, is_last = places
    weights = restore(weights, dtype=compute_dtype(config))
    model = decoding_model(config, weights, rows=0)  # none goes through the head
    # Out of range is written nowhere, neither into the cache nor among the present tokens.
    number = jnp.arange(chunk.shape[1])
    room = rows.cache[0].slots()
    positions = jnp.where(number < count, start + number, room)[None]
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 0), rows.cache)
    # What an earlier request left is masked, but a NaN times a weight of 0 would still be a NaN.
    own = jax.tree.map(lambda x: jnp.where(start == 0, jnp.zeros_like(x), x), own)
    own = model.hidden(chunk, positions, cache=own).cache
    cache = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, slot, 0), rows.cache, own
    )
    seen = jnp.where(start == 0, False, rows.present[slot])
    seen = seen.at[jnp.where(number < count, chunk[0], config.vocab_size)].set(True)

    def put(old: Array, new: Array) -> Array:
        return old.at[slot].set(jnp.where(is_last, new, old[slot]))

    return Rows(
        cache=cache,
        present=rows.present.at[slot].set(seen),
        token=put(rows.token, begin.token),
        position=put(rows.position, begin.position),
        made=put(rows.made, jnp.int32(0)),
        left=rows.left.at[slot].set(jnp.where(is_last, begin.left, 0)),
        end_id=put(rows.end_id, begin.end_id),
        told=put(rows.told, begin.told),
        settings=RowSettings(*map(put, rows.settings, begin.settings)),
    )


def make_tokens(
    config: ModelConfig,
    known: int,
    most: int,
    weights: Any,
    everything: Rows,
    keep: Bool[Array, "slots"],
    *,
    rows: int,
    reach: int,
) -> tuple[Rows, Made]:
    """Make up to `most` tokens for each of the first `rows` slots.

    Args:
        keep: The rows that go on; a row that is cancelled or being read must not.
        reach: Slots of the cache that are looked at.
    """
    weights = restore(weights, dtype=compute_dtype(config))
    model = decoding_model(config, weights, rows=rows)
    part: Rows = jax.tree.map(lambda x: x[:rows], everything)
    part = part._replace(
        cache=jax.tree.map(lambda x: x[:, :, :reach], part.cache),
        left=jnp.where(keep[:rows], part.left, 0),
    )
    every_row = jnp.arange(rows)
    nothing = jnp.zeros((rows, most, MOST_ALTERNATIVES), jnp.float32)
    made = Made(
        tokens=jnp.zeros((rows, most), jnp.int32),
        counts=jnp.zeros(rows, jnp.int32),
        met_end=jnp.zeros(rows, bool),
        log_probs=nothing[:, :, 0],
        alternative_ids=nothing.astype(jnp.int32),
        alternative_log_probs=nothing,
    )

    def one_token(carried: tuple[Array, Rows, Made]) -> tuple[Array, Rows, Made]:
        # The first step reads the last token of a prompt once more, so that this program alone
        # holds head and sampler.
        step, part, made = carried
        going = part.left > 0
        # A row at rest writes nowhere.
        positions = jnp.where(going, part.position, reach)[:, None]
        hidden = model.hidden(part.token[:, None], positions, cache=part.cache)
        assert hidden.cache is not None
        logits = model.logits(hidden.states)[:, 0]
        logits = jnp.where(jnp.arange(config.vocab_size)[None] < known, logits, -jnp.inf)
        token = next_tokens(
            logits, present=part.present, settings=part.settings, token_number=part.made
        )
        told = _log_probs(logits, token, asked=part.told & going)
        token = jnp.where(going, token, part.token)
        met_end = going & (token == part.end_id)
        column = jnp.where(going, step, most)
        made = Made(
            tokens=made.tokens.at[every_row, column].set(token),
            counts=made.counts + going,
            met_end=made.met_end | met_end,
            log_probs=made.log_probs.at[every_row, column].set(told[0]),
            alternative_ids=made.alternative_ids.at[every_row, column].set(told[1]),
            alternative_log_probs=made.alternative_log_probs.at[every_row, column].set(told[2]),
        )
        part = part._replace(
            cache=hidden.cache,
            present=part.present.at[every_row, jnp.where(going, token, config.vocab_size)].set(
                True
            ),
            token=token,
            position=part.position + going,
            made=part.made + going,
            left=jnp.where(met_end, 0, part.left - going),
        )
        return step + 1, part, made

    _, part, made = jax.lax.while_loop(
        lambda carried: (carried[0] < most) & (carried[1].left > 0).any(),
        one_token,
        (jnp.zeros((), jnp.int32), part, made),
    )

    def put(whole: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, new, (0,) * whole.ndim)

    return jax.tree.map(put, everything, part), made


def _log_probs(
    logits: Float[Array, "rows vocab"], token: Int[Array, "rows"], *, asked: Bool[Array, "rows"]
) -> tuple[Float[Array, "rows"], Int[Array, "rows n"], Float[Array, "rows n"]]:
    """Give log-probabilities of the tokens and of the likeliest; zeros when nobody asks."""
    rows, count = len(logits), min(MOST_ALTERNATIVES, logits.shape[1])

    def compute() -> tuple[Array, Array, Array]:
        found = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        best, ids = jax.lax.top_k(found, count)
        missing = ((0, 0), (0, MOST_ALTERNATIVES - count))
        own = jnp.take_along_axis(found, token[:, None], axis=1)[:, 0]
        return own, jnp.pad(ids.astype(jnp.int32), missing), jnp.pad(best, missing)

    def skip() -> tuple[Array, Array, Array]:
        nothing = jnp.zeros((rows, MOST_ALTERNATIVES), jnp.float32)
        return nothing[:, 0], nothing.astype(jnp.int32), nothing

    return jax.lax.cond(asked.any(), compute, skip)
