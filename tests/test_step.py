"""The train step: what it promises about its loss, passes, dropout and bad numbers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tinyllm_jax.config import Config
from tinyllm_jax.model.weights import initial_weights, merge_weights, model_structure
from tinyllm_jax.objectives.losses import cross_entropy_sum
from tinyllm_jax.objectives.pretrain import count_targets, next_token_loss
from tinyllm_jax.settings import build
from tinyllm_jax.training.step import make_evaluation_step, make_train_step, new_state

SHAPE = {
    "model.vocab_size": 64,
    "model.hidden_size": 16,
    "model.intermediate_size": 24,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "model.max_position_embeddings": 16,
    "data.sequence_length": 16,
    "train.batch_size": 4,
    "train.max_steps": 20,
    "optimizer.warmup_steps": 5,
    "optimizer.learning_rate": 1e-2,
    "optimizer.min_learning_rate": 1e-3,
}


def small_config(**changes) -> Config:
    return build(Config, [("", SHAPE), ("", {k.replace("__", "."): v for k, v in changes.items()})])


def random_batch(seed: int, *, rows: int, masked: bool) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(0, 64, (rows, 17), dtype=np.int32)
    loss_mask = np.ones((rows, 16), bool)
    if masked:  # rows of very different lengths, one of them without any target
        loss_mask = np.arange(16) < np.resize([16, 1, 0, 7], rows)[:, None]
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": loss_mask}


@functools.cache
def stepper(config: Config) -> Any:
    """Give the compiled step, one for all tests with the same settings."""
    structure, _ = model_structure(config.model)
    return jax.jit(make_train_step(config, structure, next_token_loss, count_targets))


@pytest.mark.usefixtures("optimized")
def test_cross_entropy_equals_torch_also_for_huge_logits():
    numbers = np.random.default_rng(0)
    logits = numbers.normal(size=(3, 5, 11)).astype(np.float32) * 50
    targets = numbers.integers(0, 11, (3, 5))
    loss_mask = numbers.random((3, 5)) < 0.6
    actual = jax.jit(cross_entropy_sum)(logits, targets, loss_mask)
    each = torch.nn.functional.cross_entropy(
        torch.tensor(logits).reshape(-1, 11), torch.tensor(targets).reshape(-1), reduction="none"
    )
    expected = (each.numpy() * loss_mask.reshape(-1)).sum()
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("passes", [2, 4])
def test_accumulated_passes_give_the_exact_token_mean_however_unevenly_they_are_filled(passes):
    with jax.enable_x64(True):
        whole = small_config(model__compute_dtype="float64", train__batch_size=8)
        parts = small_config(
            model__compute_dtype="float64",
            train__batch_size=8 // passes,
            train__gradient_accumulation_steps=passes,
        )
        weights = initial_weights(whole.model, seed=0)
        batch = random_batch(0, rows=8, masked=True)
        expected, expected_numbers = stepper(whole)(new_state(whole, weights), batch)
        actual, numbers = stepper(parts)(new_state(parts, weights), batch)
        np.testing.assert_allclose(numbers["loss"], expected_numbers["loss"], rtol=1e-12)
        np.testing.assert_allclose(numbers["grad_norm"], expected_numbers["grad_norm"], rtol=1e-10)
        for name, weight in expected.weights.items():
            np.testing.assert_allclose(actual.weights[name], weight, rtol=1e-9, atol=1e-12)


def test_the_loss_of_a_step_is_the_mean_over_unmasked_targets():
    config = small_config()
    batch = random_batch(3, rows=4, masked=True)
    weights = initial_weights(config.model, seed=0)
    structure, _ = model_structure(config.model)
    _, numbers = stepper(config)(new_state(config, weights), batch)
    logits = jax.jit(lambda w: merge_weights(structure, w)(jnp.asarray(batch["tokens"])))(weights)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    chosen = np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    expected = -chosen[batch["loss_mask"]].mean()
    np.testing.assert_allclose(numbers["loss"], expected, rtol=1e-5)
    assert float(numbers["targets"]) == batch["loss_mask"].sum()
    evaluation_step = jax.jit(make_evaluation_step(structure, next_token_loss, count_targets))
    sums, targets = evaluation_step(weights, batch)
    np.testing.assert_allclose(sums["loss"] / targets, expected, rtol=1e-5)


def test_a_step_that_is_no_number_changes_nothing_but_the_streak():
    config = small_config()
    step = stepper(config)
    state = new_state(config, initial_weights(config.model, seed=0))
    state, _ = step(state, random_batch(0, rows=4, masked=False))
    # One poisoned weight that only some tokens meet: the loss is NaN only for those.
    poisoned = dict(state.weights)
    poisoned["embed_tokens.weight"] = poisoned["embed_tokens.weight"].at[5].set(jnp.nan)
    state = state._replace(weights=poisoned)
    before = jax.tree.map(np.asarray, state)
    bad = random_batch(1, rows=4, masked=False)
    assert (bad["tokens"] == 5).any()
    after, numbers = step(state, bad)
    after, numbers = step(after, bad)
    assert not np.isfinite(numbers["loss"])
    assert int(numbers["nonfinite_streak"]) == 2
    assert int(after.step) == int(before.step) + 2
    kept = (before.weights, before.optimizer_state)
    for one, other in zip(
        jax.tree.leaves(kept),
        jax.tree.leaves((after.weights, after.optimizer_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_the_streak_ends_with_a_good_step():
    config = small_config()
    state = new_state(config, initial_weights(config.model, seed=0))
    state = state._replace(nonfinite_streak=jnp.asarray(3, jnp.int32))
    state, numbers = stepper(config)(state, random_batch(0, rows=4, masked=False))
    assert int(numbers["nonfinite_streak"]) == int(state.nonfinite_streak) == 0


def test_dropout_differs_between_steps_and_passes_and_repeats_with_the_seed():
    config = small_config(model__residual_dropout=0.5)
    step, batch = stepper(config), random_batch(0, rows=4, masked=False)
    first = new_state(config, initial_weights(config.model, seed=0))
    second = first._replace(step=jnp.asarray(1, jnp.int32))
    loss = float(step(first, batch)[1]["loss"])
    assert float(step(first, batch)[1]["loss"]) == loss
    assert float(step(second, batch)[1]["loss"]) != loss
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    assert float(stepper(other)(first, batch)[1]["loss"]) != loss


@pytest.mark.slow
def test_every_pass_drops_out_other_places():
    config = small_config(
        model__residual_dropout=0.5, train__batch_size=2, train__gradient_accumulation_steps=2
    )
    batch = random_batch(0, rows=2, masked=False)
    twice = {name: np.concatenate([rows, rows]) for name, rows in batch.items()}
    state = new_state(config, initial_weights(config.model, seed=0))
    alike = stepper(small_config(model__residual_dropout=0.5, train__batch_size=2))
    state_of_one_pass = new_state(config, initial_weights(config.model, seed=0))
    both = float(stepper(config)(state, twice)[1]["loss"])
    # Equal keys would give both passes the loss of one; the step's own key gives a third.
    structure, _ = model_structure(config.model)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.train.seed), 0), 2)
    each = [
        float(
            jax.jit(next_token_loss)(
                merge_weights(structure, state_of_one_pass.weights),
                jax.tree.map(jnp.asarray, batch),
                key,
            )[0]
        )
        for key in keys
    ]
    assert each[0] != each[1]
    assert both == pytest.approx(sum(each) / twice["loss_mask"].sum(), rel=1e-5)
    assert float(alike(state_of_one_pass, batch)[1]["loss"]) != pytest.approx(both, rel=1e-6)


def test_a_batch_without_targets_changes_no_weight_by_its_loss():
    config = small_config(optimizer__weight_decay=0.0)
    batch = random_batch(0, rows=4, masked=False)
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    state = new_state(config, initial_weights(config.model, seed=0))
    after, numbers = stepper(config)(state, batch)
    assert float(numbers["loss"]) == 0.0
    for name, weight in state.weights.items():
        np.testing.assert_array_equal(after.weights[name], weight)


def test_the_learning_rate_of_a_step_is_that_of_its_update():
    config = small_config()
    step, batch = stepper(config), random_batch(0, rows=4, masked=False)
    state = new_state(config, initial_weights(config.model, seed=0))
    for update in (1, 2, 3):
        state, numbers = step(state, batch)
        assert float(numbers["learning_rate"]) == pytest.approx(1e-2 * update / 5)


def test_training_lowers_the_loss_of_a_batch():
    config = small_config()
    step, batch = stepper(config), random_batch(0, rows=4, masked=False)
    state = new_state(config, initial_weights(config.model, seed=0))
    losses = []
    for _ in range(20):
        state, numbers = step(state, batch)
        losses.append(float(numbers["loss"]))
    assert losses[0] == pytest.approx(np.log(64), rel=0.05)
    assert losses[-1] < losses[0] - 1
