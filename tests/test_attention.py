"""Every attention implementation is the paper's formula, and cuDNN is refused where it cannot run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllm_jax.errors import InputError
from tinyllm_jax.model.attention import (
    attention,
    choose_implementation,
    reference_attention,
    segment_mask,
    suits_cudnn,
)
from tinyllm_jax.model.attention_rows import attend_row_by_row, block_size

OPTIMIZED = True

HAS_GPU = jax.default_backend() == "gpu"


def inputs(
    *, heads: int, kv_heads: int, queries: int = 10, keys: int = 10, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [(queries, heads), (keys, kv_heads), (keys, kv_heads)]
    query, key, value = (rng.standard_normal((2, seq, n, 8)).astype(dtype) for seq, n in sizes)
    return query, key, value


def by_loops(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Attend one query and one head at a time, as equation 1 of the paper says."""
    batch, queries, heads, head_dim = query.shape
    out = np.zeros(query.shape)
    group = heads // key.shape[2]
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                seen = np.flatnonzero(mask[b, q])
                scores = key[b, seen, h // group] @ query[b, q, h] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[b, q, h] = weights / weights.sum() @ value[b, seen, h // group]
    return out


def masks(queries: int = 10, keys: int = 10) -> dict[str, np.ndarray | None]:
    """Give the masks that the model uses: causal, packed documents, cache slots."""
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 0], [1] * 10])
    positions = np.array([[3], [9]]) + np.arange(queries)[None]
    return {
        "causal": None,
        "packed": np.asarray(segment_mask(segment_ids)),
        "cache": np.arange(keys)[None, None] <= positions[:, :, None],
    }


@pytest.mark.parametrize("mask_name", ["causal", "packed", "cache"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_every_implementation_equals_the_formula(
    implementation: str, kv_heads: int, mask_name: str
) -> None:
    query, key, value = inputs(heads=4, kv_heads=kv_heads)
    mask = masks()[mask_name]
    causal = np.broadcast_to(np.tril(np.ones((10, 10), bool)), (2, 10, 10))
    expected = by_loops(query, key, value, causal if mask is None else mask)
    actual = jax.jit(
        lambda q, k, v: attention(
            q,
            k,
            v,
            mask=None if mask is None else jnp.asarray(mask),
            causal=mask_name != "cache",
            implementation=implementation,
            dropout_rate=0.0,
            dropout_key=None,
        )
    )(query, key, value)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 65, 150, 600])
@pytest.mark.parametrize("documents", [1, 3])
def test_blocks_and_rows_change_no_output_and_no_gradient(length: int, documents: int) -> None:
    """`causal=False` with the causal mask is the same thing in one block, all rows at once."""
    query, key, value = inputs(heads=4, kv_heads=2, queries=length, keys=length, dtype=np.float64)
    segment_ids = np.sort(np.random.default_rng(1).integers(1, documents + 1, (2, length)))
    whole = np.asarray(segment_mask(jnp.asarray(segment_ids)))
    given = None if documents == 1 else whole

    def numbers(mask: np.ndarray | None, causal: bool) -> Any:
        def run(*inputs: jax.Array) -> jax.Array:
            return reference_attention(
                *inputs,
                mask=None if mask is None else jnp.asarray(mask),
                causal=causal,
                dropout_rate=0.0,
                dropout_key=None,
            )

        return with_gradients(run)

    def by_rows(*inputs: jax.Array) -> jax.Array:
        return attend_row_by_row(*inputs, None if given is None else jnp.asarray(given))

    def with_gradients(run: Callable[..., jax.Array]) -> Any:
        out, pull = jax.vjp(jax.jit(run), *map(jnp.asarray, (query, key, value)))
        return out, *pull(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    with jax.enable_x64(True):
        assert 1 <= -(-length // block_size(length)) <= 8
        expected = numbers(whole, False)
        for found in (numbers(given, True), with_gradients(by_rows)):
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_by_themselves_keep_the_precision(heads: int, dtype: str) -> None:
    """Against float64, the loop's own backward pass is as near as JAX's gradient of the reference."""
    arrays = inputs(heads=heads, kv_heads=2, queries=70, keys=70)
    with jax.enable_x64(True):
        rounded = [jnp.asarray(array, dtype) for array in arrays]
        change = jnp.cos(jnp.arange(rounded[0].size)).reshape(rounded[0].shape)

        def error(run: Callable[..., jax.Array]) -> list[float]:
            pull = jax.vjp(jax.jit(run), *rounded)[1]
            exact = jax.vjp(jax.jit(run), *(x.astype(jnp.float64) for x in rounded))[1]
            found = zip(pull(change.astype(dtype)), exact(change), strict=True)
            return [float(jnp.abs(one - other).max()) for one, other in found]

        def reference(*inputs: jax.Array) -> jax.Array:
            return reference_attention(
                *inputs, mask=None, causal=True, dropout_rate=0.0, dropout_key=None
            )

        ours = error(lambda *inputs: attend_row_by_row(*inputs, None))
        for one, other in zip(ours, error(reference), strict=True):
            assert one <= 1.5 * other


def test_the_masked_half_of_long_rows_is_not_multiplied() -> None:
    def products(causal: bool) -> float:
        x, mask = jnp.ones((1, 512, 2, 16)), jnp.ones((1, 512, 512), bool)

        def run(x: jax.Array) -> jax.Array:
            return reference_attention(
                x, x, x, mask=mask, causal=causal, dropout_rate=0.0, dropout_key=None
            )

        analysis: Any = jax.jit(run).lower(x).compile().cost_analysis()
        return analysis["flops"]

    assert products(True) < 0.6 * products(False)


def test_the_reference_keeps_float64() -> None:
    query, key, value = inputs(heads=4, kv_heads=2, dtype=np.float64)
    causal = np.broadcast_to(np.tril(np.ones((10, 10), bool)), (2, 10, 10))
    with jax.enable_x64(True):
        actual = reference_attention(
            *map(jnp.asarray, (query, key, value)),
            mask=None,
            causal=True,
            dropout_rate=0.0,
            dropout_key=None,
        )
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, by_loops(query, key, value, causal), atol=1e-13)


def test_bfloat16_scores_are_computed_in_float32() -> None:
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs(heads=4, kv_heads=2))
    settings: dict[str, Any] = {"mask": None, "causal": True}
    settings |= {"dropout_rate": 0.0, "dropout_key": None}
    actual = reference_attention(query, key, value, **settings)
    wide = reference_attention(*(x.astype(jnp.float32) for x in (query, key, value)), **settings)
    assert actual.dtype == jnp.bfloat16
    # Only the weights (below 1) and the result are rounded, each to 8 bits.
    np.testing.assert_allclose(actual.astype(jnp.float32), wide, atol=0.01)


