"""One optimizer step and one evaluation, as pure functions of arrays, ready for `jax.jit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tinyllm_jax.config import Config
from tinyllm_jax.model.placement import placement
from tinyllm_jax.model.weights import Weights, merge_weights
from tinyllm_jax.training.optim import learning_rate_schedule, make_optimizer, read_moments

DeviceBatch = dict[str, Array]
# Token shards that lie on the device, and how a batch's rows are read from them.
Corpus = dict[str, Array]
ReadRows = Callable[[Corpus, DeviceBatch], DeviceBatch]
# What is minimised and what is told of it ("loss" and more), each summed over a batch's targets, given
# the model; the key turns dropout on.
LossSums = Callable[
    [Any, DeviceBatch, PRNGKeyArray | None], tuple[Float[Array, ""], dict[str, Array]]
]
# How many targets those sums are over.
LossWeight = Callable[[DeviceBatch], Float[Array, ""]]


class Fixed(NamedTuple):
    """What a step reads beside its state and batch, and never changes."""

    weights: Weights  # that are not trained; none where the state has all of them
    corpus: Corpus  # none where batches hold rows


NOTHING_FIXED = Fixed({}, {})


class TrainState(NamedTuple):
    """All that changes while a run trains."""

    step: Int[Array, ""]  # batches taken; "step s" everywhere is the s-th of them, from 1
    weights: Weights
    optimizer_state: Any
    nonfinite_streak: Int[Array, ""]  # steps in a row whose update was not applied


def new_state(config: Config, weights: Weights) -> TrainState:
    """Start a run from these weights, with empty moments."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        weights=weights,
        optimizer_state=make_optimizer(config).init(weights),
        nonfinite_streak=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    config: Config,
    structure: nnx.GraphDef,
    loss_sums: LossSums,
    loss_weight: LossWeight,
    read_rows: ReadRows | None = None,
    tell: Callable[[Weights, Weights, Weights], dict[str, Any]] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Build the step: gradients over all passes, clip, update, unless a number is not finite.

    It takes (state, batch) and what is fixed: the corpus, where `read_rows` turns what a batch names
    into rows, and the weights of the model that are not in the state.

    With gradient accumulation the batch is cut into passes. Each pass divides its loss sum by the
    targets of the whole batch, so the gradients add up to those of the exact mean over targets,
    however unevenly the passes are filled.

    A loss or gradient that is not finite leaves weights, moments and their count as they were.

    Args:
        tell: Makes more numbers to tell, of gradients, weights before and weights after.
    """
    optimizer, schedule = make_optimizer(config), learning_rate_schedule(config)
    passes = config.train.gradient_accumulation_steps

    def pass_loss(
        trained: Weights,
        frozen: Weights,
        batch: DeviceBatch,
        key: PRNGKeyArray,
        total: Float[Array, ""],
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        weights = placement().other_weights({**frozen, **trained})
        sums = loss_sums(merge_weights(structure, weights), batch, key)
        return jax.tree.map(lambda x: x / total, sums)

    def train_step(
        state: TrainState, batch: DeviceBatch, fixed: Fixed = NOTHING_FIXED
    ) -> tuple[TrainState, dict[str, Array]]:
        if read_rows is not None and fixed.corpus:
            batch = read_rows(fixed.corpus, batch)
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        key = placement().dropout_key(key)
        total = jnp.maximum(placement().total(loss_weight(batch)), 1.0)
        gradient_of = jax.value_and_grad(pass_loss, has_aux=True)
        if passes == 1:
            (minimised, means), gradients = gradient_of(
                state.weights, fixed.weights, batch, key, total
            )
        else:

            def add_pass(sums: Any, inputs: Any) -> tuple[Any, None]:
                one_pass = gradient_of(state.weights, fixed.weights, *inputs, total)
                return jax.tree.map(jnp.add, sums, one_pass), None

            pieces = placement().passes(batch, count=passes)
            first = jax.tree.map(lambda x: x[0], pieces)
            zeros = jax.eval_shape(gradient_of, state.weights, fixed.weights, first, key, total)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zeros)
            keys = jax.random.split(key, passes)
            ((minimised, means), gradients), _ = jax.lax.scan(add_pass, zeros, (pieces, keys))

        (minimised, means), gradients = placement().total(((minimised, means), gradients))
        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(minimised) & jnp.isfinite(gradient_norm)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        weights, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (weights, optimizer_state),
            (state.weights, state.optimizer_state),
        )
        new = TrainState(
            step=state.step + 1,
            weights=weights,
            optimizer_state=optimizer_state,
            nonfinite_streak=jnp.where(finite, 0, state.nonfinite_streak + 1),
        )
        metrics = {
            **means,
            "grad_norm": gradient_norm,
            "learning_rate": schedule(read_moments(state.optimizer_state).count + 1),
            "targets": total,
            "nonfinite_streak": new.nonfinite_streak,
        }
        if tell is not None:
            metrics |= tell(gradients, state.weights, weights)
        return new, metrics

    return train_step


def scan_steps(
    train_step: Callable[..., tuple[TrainState, dict[str, Array]]],
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Make a program that takes several steps, one after another, without the host.

    Its batches have one more axis in front, and so have the numbers that it tells. A step alone is no
    loop: of one whose only round it inlines, XLA keeps weights that `fsdp` divides gathered from
    forward to backward.
    """

    def train_steps(
        state: TrainState, batches: DeviceBatch, fixed: Fixed = NOTHING_FIXED
    ) -> tuple[TrainState, dict[str, Array]]:
        if len(next(iter(batches.values()))) == 1:
            batch = {name: rows[0] for name, rows in batches.items()}
            state, numbers = train_step(state, batch, fixed)
            return state, jax.tree.map(lambda number: number[None], numbers)
        return jax.lax.scan(lambda state, batch: train_step(state, batch, fixed), state, batches)

    return train_steps


def make_evaluation_step(
    structure: nnx.GraphDef, loss_sums: LossSums, loss_weight: LossWeight
) -> Callable[[Weights, DeviceBatch], tuple[dict[str, Array], Float[Array, ""]]]:
    """Build the function that gives what is told of a batch and how many targets it sums over."""

    def evaluation_step(
        weights: Weights, batch: DeviceBatch
    ) -> tuple[dict[str, Array], Float[Array, ""]]:
        weights = placement().other_weights(weights)
        _, sums = loss_sums(merge_weights(structure, weights), batch, None)
        return placement().total((sums, loss_weight(batch)))

    return evaluation_step
