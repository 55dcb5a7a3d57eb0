"""Losses made in blocks of positions are those of all logits, gradients too, in less memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model.weights import Weights, initial_weights, merge_weights, model_structure
from tinyllm_jax.objectives import head_blocks
from tinyllm_jax.objectives.head_blocks import count_blocks, measure_logits
from tinyllm_jax.objectives.log_probs import entropy, target_log_probs
from tinyllm_jax.objectives.losses import cross_entropy_sum, head_cross_entropy_sum

LOSSES = ("cross-entropy", "log-probabilities")


def shape(**settings: Any) -> ModelConfig:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return ModelConfig(**{**sizes, **heads, "initializer_range": 0.5, **settings})


def of_log_probs(log_probs: Any, entropies: Any, mask: Any) -> Any:
    """Sum something in which each token counts in its own way, as in the losses of a policy."""
    weights = jnp.sin(jnp.arange(log_probs.size, dtype=log_probs.dtype).reshape(log_probs.shape))
    return jnp.sum(jnp.where(mask, jnp.exp(log_probs / 4) * weights + entropies / 3, 0.0))


def both(logits: Any, targets: Any) -> tuple[Any, Any]:
    return target_log_probs(logits, targets), entropy(logits)


def both_losses(name: str, config: ModelConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Give a blocked loss and the plain one, as functions of (weights, hidden, ...)."""
    structure, _ = model_structure(config)

    def blocked(weights: Weights, hidden: Any, targets: Any, mask: Any) -> Any:
        model = merge_weights(structure, weights)
        if name == "cross-entropy":
            return head_cross_entropy_sum(model, hidden, targets, mask)
        return of_log_probs(*measure_logits(model, hidden, both, targets), mask)

    def plain(weights: Weights, hidden: Any, targets: Any, mask: Any) -> Any:
        logits = merge_weights(structure, weights).logits(hidden)
        if name == "cross-entropy":
            return cross_entropy_sum(logits, targets, mask)
        return of_log_probs(*both(logits, targets), mask)

    return blocked, plain


def inputs(config: ModelConfig, *, rows: int, seq: int, dtype: Any) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((rows, seq, config.hidden_size)), dtype)
    targets = jnp.asarray(rng.integers(0, config.vocab_size, (rows, seq)), jnp.int32)
    return hidden, targets, jnp.asarray(rng.random((rows, seq)) < 0.7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seq", [12, 13])  # 13 leaves the last block short
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 2e-2)]
)
def test_blocks_change_neither_loss_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: str, tolerance: float, seq: int, tied: bool, name: str
) -> None:
    monkeypatch.setattr(head_blocks, "CPU_BLOCK_TOKENS", 12)
    with jax.enable_x64(dtype == "float64"):
        config = shape(compute_dtype=dtype, tie_word_embeddings=tied)
        weights = initial_weights(config, seed=0)
        arrays = inputs(config, rows=3, seq=seq, dtype=dtype)
        assert count_blocks(3, seq, vocab=config.vocab_size) > 2
        # The scale of the gradients is not 1, as it is not in a train step.
        (actual, changes), (expected, wanted) = (
            jax.jit(
                jax.value_and_grad(lambda *a, loss=loss: loss(*a) / 7, argnums=(0, 1))
            )(weights, *arrays)
            for loss in both_losses(name, config)
        )  # fmt: skip
    np.testing.assert_allclose(actual, expected, rtol=min(tolerance, 1e-5))
    for one, other in zip(jax.tree.leaves(changes), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(each, np.float64) for each in (one, other))
        np.testing.assert_allclose(one, other, atol=tolerance * max(np.abs(other).max(), 1e-9))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_gradient_makes_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(head_blocks, "CPU_BLOCK_TOKENS", 12)
    config = shape()
    blocked, plain = both_losses(name, config)
    weights = initial_weights(config, seed=0)
    arrays = inputs(config, rows=3, seq=12, dtype="float32")
    text = str(jax.make_jaxpr(blocked)(weights, *arrays))
    assert text.count("dot_general") == 1
    actual, expected = (jax.jit(loss)(weights, *arrays) for loss in (blocked, plain))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_peak_of_memory_falls(name: str) -> None:
    config = shape(vocab_size=4000)
    weights = initial_weights(config, seed=0)
    arrays = inputs(config, rows=2, seq=4096, dtype="float32")
    peaks = []
    for loss in both_losses(name, config):
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, *arrays).compile()
        memory: Any = program.memory_analysis()
        peaks.append(memory.temp_size_in_bytes)
    whole = 4 * 2 * 4096 * 4000
    assert peaks[0] < whole / 2 < whole < peaks[1]
