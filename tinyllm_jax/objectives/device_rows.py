"""Token shards in the memory of the device, and the rows of a batch read from them there.

A batch then names places only, so that the host has nothing to copy for it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer

from tinyllm_jax.config import Config
from tinyllm_jax.data.shards import Split
from tinyllm_jax.errors import InputError

# `auto` leaves the rest to weights, moments and activations.
LARGEST_SHARE = 1 / 8

Corpus = dict[str, Array]
Rows = dict[str, Array]


def lies_on_device(config: Config, split: Split) -> bool:
    """Tell whether the tokens of a split are to lie on the device.

    Raises:
        InputError: they must, and cannot.
    """
    wanted = config.train.corpus_on_device
    if wanted == "never":
        return False
    problem = why_not(config, split)
    if wanted == "always":
        if problem:
            raise InputError(
                f"train.corpus_on_device=always: {problem}. Use --train.corpus_on_device auto."
            )
        return True
    device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    fits = corpus_bytes(split) <= memory * LARGEST_SHARE
    return device.platform != "cpu" and fits and not problem


def why_not(config: Config, split: Split) -> str:
    """Say why a split cannot be read on the device; "" if it can."""
    if config.parallel.strategy == "pmap":
        return "parallel.strategy=pmap hands its devices their rows"
    if jax.process_count() > 1:
        return "each of several processes reads its own rows"
    if sum(shard.tokens.size for shard in split.shards) > np.iinfo(np.int32).max:
        return "it has more tokens than a 32-bit number can count"
    return ""


def corpus_bytes(split: Split) -> int:
    """Count the bytes that a split takes."""
    return sum(
        array.nbytes
        for shard in split.shards
        for array in vars(shard).values()
        if array is not None
    )


def corpus_arrays(split: Split) -> dict[str, np.ndarray]:
    """Lay the shards of a split end to end."""
    first = vars(split.shards[0])
    return {
        name: np.concatenate([getattr(shard, name) for shard in split.shards])
        for name, array in first.items()
        if array is not None
    }


def row_reader(split: Split) -> Callable[[Corpus, Rows], Rows]:
    """Make the function that reads rows from `corpus_arrays`, as `data.batches.RowReader` does.

    A batch holds `places`, of any shape: the first token of each window of a stream, or the number
    of each stored row.
    """
    width = split.sequence_length + 1

    def read(corpus: Corpus, batch: Rows) -> Rows:
        places = batch["places"]
        if split.packing == "stream":
            return length_rows(windows(corpus["tokens"], places, width=width), None)
        tokens = corpus["tokens"][places].astype(jnp.int32)
        if split.packing == "padded":
            rows = length_rows(tokens, corpus["lengths"][places].astype(jnp.int32))
        else:
            rows = segment_rows(tokens, corpus["segments"][places].astype(jnp.int32))
        if "learn" in corpus:
            rows["loss_mask"] &= corpus["learn"][places][..., 1:]
        return rows

    return read


def windows(
    tokens: Integer[Array, " tokens"], starts: Int[Array, "..."], *, width: int
) -> Int[Array, "... width"]:
    """Cut a window of `width` tokens at each start."""
    cut = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(tokens, start, width))
    return cut(starts.reshape(-1)).reshape(*starts.shape, width).astype(jnp.int32)


def length_rows(tokens: Int[Array, "... width"], lengths: Int[Array, "..."] | None) -> Rows:
    """Do what `data.batches.length_batch` does; None is rows without padding."""
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    mask = jnp.ones(targets.shape, bool)
    if lengths is not None:
        places = jnp.broadcast_to(jnp.arange(1, tokens.shape[-1]), targets.shape)
        mask = places < lengths[..., None]
    return {"tokens": inputs, "targets": targets, "loss_mask": mask}


def segment_rows(tokens: Int[Array, "... width"], segments: Int[Array, "... width"]) -> Rows:
    """Do what `data.batches.segment_batch` does."""
    before, after = segments[..., :-1], segments[..., 1:]
    places = jnp.broadcast_to(jnp.arange(before.shape[-1], dtype=jnp.int32), before.shape)
    changes = jnp.concatenate(
        [jnp.zeros_like(before[..., :1], bool), before[..., 1:] != before[..., :-1]], axis=-1
    )
    starts = jax.lax.cummax(jnp.where(changes, places, 0), axis=before.ndim - 1)
    return {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "loss_mask": (before == after) & (after > 0),
        "positions": places - starts,
        "segment_ids": before,
    }