def test_segments_see_their_own_past_only() -> None:
    mask = segment_mask(jnp.array([[1, 1, 2, 2, 0]]))
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert mask[0].astype(int).tolist() == expected


def test_attention_dropout_keeps_the_mean_and_needs_a_key() -> None:
    query, key, value = map(jnp.asarray, inputs(heads=2, kv_heads=2, queries=4, keys=4))

    @jax.jit
    def attend(dropout_key: jax.Array) -> jax.Array:
        return attention(
            query,
            key,
            value,
            mask=None,
            causal=True,
            implementation="auto",
            dropout_rate=0.3,
            dropout_key=dropout_key,
        )

    plain = attention(
        query,
        key,
        value,
        mask=None,
        causal=True,
        implementation="xla",
        dropout_rate=0.3,
        dropout_key=None,
    )
    many = jax.vmap(attend)(jax.random.split(jax.random.key(0), 4000))
    assert not np.allclose(many[0], plain, atol=1e-3)
    np.testing.assert_allclose(many.mean(axis=0), plain, atol=0.08)


@pytest.mark.parametrize(
    ("dtype", "dropout_rate", "expected"),
    [
        ("bfloat16", 0.0, "cudnn" if HAS_GPU else "xla"),
        ("bfloat16", 0.1, "reference"),
        ("float32", 0.0, "reference"),
        ("float64", 0.0, "reference"),
    ],
)
def test_auto_keeps_the_precision_of_the_type(
    dtype: str, dropout_rate: float, expected: str
) -> None:
    chosen = choose_implementation("auto", jnp.dtype(dtype), dropout_rate=dropout_rate)
    assert chosen == expected


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_cudnn_without_a_gpu_says_what_to_type() -> None:
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs(heads=4, kv_heads=2))
    with pytest.raises(InputError, match=r"attention=cudnn needs a GPU.*Use model.attention=auto"):
        attention(
            query,
            key,
            value,
            mask=None,
            causal=True,
            implementation="cudnn",
            dropout_rate=0.0,
            dropout_key=None,
        )


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "masked", "expected"),
    [
        (16, 16, 64, True, True),
        (15, 15, 64, False, True),
        (15, 15, 64, True, False),
        (16, 16, 36, False, False),
        (16, 16, 136, False, False),
        (1, 16, 64, True, False),
    ],
)
def test_shapes_without_a_cudnn_kernel_are_known(
    queries: int, keys: int, head_dim: int, masked: bool, expected: bool
) -> None:
    query, key = jnp.zeros((1, queries, 1, head_dim)), jnp.zeros((1, keys, 1, head_dim))
    assert suits_cudnn(query, key, masked=masked) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("mask_name", ["causal", "packed"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cudnn_equals_the_reference(kv_heads: int, mask_name: str) -> None:
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs(heads=4, kv_heads=kv_heads))
    mask = masks()[mask_name]
    found = {}
    for implementation in ("cudnn", "reference"):
        out = attention(
            query,
            key,
            value,
            mask=None if mask is None else jnp.asarray(mask),
            causal=mask_name != "cache",
            implementation=implementation,
            dropout_rate=0.0,
            dropout_key=None,
        )
        found[implementation] = np.asarray(out, np.float32)
    np.testing.assert_allclose(found["cudnn"], found["reference"], atol=0.02)
