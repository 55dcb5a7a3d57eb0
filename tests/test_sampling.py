"""Sampling equals transformers' processors, and a row's draws are its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from tinyllm_jax.inference.sampling import (
    RowSettings,
    filtered,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalise_repetition,
)

VOCAB = 300


def settings(rows: int, **fields: float) -> RowSettings:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0} | fields
    return RowSettings(
        temperature=jnp.full(rows, values["temperature"], jnp.float32),
        top_k=jnp.full(rows, values["top_k"], jnp.int32),
        top_p=jnp.full(rows, values["top_p"], jnp.float32),
        repetition_penalty=jnp.full(rows, values["repetition_penalty"], jnp.float32),
        seed=jnp.full(rows, values.get("seed", 0), jnp.uint32),
        sample_number=jnp.arange(rows, dtype=jnp.int32),
    )


def random_logits(*, rows: int = 4, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(0).standard_normal((rows, VOCAB))).astype(np.float32)


def transformers_scores(processor: object, logits: np.ndarray, ids: list[list[int]]) -> np.ndarray:
    import torch

    return processor(torch.tensor(ids), torch.from_numpy(logits.copy())).numpy()  # type: ignore[operator]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits()
    ids = [[3, 5, 5, 9], [0, 1, 2, 299], [7, 7, 7, 7], [100, 200, 3, 4]]
    expected = transformers_scores(RepetitionPenaltyLogitsProcessor(penalty), logits, ids)
    present = np.zeros(logits.shape, bool)
    for row, tokens in enumerate(ids):
        present[row, tokens] = True
    actual = penalise_repetition(
        jnp.asarray(logits),
        present=jnp.asarray(present),
        penalty=jnp.full(4, penalty, jnp.float32),
    )
    # torch and XLA may round a quotient in the last bit differently.
    np.testing.assert_allclose(actual, expected, rtol=2e-7)


@pytest.mark.parametrize("top_k", [1, 2, 17, 299, 300, 5000])
def test_top_k_equals_transformers(top_k: int) -> None:
    from transformers import TopKLogitsWarper

    logits = random_logits()
    expected = transformers_scores(TopKLogitsWarper(top_k), logits, [[0]] * 4)
    actual = jax.jit(keep_top_k)(logits, top_k=jnp.full(4, top_k))
    np.testing.assert_array_equal(actual, expected)


def test_top_k_keeps_every_equal_of_the_last_one_like_transformers() -> None:
    from transformers import TopKLogitsWarper

    logits = np.array([[1.0, 2.0, 2.0, 0.0, 2.0, -1.0]], np.float32)
    expected = transformers_scores(TopKLogitsWarper(2), logits, [[0]])
    actual = keep_top_k(jnp.asarray(logits), top_k=jnp.array([2]))
    np.testing.assert_array_equal(actual, expected)
    assert np.isfinite(actual).sum() == 3


def test_top_k_zero_keeps_all() -> None:
    logits = random_logits()
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(logits), top_k=jnp.zeros(4, int)), logits)


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_top_p_equals_transformers(top_p: float, scale: float) -> None:
    from transformers import TopPLogitsWarper

    logits = random_logits(scale=scale)
    expected = transformers_scores(TopPLogitsWarper(top_p), logits, [[0]] * 4)
    actual = jax.jit(keep_top_p)(logits, top_p=jnp.full(4, top_p))
    np.testing.assert_array_equal(actual, expected)


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_at_least_one() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 5))
    kept = keep_top_p(logits, top_p=jnp.array([1e-9, 0.45, 0.55, 0.94, 1.0]))
    assert np.isfinite(kept).sum(axis=1).tolist() == [1, 1, 2, 3, 4]


def test_top_p_of_one_keeps_what_rounding_makes_impossible() -> None:
    logits = jnp.array([[0.0, -200.0, -300.0]])
    np.testing.assert_array_equal(keep_top_p(logits, top_p=jnp.ones(1)), logits)


def test_negative_and_positive_logits_and_infinities_are_in_one_order() -> None:
    logits = jnp.array([[-1.0, 5.0, 0.0, -0.5, 1e-30, -1e-30, -jnp.inf, 1e30]])
    for k in range(1, 9):
        expected = np.argsort(-np.asarray(logits[0]))[:k]
        kept = np.flatnonzero(keep_top_k(logits, top_k=jnp.array([k]))[0] > -np.inf)
        assert set(kept) == set(expected) - {6}


def test_all_filters_in_a_row_equal_transformers_in_its_order() -> None:
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = random_logits()
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.5),
            TemperatureLogitsWarper(0.6),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.8),
        ]
    )
    ids = [logits[row].argsort()[-3:].tolist() for row in range(4)]
    expected = transformers_scores(chain, logits, ids)
    present = np.zeros(logits.shape, bool)
    for row, tokens in enumerate(ids):
        present[row, tokens] = True
    chosen = settings(4, temperature=0.6, top_k=40, top_p=0.8, repetition_penalty=1.5)
    penalised = penalise_repetition(
        jnp.asarray(logits), present=jnp.asarray(present), penalty=chosen.repetition_penalty
    )
    actual = jax.jit(lambda x: filtered(x, settings=chosen))(penalised)
    np.testing.assert_array_equal(np.isfinite(actual), np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_float64_logits_are_filtered_in_float64() -> None:
    with jax.enable_x64(True):
        logits = jnp.array([[1.0, 1.0 + 1e-12, 0.0]], jnp.float64)
        kept = keep_top_k(logits, top_k=jnp.array([1]))
        assert kept.dtype == jnp.float64
        assert np.isfinite(kept).tolist() == [[False, True, False]]


@jax.jit
def draw(logits: Array, chosen: RowSettings, number: Array) -> Array:
    return next_tokens(
        logits,
        present=jnp.zeros(logits.shape, bool),
        settings=chosen,
        token_number=number,
    )


def test_temperature_zero_is_the_likeliest_token_after_the_penalty() -> None:
    logits = jnp.array([[1.0, 3.0, 2.9]])
    present = jnp.array([[False, True, False]])
    for penalty, expected in [(1.0, 1), (1.5, 2)]:
        chosen = settings(1, temperature=0.0, top_k=1, top_p=0.1, repetition_penalty=penalty)
        token = next_tokens(
            logits, present=present, settings=chosen, token_number=jnp.zeros(1, jnp.int32)
        )
        assert token.tolist() == [expected]


def test_one_batch_may_hold_greedy_and_drawn_rows() -> None:
    logits = jnp.asarray(random_logits(scale=0.1))
    chosen = settings(4)._replace(temperature=jnp.array([0.0, 5.0, 0.0, 5.0]))
    tokens = draw(logits, chosen, jnp.zeros(4, jnp.int32))
    likeliest = logits.argmax(axis=-1)
    assert (tokens == likeliest).tolist() == [True, False, True, False]


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    probabilities = np.array([0.5, 0.25, 0.2, 0.05])
    count = 20_000
    logits = jnp.tile(jnp.log(jnp.array(probabilities)), (count, 1))
    tokens = draw(logits, settings(count, temperature=2.0), jnp.zeros(count, jnp.int32))
    expected = probabilities**0.5 / (probabilities**0.5).sum()
    actual = np.bincount(tokens, minlength=4) / count
    np.testing.assert_allclose(actual, expected, atol=4 * (0.25 / count) ** 0.5)


def test_a_draw_depends_on_seed_sample_number_and_token_number_only() -> None:
    logits = jnp.zeros((1, VOCAB))
    zero = jnp.zeros(1, jnp.int32)
    alone = draw(logits, settings(1, seed=5), zero)[0]
    with_others = draw(jnp.zeros((6, VOCAB)), settings(6, seed=5), jnp.zeros(6, jnp.int32))
    assert with_others[0] == alone
    assert len(set(with_others.tolist())) > 1, "samples of one prompt must differ"
    assert draw(logits, settings(1, seed=6), zero)[0] != alone
    assert draw(logits, settings(1, seed=5), zero + 1)[0] != alone


def test_the_largest_seed_works() -> None:
    assert draw(jnp.zeros((1, 4)), settings(1, seed=2**32 - 1), jnp.zeros(1, jnp.int32)).shape == (
        1,
    )
