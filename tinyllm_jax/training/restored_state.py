"""A checkpoint as the state that training goes on with, in its places on the devices."""

import jax.numpy as jnp

from tinyllm_jax.config import Config
from tinyllm_jax.model.layers import parameter_dtype
from tinyllm_jax.training.checkpoint import Checkpoint
from tinyllm_jax.training.optim import Moments, write_moments
from tinyllm_jax.training.parallel import Parallel
from tinyllm_jax.training.step import TrainState, new_state


def restored_state(checkpoint: Checkpoint, config: Config, parallel: Parallel) -> TrainState:
    """Make the state in which a run goes on exactly where a checkpoint was written."""
    dtype = parameter_dtype(config.model)
    weights = parallel.place_weights(checkpoint.weights, dtype)
    state = parallel.make_state(lambda weights: new_state(config, weights), weights)
    moments, streak = checkpoint.moments, checkpoint.nonfinite_streak
    first, second = (
        parallel.place_weights(each, dtype) for each in (moments.first, moments.second)
    )
    restored = TrainState(
        step=jnp.asarray(checkpoint.step, jnp.int32),
        weights=state.weights,
        optimizer_state=write_moments(state.optimizer_state, Moments(moments.count, first, second)),
        # A run that stopped at the limit gets as many tries again.
        nonfinite_streak=jnp.asarray(streak % config.train.max_nonfinite_steps, jnp.int32),
    )
    return parallel.place_state(restored)
