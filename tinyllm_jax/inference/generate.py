"""Continuations of token rows: read the prompts, then one token at a time from the cache.

    generator = Generator(config.model)
    rows = generator.generate(weights, prompts, sampling=config.sampling, eos_id=tokenizer.eos_id)
    rows[i][j].token_ids  # sample j of prompt i

Weights are an argument, so that a training run samples from its live ones. Reading, drawing and
stopping are one compiled program. It is compiled again only for another number of rows or another
bucket: prompt lengths and cache sizes are rounded up to powers of two.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tinyllm_jax.config import ModelConfig, SamplingConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.sampling import RowSettings, next_tokens
from tinyllm_jax.inference.stored_weights import restore
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.decoding_weights import decoding_model, suit_rows
from tinyllm_jax.model.kv_cache import LayerCache, empty_cache
from tinyllm_jax.model.layers import compute_dtype
from tinyllm_jax.model.transformer import Transformer
from tinyllm_jax.model.weights import Weights, merge_weights, model_structure

# Prompts and caches below this share a program; reading 32 positions costs about what 1 does.
SMALLEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What followed one prompt.

    Attributes:
        token_ids: The new tokens, int32; when `ended` is "eos" the last one is the eos.
        ended: "eos", "length" (`max_new_tokens` are there) or "context" (prompt and continuation
            fill `max_position_embeddings`).
    """

    token_ids: np.ndarray
    ended: str


