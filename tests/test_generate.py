"""Generation from the cache equals generation without one, row by row, and compiles once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_oracle import SMALL, changed, random_weights, transformers_llama

from tinyllm_jax.config import SamplingConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.generate import (
    SMALLEST_BUCKET,
    Generator,
    bucket,
    read_prompts,
    row_settings,
)
from tinyllm_jax.inference.sampling import next_tokens
from tinyllm_jax.model.kv_cache import empty_cache
from tinyllm_jax.model.weights import merge_weights, model_structure

# The context is no power of two. Most tests ask for as many tokens, and so share a program.
CONFIG = changed(SMALL, max_position_embeddings=100)
GREEDY = SamplingConfig(greedy=True, max_new_tokens=80)
DRAWN = SamplingConfig(temperature=1.0, top_p=0.99, max_new_tokens=80)
PROMPTS = [[1, 5, 9, 33], [1], [1, 40, 2, 60, 7, 8, 12, 13, 14, 15, 16], [1, 3]]

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Give weights whose greedy texts are neither one repeated token nor a short cycle."""
    return random_weights(CONFIG, std=0.5)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(CONFIG)


@pytest.fixture(scope="module")
def next_logits(weights: Weights) -> Callable[[list[int]], np.ndarray]:
    """Give the logits after a text, computed anew from all of it."""
    structure, _ = model_structure(CONFIG)
    limit = CONFIG.max_position_embeddings
    forward = jax.jit(lambda tokens: merge_weights(structure, weights)(tokens))

    def compute(text: list[int]) -> np.ndarray:
        padded = np.zeros((1, limit), np.int32)
        padded[0, : len(text)] = text
        return np.array(forward(padded)[0, len(text) - 1])

    return compute


def token_lists(found: Any) -> list[list[int]]:
    """Flatten continuations into lists of token ids."""
    return [sample.token_ids.tolist() for samples in found for sample in samples]


# The cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_cached_logits_equal_uncached_ones(kv_heads: int, dtype: str, tolerance: float) -> None:
    config = changed(CONFIG, num_key_value_heads=kv_heads, compute_dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12))
    with jax.enable_x64(dtype == "float64"):
        structure, _ = model_structure(config)
        weights = random_weights(config)

        @jax.jit
        def uncached(weights: Any) -> jax.Array:
            return merge_weights(structure, weights)(jnp.asarray(tokens))

        @jax.jit
        def step(weights: Any, token: Any, position: Any, cache: Any) -> Any:
            model = merge_weights(structure, weights)
            hidden = model.hidden(token, position, cache=cache)
            return model.logits(hidden.states), hidden.cache

        expected = uncached(weights)
        cache: Any = empty_cache(config, batch=2, slots=16, dtype=jnp.dtype(dtype))
        for position in range(12):
            actual, cache = step(
                weights, tokens[:, position, None], np.full((2, 1), position), cache
            )
            np.testing.assert_allclose(actual[:, 0], expected[:, position], rtol=0, atol=tolerance)


def test_padding_behind_a_prompt_stays_in_its_own_slots(weights: Weights) -> None:
    structure, _ = model_structure(CONFIG)
    tokens = np.random.default_rng(0).integers(1, CONFIG.vocab_size, (1, 16))

    @jax.jit
    def read(tokens: Any) -> Any:
        return read_prompts(merge_weights(structure, weights), tokens, slots=20)

    padded = tokens.copy()
    padded[:, 9:] = 0
    for full, short in zip(
        jax.tree.leaves(read(tokens)), jax.tree.leaves(read(padded)), strict=True
    ):
        assert full.shape[2] == 20
        np.testing.assert_array_equal(full[:, :, :9], short[:, :, :9])
        assert np.abs(full[:, :, 9:16] - short[:, :, 9:16]).max() > 0


# Greedy -------------------------------------------------------------------------------------------


def test_greedy_tokens_equal_an_uncached_loop(
    generator: Generator, weights: Weights, next_logits: Callable[[list[int]], np.ndarray]
) -> None:
    (actual,) = token_lists(generator.generate(weights, PROMPTS[:1], sampling=GREEDY, eos_id=-1))
    text = list(PROMPTS[0])
    for _ in range(80):
        text.append(int(next_logits(text).argmax()))
    assert actual == text[len(PROMPTS[0]) :]
    assert len(set(actual)) > 15, "a text this monotonous could hide an error"


