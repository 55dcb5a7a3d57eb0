"""The ways in which a CPU computes few rows, held against the usual ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllm_jax.config import ModelConfig, SamplingConfig
from tinyllm_jax.inference.generate import Generator, row_settings
from tinyllm_jax.inference.sampling import first_largest
from tinyllm_jax.model import compiled as compiling
from tinyllm_jax.model import decoding, decoding_weights, transformer
from tinyllm_jax.model.attention import reference_attention
from tinyllm_jax.model.kv_cache import LayerCache, empty_cache, visible_slots, write
from tinyllm_jax.model.weights import HEAD, initial_weights, merge_weights, model_structure

OPTIMIZED = True


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [7, 64, 100, 128])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_a_cache_read_in_blocks_gives_what_the_whole_one_gives(slots: int, kv_heads: int) -> None:
    query = draw(0, 2, 1, 6, 8)
    keys, values = draw(1, 2, kv_heads, slots, 8), draw(2, 2, kv_heads, slots, 8)
    read = jax.jit(decoding.cached_attention)
    for first in {0, 5, 63, 64, slots - 1} & set(range(slots)):
        positions = jnp.array([[first], [slots // 2]])
        expected = reference_attention(
            query,
            keys.transpose(0, 2, 1, 3),
            values.transpose(0, 2, 1, 3),
            mask=visible_slots(positions, slots=slots),
            causal=False,
            dropout_rate=0.0,
            dropout_key=None,
        )
        np.testing.assert_allclose(read(query, keys, values, positions), expected, atol=2e-6)


def test_no_block_is_read_behind_the_furthest_query() -> None:
    query, keys, values = draw(0, 1, 1, 2, 8), draw(1, 1, 2, 192, 8), draw(2, 1, 2, 192, 8)
    read = jax.jit(decoding.cached_attention)
    for position, blocks in ((63, 1), (64, 2), (500, 1)):
        spoilt = [x.at[:, :, blocks * 64 :].set(jnp.nan) for x in (keys, values)]
        found = read(query, *spoilt, jnp.array([[position]]))
        assert np.isfinite(found).all()
        if position < 192:
            whole = read(query, keys, values, jnp.array([[position]]))
            np.testing.assert_array_equal(found, whole)


def test_a_table_times_rows_is_the_rows_times_the_table() -> None:
    table = draw(0, 40, 16)
    for count, turns in (
        (1, False),
        (2, True),
        (decoding.FEW_ROWS, True),
        (decoding.FEW_ROWS + 1, False),
    ):
        rows = draw(count, count, 16)
        np.testing.assert_allclose(decoding.times_table(rows, table), rows @ table.T, atol=1e-5)
        lowered = jax.jit(decoding.times_table).lower(rows, table).as_text()
        assert ("optimization_barrier" in lowered) == turns, count


def test_one_token_is_written_where_many_are() -> None:
    config = ModelConfig(num_hidden_layers=1)
    (cache,) = empty_cache(config, batch=1, slots=9, dtype=jnp.dtype("float32"))
    size = (1, 2, config.num_key_value_heads, config.head_dim)
    keys, values, positions = draw(0, *size), draw(1, *size), jnp.array([[3, 8]])
    together = write(cache, keys, values, positions)
    for place in range(2):
        part = slice(place, place + 1)
        cache = write(cache, keys[:, part], values[:, part], positions[:, part])
    jax.tree.map(np.testing.assert_array_equal, cache, together)


@pytest.mark.slow
def test_one_token_takes_the_ways_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    structure, _ = model_structure(config)
    model = merge_weights(structure, initial_weights(config, seed=0))
    calls: list[str] = []
    way = decoding.cached_attention
    monkeypatch.setattr(
        transformer, "cached_attention", lambda *a: (calls.append("blocks"), way(*a))[1]
    )

    def read(rows: int) -> None:
        cache: tuple[LayerCache, ...] = empty_cache(
            config, batch=rows, slots=16, dtype=jnp.dtype("float32")
        )
        tokens = jnp.ones((rows, 1), jnp.int32)
        model.hidden(tokens, tokens, cache=cache)

    read(2)
    assert calls == []
    read(1)
    assert calls == ["blocks"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 2, decoding_weights.ROWS_OF_TABLE])
def test_weights_for_few_rows_give_the_same_logits(rows: int, tied: bool) -> None:
    config = ModelConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=16,
        tie_word_embeddings=tied, qk_norm=True,
    )  # fmt: skip
    weights = initial_weights(config, seed=0)
    tokens = jnp.arange(3 * rows).reshape(rows, 3) % 32
    expected = merge_weights(model_structure(config)[0], weights)(tokens)

    suited = decoding_weights.suit_rows(config, weights, rows=rows)
    assert (HEAD in suited) == (not tied or rows < decoding_weights.ROWS_OF_TABLE)
    turned = {n for n, w in suited.items() if isinstance(w, decoding_weights.Turned)}
    assert len(turned) == (7 * config.num_hidden_layers if rows == 1 else 0)
    for forms in (suited, decoding_weights.add_head(config, weights)):
        model = decoding_weights.decoding_model(config, forms, rows=rows)
        assert hasattr(model, "lm_head") == (not tied or rows < decoding_weights.ROWS_OF_TABLE)
        np.testing.assert_allclose(model(tokens), expected, atol=1e-6)


def test_what_does_not_compute_in_float32_is_taken_as_it_is() -> None:
    config = ModelConfig(num_hidden_layers=1, vocab_size=32, compute_dtype="bfloat16")
    weights = initial_weights(config, seed=0)
    assert decoding_weights.suit_rows(config, weights, rows=1) == weights
    assert decoding_weights.add_head(config, weights) == weights


@pytest.mark.slow
def test_experts_and_routers_are_not_turned() -> None:
    config = ModelConfig(num_hidden_layers=1, num_experts=2, num_shared_experts=1, vocab_size=32)
    weights = initial_weights(config, seed=0)
    suited = decoding_weights.suit_rows(config, weights, rows=1)
    turned = {n for n, w in suited.items() if isinstance(w, decoding_weights.Turned)}
    assert turned
    assert all(
        weights[name].ndim == 2 and "experts" not in name.replace("shared_experts", "")
        for name in turned
    )
    tokens = jnp.ones((1, 3), jnp.int32)
    model = decoding_weights.decoding_model(config, suited, rows=1)
    expected = merge_weights(model_structure(config)[0], weights)(tokens)
    np.testing.assert_allclose(model(tokens), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "slots"), [(1, 64), (2, 64), (1, 32)])
def test_the_loop_over_tokens_holds_turned_matrices_for_one_row(rows: int, slots: int) -> None:
    config = ModelConfig(
        vocab_size=128, hidden_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=24, intermediate_size=80, max_position_embeddings=64,
    )  # fmt: skip
    number, sampling = np.zeros(rows, np.int32), SamplingConfig(greedy=True)
    program = Generator(config)._run.lower(
        initial_weights(config, seed=0),
        np.ones((rows, 32), np.int32),
        number + 1,
        np.zeros((rows, config.vocab_size), bool),
        number + 5,
        number,
        np.int32(-1),
        row_settings(sampling, rows=rows),
        slots=slots,
        samples=1,
    )
    is_long = slots > 32
    # The compiler may neither undo the copies nor read them in the old order.
    lines = program.compile().as_text().splitlines()
    (carried,) = [line for line in lines if " while(" in line and "f32[48,48]" in line]
    assert ("f32[24,48]{1,0}" in carried) == (rows == 1 and is_long)  # k_proj and v_proj
    assert ("f32[48,24]" in carried) == (rows > 1 or not is_long)
    assert ("f32[48,128]{1,0}" in carried) == is_long  # the head


def test_the_first_of_equal_logits_is_taken() -> None:
    rows = np.array(
        [[1, 3, 3, 2], [-np.inf, -np.inf, 0, -np.inf], [-np.inf] * 4, [0, 0, 0, 0]], np.float32
    )
    np.testing.assert_array_equal(first_largest(jnp.array(rows)), rows.argmax(axis=1))


def test_a_token_that_is_ruled_out_is_not_picked_beside_nan() -> None:
    wide = np.full((3, 4096), -np.inf, np.float32)
    wide[:, :4000] = np.random.default_rng(0).normal(size=(3, 4000))
    wide[0, :4000] = np.nan
    wide[1, 100] = np.nan
    wide[2, 3999] = np.nan
    expected = np.where(np.isnan(wide), -np.inf, wide).argmax(axis=1)
    np.testing.assert_array_equal(jax.jit(first_largest)(wide), expected)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    compiling.model_options.cache_clear()
    assert compiling.model_options() == compiling.CPU_OPTIONS
    monkeypatch.setattr(compiling, "CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
    compiling.model_options.cache_clear()
    try:
        assert compiling.model_options() == {}
        assert compiling.compiled(lambda x: x + 1)(1.0) == 2.0
    finally:
        compiling.model_options.cache_clear()


def test_eigen_multiplies() -> None:
    x = jnp.ones((64, 64))
    assert "ynn_fusion" not in compiling.compiled(lambda x: x @ x).lower(x).compile().as_text()