class Generator:
    """Compiled generation for one model shape; keep it, since it holds the compiled programs.

    Args:
        config: Shape and arithmetic of the model that the weights belong to.
        tokens: Ids from here on are never picked: an embedding may have more rows than its
            tokenizer has tokens. None picks of all.
        longest_prompt: Tokens that room is made for whatever the prompts, so that one program serves
            all up to that length.
    """

    def __init__(self, config: ModelConfig, *, tokens: int | None = None, longest_prompt: int = 0):
        self.config = config
        self._longest_prompt = longest_prompt
        self._run = compiled(
            functools.partial(_continue_rows, config, tokens or config.vocab_size),
            static_argnames=("slots", "samples"),
        )

    @property
    def compilations(self) -> int:
        """Count the programs compiled so far."""
        return self._run._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    def generate(
        self,
        weights: Mapping[str, Any],
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig,
        eos_id: int,
        sample_numbers: np.ndarray | None = None,
    ) -> list[list[Continuation]]:
        """Continue each prompt `sampling.num_samples` times.

        A continuation is a function of weights, prompt, settings, seed and its number among the
        samples of its prompt: the other rows of the batch change nothing but rounding. The same
        prompt twice gives the same text twice.

        Prompt and continuation together take `max_position_embeddings` tokens at most. With
        `sampling.slide`, a row of that length is cut to its last `max_position_embeddings // 2`
        tokens, which are read again from position 0, and goes on; a longer prompt is cut alike.
        The repetition penalty counts the tokens that slid out too.

        Args:
            weights: The flat dictionary of `tinyllm_jax.model.weights`.
            prompts: Token ids, bos included; lengths may differ.
            sampling: Every setting but `prompt`.
            eos_id: The token that ends a continuation; -1 for none.
            sample_numbers: The number of each sample, prompt by prompt, where the samples of
                different prompts shall differ too; else those of each prompt are counted from 0.

        Raises:
            InputError: a prompt is empty, fills the context, or holds an id that the model lacks.
        """
        self.check(prompts, slide=sampling.slide)
        samples, limit = sampling.num_samples, self.config.max_position_embeddings
        new: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
        if sample_numbers is None:
            sample_numbers = np.arange(len(new)) % samples
        ended = [""] * len(new)
        while not all(ended):
            texts = [[*prompts[row // samples], *new[row]] for row in range(len(new))]
            budgets = np.zeros(len(new), np.int32)
            windows = []
            for row, text in enumerate(texts):
                window = text if len(text) < limit else text[-(limit // 2) :]
                windows.append(window)
                if not ended[row]:
                    left = sampling.max_new_tokens - len(new[row])
                    budgets[row] = min(left, limit - len(window))
            # All samples of a prompt start alike, so their first window is read once.
            first = not any(new)
            found = self._run_windows(
                weights,
                windows[::samples] if first else windows,
                texts,
                budgets,
                samples=samples if first else 1,
                sampling=sampling,
                eos_id=eos_id,
                token_numbers=[len(tokens) for tokens in new],
                sample_numbers=sample_numbers,
            )
            for row, (tokens, met_eos) in enumerate(found):
                new[row].extend(tokens.tolist())
                if ended[row]:
                    continue
                if met_eos:
                    ended[row] = "eos"
                elif len(new[row]) == sampling.max_new_tokens:
                    ended[row] = "length"
                elif not sampling.slide:
                    ended[row] = "context"
        rows = [Continuation(np.array(t, np.int32), e) for t, e in zip(new, ended, strict=True)]
        return [rows[start : start + samples] for start in range(0, len(rows), samples)]

    def check(self, prompts: Sequence[Sequence[int]], *, slide: bool) -> None:
        """Raise an `InputError` for a prompt that cannot be continued."""
        limit, vocab = self.config.max_position_embeddings, self.config.vocab_size
        for prompt in prompts:
            if len(prompt) == 0:
                raise InputError("A prompt holds no token. Begin it with bos.")
            outside = [int(token) for token in prompt if not 0 <= token < vocab]
            if outside:
                raise InputError(
                    f"The prompt holds token {outside[0]}, and model.vocab_size={vocab}. Use the "
                    "tokenizer that the model was trained with."
                )
            if len(prompt) >= limit and not slide:
                raise InputError(
                    f"The prompt has {len(prompt)} tokens, and model.max_position_embeddings="
                    f"{limit} leaves no room for a continuation. Use {limit - 1} tokens or fewer, "
                    "or add --slide to go on from the last part of it."
                )

    def _run_windows(
        self,
        weights: Mapping[str, Any],
        windows: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        budgets: np.ndarray,
        *,
        samples: int,
        sampling: SamplingConfig,
        eos_id: int,
        token_numbers: Sequence[int],
        sample_numbers: np.ndarray,
    ) -> list[tuple[np.ndarray, bool]]:
        """Continue windows by at most `budgets` tokens: (new tokens, whether eos ended them)."""
        limit, rows = self.config.max_position_embeddings, len(texts)
        lengths = np.array([len(window) for window in windows], np.int32)
        longest = max(int(lengths.max()), self._longest_prompt)
        end = int((np.repeat(lengths, samples) + budgets).max())
        if self._longest_prompt:
            end = max(end, self._longest_prompt + sampling.max_new_tokens)
        tokens = np.zeros((len(windows), bucket(longest, limit=limit)), np.int32)
        for row, window in enumerate(windows):
            tokens[row, : len(window)] = window
        present = np.zeros((rows, self.config.vocab_size), bool)
        for row, text in enumerate(texts):
            present[row, text] = True
        numbers = jnp.asarray(sample_numbers, jnp.int32)
        found, counts, met_eos = jax.device_get(
            self._run(
                dict(weights),
                tokens,
                lengths,
                present,
                budgets,
                np.array(token_numbers, np.int32),
                np.int32(eos_id),
                row_settings(sampling, rows=rows)._replace(sample_number=numbers),
                slots=bucket(end, limit=limit),
                samples=samples,
            )
        )
        return [(found[row, : counts[row]], bool(met_eos[row])) for row in range(rows)]


def bucket(length: int, *, limit: int) -> int:
    """Round a number of positions up to a power of two, but not above `limit`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def row_settings(sampling: SamplingConfig, *, rows: int) -> RowSettings:
    """Spread one setting over `rows` rows that are the samples of prompts, side by side."""
    temperature = 0.0 if sampling.greedy else sampling.temperature

    def spread(value: float, dtype: Any) -> Array:
        return jnp.asarray(np.full(rows, value, dtype))

    return RowSettings(
        temperature=spread(temperature, np.float32),
        top_k=spread(sampling.top_k, np.int32),
        top_p=spread(sampling.top_p, np.float32),
        repetition_penalty=spread(sampling.repetition_penalty, np.float32),
        seed=spread(sampling.seed, np.uint32),
        sample_number=jnp.asarray(np.arange(rows, dtype=np.int32) % sampling.num_samples),
    )


def read_prompts(
    model: Transformer, tokens: Int[Array, "prompts width"], *, slots: int
) -> tuple[LayerCache, ...]:
    """Give the cache of right-padded prompts, with `slots` slots.

    Padding leaves garbage in the slots after a prompt; each is overwritten by the token of its
    position before any query sees it.
    """
    config, (prompts, width) = model.config, tokens.shape
    cache = empty_cache(config, batch=prompts, slots=width, dtype=compute_dtype(config))
    positions = jnp.broadcast_to(jnp.arange(width)[None], tokens.shape)
    cache = model.hidden(tokens, positions, cache=cache).cache
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - width), (0, 0))), cache)


class _Rows(NamedTuple):
    """What the loop carries: rows in the middle of their continuation."""

    step: Array  # new tokens of rows that still go on
    token: Int[Array, "rows"]  # the last of each text
    cache: tuple[LayerCache, ...]
    present: Bool[Array, "rows vocab"]
    found: Int[Array, "rows slots"]
    counts: Int[Array, "rows"]
    done: Bool[Array, "rows"]
    met_eos: Bool[Array, "rows"]


def _continue_rows(
    config: ModelConfig,
    known: int,
    weights: Weights,
    tokens: Int[Array, "prompts width"],
    lengths: Int[Array, "prompts"],
    present: Bool[Array, "rows vocab"],
    budgets: Int[Array, "rows"],
    token_numbers: Int[Array, "rows"],
    eos_id: Int[Array, ""],
    settings: RowSettings,
    *,
    slots: int,
    samples: int,
) -> tuple[Int[Array, "rows slots"], Int[Array, "rows"], Bool[Array, "rows"]]:
    """Read prompts once, then draw until each row has met eos or its budget of new tokens."""
    # The model casts each weight where it is used, but routers, which compute in float32 at least;
    # done here it costs once, not at each token.
    weights = restore(weights, dtype=compute_dtype(config))
    model = merge_weights(model_structure(config)[0], weights)
    cache = read_prompts(model, tokens, slots=slots)
    cache = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), cache)
    last = jnp.take_along_axis(tokens, (lengths - 1)[:, None], axis=1)[:, 0]
    last, lengths = (jnp.repeat(x, samples, axis=0) for x in (last, lengths))
    count = lengths.shape[0]
    every_row = jnp.arange(count)
    # Below some thirty tokens the copies cost more time than they save.
    suited = weights if slots <= SMALLEST_BUCKET else suit_rows(config, weights, rows=count)

    def read_and_draw(rows: _Rows) -> _Rows:
        # At step 0 this reads the last token of the prompt once more, so that the program holds head
        # and sampler once.
        positions = (lengths - 1 + rows.step)[:, None]
        model = decoding_model(config, suited, rows=count)
        hidden = model.hidden(rows.token[:, None], positions, cache=rows.cache)
        assert hidden.cache is not None
        logits = model.logits(hidden.states)[:, 0]
        token = next_tokens(
            jnp.where(jnp.arange(config.vocab_size)[None] < known, logits, -jnp.inf),
            present=rows.present,
            settings=settings,
            token_number=token_numbers + rows.step,
        )
        met_eos = ~rows.done & (token == eos_id)
        return _Rows(
            step=rows.step + 1,
            token=token,
            cache=hidden.cache,
            present=rows.present.at[every_row, token].set(True),
            found=rows.found.at[:, rows.step].set(token),
            counts=rows.counts + ~rows.done,
            done=rows.done | met_eos | (rows.step + 1 >= budgets),
            met_eos=rows.met_eos | met_eos,
        )

    start = _Rows(
        step=jnp.zeros((), jnp.int32),
        token=last,
        cache=cache,
        present=present,
        found=jnp.zeros((count, slots), jnp.int32),
        counts=jnp.zeros(count, jnp.int32),
        done=budgets <= 0,
        met_eos=jnp.zeros(count, bool),
    )
    rows = jax.lax.while_loop(lambda rows: ~rows.done.all(), read_and_draw, start)
    return rows.found, rows.counts, rows.met_eos