def test_drawn_tokens_equal_an_uncached_loop(
    generator: Generator, weights: Weights, next_logits: Callable[[list[int]], np.ndarray]
) -> None:
    sampling = dataclasses.replace(DRAWN, top_k=30, repetition_penalty=1.1, seed=11)
    (actual,) = token_lists(generator.generate(weights, PROMPTS[:1], sampling=sampling, eos_id=-1))
    settings, pick = row_settings(sampling, rows=1), jax.jit(next_tokens)
    text = list(PROMPTS[0])
    for number in range(80):
        present = np.isin(np.arange(CONFIG.vocab_size), text)[None]
        token = pick(
            next_logits(text)[None],
            present=present,
            settings=settings,
            token_number=np.array([number], np.int32),
        )
        text.append(int(token[0]))
    assert actual == text[len(PROMPTS[0]) :]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_tokens_equal_transformers(
    generator: Generator, weights: Weights, penalty: float
) -> None:
    import torch

    sampling = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    (actual,) = token_lists(generator.generate(weights, PROMPTS[:1], sampling=sampling, eos_id=-1))
    text = transformers_llama(CONFIG, weights).generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=80, do_sample=False, repetition_penalty=penalty
    )
    assert actual == text[0, len(PROMPTS[0]) :].tolist()


# Rows of one batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_prompts_of_different_lengths_in_one_batch_give_what_each_gives_alone(
    generator: Generator, weights: Weights, greedy: bool
) -> None:
    sampling = dataclasses.replace(DRAWN, greedy=greedy, top_k=20, seed=3)
    together = token_lists(generator.generate(weights, PROMPTS, sampling=sampling, eos_id=-1))
    for prompt, expected in zip(PROMPTS, together, strict=True):
        alone = generator.generate(weights, [prompt], sampling=sampling, eos_id=-1)
        assert token_lists(alone) == [expected]


def test_samples_of_one_prompt_differ_and_the_first_is_what_one_sample_gives(
    generator: Generator, weights: Weights
) -> None:
    two = dataclasses.replace(DRAWN, num_samples=2)
    found = generator.generate(weights, PROMPTS[:2], sampling=two, eos_id=-1)
    assert [len(samples) for samples in found] == [2, 2]
    for prompt, (first, second) in zip(PROMPTS[:2], found, strict=True):
        assert first.token_ids.tolist() != second.token_ids.tolist()
        alone = generator.generate(weights, [prompt], sampling=DRAWN, eos_id=-1)
        assert token_lists(alone) == [first.token_ids.tolist()]


def test_seeds_reproduce_and_differ(generator: Generator, weights: Weights) -> None:
    def tokens(seed: int) -> list[list[int]]:
        sampling = dataclasses.replace(DRAWN, seed=seed)
        return token_lists(generator.generate(weights, PROMPTS[:1], sampling=sampling, eos_id=-1))

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 3.0),
        ("top_k", 1),
        ("top_p", 0.01),
        ("repetition_penalty", 5.0),
        ("greedy", True),
        ("seed", 1),
    ],
)
def test_every_sampling_setting_changes_the_text(
    generator: Generator, weights: Weights, field: str, value: Any
) -> None:
    after = dataclasses.replace(DRAWN, **{field: value})
    texts = [
        token_lists(generator.generate(weights, PROMPTS[:1], sampling=sampling, eos_id=-1))
        for sampling in (DRAWN, after)
    ]
    assert texts[0] != texts[1]


# Where it ends ------------------------------------------------------------------------------------


def test_a_row_stops_at_eos_and_the_others_go_on(generator: Generator, weights: Weights) -> None:
    free = token_lists(generator.generate(weights, PROMPTS, sampling=GREEDY, eos_id=-1))
    eos_id = next(token for token in free[0] if any(token not in tokens for tokens in free))
    found = generator.generate(weights, PROMPTS, sampling=GREEDY, eos_id=eos_id)
    for tokens, (sample,) in zip(free, found, strict=True):
        meets = eos_id in tokens
        expected = tokens[: tokens.index(eos_id) + 1] if meets else tokens
        assert sample.token_ids.tolist() == expected
        assert sample.ended == ("eos" if meets else "length")
    assert found[0][0].ended == "eos"
    assert "length" in [samples[0].ended for samples in found]


