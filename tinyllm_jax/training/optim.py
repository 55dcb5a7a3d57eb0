"""The optimizer: AdamW with a warm-up-cosine schedule, decay on matrices only, clipping by norm.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (decoupled decay) and 2017, arXiv:1608.03983
(cosine); the arithmetic is optax's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from tinyllm_jax.config import Config


class Moments(NamedTuple):
    """AdamW's memory in the form that checkpoints keep."""

    count: Int[Array, ""]  # updates applied
    first: dict[str, Array]  # running mean of the gradient, by weight name
    second: dict[str, Array]  # running mean of its square


def learning_rate_schedule(config: Config) -> Callable[[Any], Any]:
    """Give the learning rate of update number `update`, counted from 1.

    Linear from 0 to the peak, reached at update `warmup_steps`; cosine from there to the floor,
    reached at `decay_steps`; the floor after that. The first update has peak / warmup_steps, so no
    update is wasted on a rate of zero.
    """
    optimizer = config.optimizer
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if optimizer.warmup_steps else optimizer.learning_rate,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=max(config.decay_steps, optimizer.warmup_steps + 1),
        end_value=optimizer.min_learning_rate,
    )
    # An int32 count would make the rate float32 even where all else is float64.
    return lambda update: schedule(jnp.asarray(update, dtype=float))


def decays(weight: Any) -> bool:
    """Tell whether a weight is decayed: matrices (the embedding among them), never norms."""
    return weight.ndim >= 2


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Chain clipping by global norm and AdamW."""
    settings, schedule = config.optimizer, learning_rate_schedule(config)
    adamw = optax.adamw(
        # optax counts updates from 0.
        learning_rate=lambda count: schedule(count + 1),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=lambda weights: jax.tree.map(decays, weights),
    )
    if settings.max_grad_norm == 0.0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)


def read_moments(optimizer_state: Any) -> Moments:
    """Take AdamW's memory out of an optax state."""
    leaves = jax.tree.leaves(optimizer_state, is_leaf=_is_counting_state)
    adam: Any
    (adam,) = [leaf for leaf in leaves if isinstance(leaf, optax.ScaleByAdamState)]
    return Moments(adam.count, adam.mu, adam.nu)


def write_moments(optimizer_state: Any, moments: Moments) -> Any:
    """Put AdamW's memory into an optax state; the schedule counts the same updates."""
    count = jnp.asarray(moments.count, jnp.int32)

    def replace(state: Any) -> Any:
        if isinstance(state, optax.ScaleByAdamState):
            first, second = jax.tree.map(jnp.array, (dict(moments.first), dict(moments.second)))
            return optax.ScaleByAdamState(jnp.array(count), first, second)
        if isinstance(state, optax.ScaleByScheduleState):
            return optax.ScaleByScheduleState(jnp.array(count))  # no buffer is donated twice
        return state

    return jax.tree.map(replace, optimizer_state, is_leaf=_is_counting_state)


def _is_counting_state(state: Any) -> bool:
    return isinstance(state, (optax.ScaleByAdamState, optax.ScaleByScheduleState))
