"""Weights in fewer bits stay near the ones they were, and so does what the model predicts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_oracle import SMALL, changed, random_weights

from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.inference.language_model import load
from tinyllm_jax.inference.stored_weights import Rounded, restore, round_to_int8, store
from tinyllm_jax.model.decoding_weights import add_head
from tinyllm_jax.model.moe import ROUTER
from tinyllm_jax.model.weights import EMBEDDING, HEAD, merge_weights, model_structure

FLOAT32 = jnp.dtype("float32")


@pytest.mark.parametrize(
    ("shape", "channel_axis", "scales"),
    [((6, 4), -1, (1, 4)), ((6, 4), 0, (6, 1)), ((3, 6, 4), -1, (3, 1, 4))],
)
def test_each_channel_has_its_own_scale(
    shape: tuple[int, ...], channel_axis: int, scales: tuple[int, ...]
) -> None:
    value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    value[0] *= 1000.0
    rounded = round_to_int8(jnp.asarray(value), channel_axis=channel_axis)
    assert rounded.scales.shape == scales
    assert int(jnp.abs(rounded.numbers.astype(jnp.int32)).max()) == 127
    error = np.abs(np.asarray(rounded.numbers * rounded.scales) - value)
    assert (error <= np.asarray(rounded.scales) / 2 * 1.0001).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    value = jnp.zeros((3, 2)).at[:, 1].set(5.0)
    rounded = round_to_int8(value, channel_axis=-1)
    assert (rounded.numbers * rounded.scales).tolist() == value.tolist()


def test_norms_and_routers_are_not_rounded() -> None:
    config = changed(SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    stored = store(random_weights(config), kind="int8", dtype=FLOAT32)
    for name, value in stored.items():
        plain = name.endswith(ROUTER) or "norm" in name
        assert isinstance(value, Rounded) != plain, name
    assert restore(stored, dtype=FLOAT32).keys() == random_weights(config).keys()


@pytest.mark.parametrize("kind", ["auto", "bfloat16", "int8"])
def test_the_copy_of_the_head_holds_the_numbers_of_the_table(kind: str) -> None:
    config = changed(SMALL, tie_word_embeddings=True)
    weights = {name: jnp.asarray(value) for name, value in random_weights(config).items()}
    stored = store(add_head(config, weights), kind=kind, dtype=FLOAT32)
    found = restore(stored, dtype=FLOAT32)
    np.testing.assert_array_equal(found[HEAD], found[EMBEDDING].T)


@pytest.mark.parametrize(("kind", "smaller"), [("bfloat16", 1.9), ("int8", 3.0)])
def test_perplexity_stays_within_a_hundredth(trained_run: Path, kind: str, smaller: float) -> None:
    model = load(trained_run)
    structure, _ = model_structure(model.config)
    stories = generate_stories(seed=99, start=0, stop=24)
    width = 64
    rows = [model.tokenizer.encode(story, bos=True)[: width + 1] for story in stories]
    tokens = jnp.asarray([row for row in rows if len(row) == width + 1])
    assert len(tokens) >= 8

    @jax.jit
    def loss(weights: dict[str, jax.Array]) -> jax.Array:
        log_probs = jax.nn.log_softmax(merge_weights(structure, weights)(tokens[:, :-1]))
        return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=2).mean()

    stored = store(model.weights, kind=kind, dtype=FLOAT32)
    before, after = loss(model.weights), loss(restore(stored, dtype=FLOAT32))
    assert before != after
    assert abs(float(jnp.exp(after - before)) - 1.0) < 0.01
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights))
    assert whole / held > smaller