def test_an_eos_in_the_prompt_does_not_end_the_row(generator: Generator, weights: Weights) -> None:
    prompt = PROMPTS[2]
    free = token_lists(generator.generate(weights, [prompt], sampling=GREEDY, eos_id=-1))
    eos_id = next(token for token in prompt if token not in free[0])
    found = generator.generate(weights, [prompt], sampling=GREEDY, eos_id=eos_id)
    assert token_lists(found) == free


def test_one_new_token_is_one_new_token(generator: Generator, weights: Weights) -> None:
    sampling = dataclasses.replace(GREEDY, max_new_tokens=1)
    full = token_lists(generator.generate(weights, PROMPTS, sampling=GREEDY, eos_id=-1))
    one = token_lists(generator.generate(weights, PROMPTS, sampling=sampling, eos_id=-1))
    assert one == [tokens[:1] for tokens in full]


def test_without_slide_a_text_ends_where_the_context_is_full(
    generator: Generator, weights: Weights
) -> None:
    sampling = dataclasses.replace(GREEDY, max_new_tokens=500)
    found = generator.generate(weights, PROMPTS, sampling=sampling, eos_id=-1)
    for prompt, (sample,) in zip(PROMPTS, found, strict=True):
        assert len(prompt) + len(sample.token_ids) == 100
        assert sample.ended == "context"


@pytest.mark.parametrize("length", [100, 150])
def test_a_prompt_without_room_behind_it_says_both_numbers(
    generator: Generator, weights: Weights, length: int
) -> None:
    with pytest.raises(InputError, match=rf"{length} tokens.*max_position_embeddings=100.*--slide"):
        generator.generate(weights, [[1], [1] * length], sampling=GREEDY, eos_id=-1)


def test_the_longest_prompt_that_fits_gives_one_token(
    generator: Generator, weights: Weights
) -> None:
    ((sample,),) = generator.generate(weights, [[1] * 99], sampling=GREEDY, eos_id=-1)
    assert (len(sample.token_ids), sample.ended) == (1, "context")


@pytest.mark.parametrize(("prompt", "words"), [([], "no token"), ([67], "vocab_size=67")])
def test_prompts_that_the_model_cannot_read_are_refused(
    generator: Generator, weights: Weights, prompt: list[int], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        generator.generate(weights, [prompt], sampling=GREEDY, eos_id=-1)


# The sliding window -------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_sliding_window_equals_an_uncached_loop_with_the_same_rule(
    generator: Generator,
    weights: Weights,
    next_logits: Callable[[list[int]], np.ndarray],
    penalty: float,
) -> None:
    sampling = SamplingConfig(
        greedy=True, slide=True, max_new_tokens=170, repetition_penalty=penalty
    )
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], list(range(1, 60)) * 2]
    found = generator.generate(weights, prompts, sampling=sampling, eos_id=-1)
    for prompt, (sample,) in zip(prompts, found, strict=True):
        text, start = list(prompt), 0
        while len(text) < len(prompt) + 170:
            if len(text) - start >= 100:
                start = len(text) - 50
            logits = next_logits(text[start:])
            for token in set(text):
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            text.append(int(logits.argmax()))
        assert sample.token_ids.tolist() == text[len(prompt) :]
        assert sample.ended == "length"


def test_sliding_samples_do_not_depend_on_other_rows_and_stop_at_eos(
    generator: Generator, weights: Weights
) -> None:
    one = dataclasses.replace(DRAWN, slide=True, max_new_tokens=230)
    two = dataclasses.replace(one, num_samples=2)
    free = token_lists(generator.generate(weights, PROMPTS[:2], sampling=two, eos_id=-1))
    alone = token_lists(generator.generate(weights, PROMPTS[1:2], sampling=one, eos_id=-1))
    assert [free[2]] == alone
    tokens = alone[0]
    eos_id = next(token for token in tokens[110:] if token not in tokens[:110])
    ((sample,),) = generator.generate(weights, PROMPTS[1:2], sampling=one, eos_id=eos_id)
    assert sample.token_ids.tolist() == tokens[: tokens.index(eos_id) + 1]
    assert sample.ended == "eos"


# Compilations -------------------------------------------------------------------------------------


def test_lengths_and_settings_share_programs(weights: Weights) -> None:
    generator = Generator(CONFIG)
    other_weights = random_weights(CONFIG, seed=1)

    def generate(length: int, weights: Weights = weights, eos_id: int = 2, **fields: Any) -> None:
        sampling = SamplingConfig(**{"max_new_tokens": 80, **fields})
        generator.generate(weights, [[1] * length], sampling=sampling, eos_id=eos_id)

    generate(3)
    assert generator.compilations == 1
    for length in (1, 7, 20, 31, 32):
        generate(length)
    for fields in (
        {"temperature": 0.0},
        {"temperature": 1.7, "top_k": 5, "top_p": 0.3},
        {"repetition_penalty": 1.2, "seed": 9, "greedy": True},
        {"max_new_tokens": 62},
        {"max_new_tokens": 1000},
    ):
        generate(3, **fields)
    generate(3, other_weights)
    generate(3, eos_id=-1)
    assert generator.compilations == 1
    for length in range(1, 99, 3):
        generate(length)
    assert generator.compilations == 3, "prompts of up to 32, 64 and 100 tokens"


def test_buckets_are_powers_of_two_up_to_the_context() -> None:
    lengths = (1, SMALLEST_BUCKET, SMALLEST_BUCKET + 1, 64, 65, 99, 100)
    expected = [SMALLEST_BUCKET, SMALLEST_BUCKET, 64, 64, 100, 100, 100]
    assert [bucket(length, limit=100) for length in lengths] == expected
    assert bucket(5, limit=8) == 8


def test_a_tiny_context_works() -> None:
    config = changed(SMALL, max_position_embeddings=5)
    sampling = SamplingConfig(greedy=True, slide=True, max_new_tokens=20)
    ((sample,),) = Generator(config).generate(
        random_weights(config), [[1, 2]], sampling=sampling, eos_id=-1
    )
    assert len(sample.token_ids) == 20


def test_a_bfloat16_model_generates_from_a_bfloat16_cache(weights: Weights) -> None:
    """Weights are cast once before the loop; the logits must be those of casting in the model."""
    config = changed(CONFIG, compute_dtype="bfloat16")
    sampling = dataclasses.replace(GREEDY, max_new_tokens=10)
    (actual,) = token_lists(
        Generator(config).generate(weights, PROMPTS[:1], sampling=sampling, eos_id=-1)
    )
    structure, _ = model_structure(config)
    forward = jax.jit(lambda tokens: merge_weights(structure, weights)(tokens))
    text = np.array([PROMPTS[0] + actual])
    logits = np.asarray(forward(text))[0]
    # Rounding differs with the shape of the products, so near ties may fall either way.
    for position in range(len(PROMPTS[0]) - 1, text.shape[1] - 1):
        chosen = logits[position, text[0, position + 1]]
        assert chosen > logits[position].max() - 0.05 * logits[position].std()


def test_generation_chooses_the_experts_that_the_model_chooses_in_bfloat16() -> None:
    """Two experts whose router weights differ by less than bfloat16 holds, and that say other things."""
    config = changed(SMALL, num_experts=2, num_experts_per_tok=1, compute_dtype="bfloat16")
    weights = random_weights(config, std=0.5)
    for layer in range(config.num_hidden_layers):
        router = weights[f"layers.{layer}.mlp.gate.kernel"]
        router[:, 1] = router[:, 0] * (1 + 2**-12)
    prompts = [[token] for token in range(4, 60)]
    structure, _ = model_structure(config)

    @jax.jit
    def likeliest(weights: Any) -> jax.Array:
        return merge_weights(structure, weights)(jnp.asarray(prompts))[:, -1].argmax(-1)

    rounded = {
        name: np.asarray(jnp.asarray(weight, jnp.bfloat16), np.float32)
        for name, weight in weights.items()
    }
    expected = np.asarray(likeliest(weights))
    assert (expected != np.asarray(likeliest(rounded))).sum() > 5
    sampling = SamplingConfig(greedy=True, max_new_tokens=1)
    rows = Generator(config).generate(weights, prompts, sampling=sampling, eos_id=-1)
    found = np.asarray([row[0].token_ids[0] for row in rows])
    assert (found == expected).mean() > 0.95  # near ties may fall the other way
