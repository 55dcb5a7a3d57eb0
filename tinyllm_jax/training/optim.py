"""The optimizer: AdamW, or Muon beside it; schedules, decay on matrices only, clipping by norm.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (decoupled decay) and 2017, arXiv:1608.03983
(cosine); Jordan et al. 2024, kellerjordan.github.io/posts/muon (Muon); Liu et al. 2025,
arXiv:2502.16982 (its updates scaled to AdamW's size, with decay). The arithmetic is optax's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from tinyllm_jax.config import Config

# Muon's numbers, as its authors chose them together: a, b and c of the polynomial
# a x + b x^3 + c x^5, how often it is applied, and what keeps a gradient of zero from a division
# by zero.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_EPSILON = 1e-8
# Root mean square of an update of AdamW, which Muon's are given too.
UPDATE_RMS = 0.2


class Moments(NamedTuple):
    """The optimizer's memory in the form that checkpoints keep."""

    count: Int[Array, ""]  # updates applied
    first: dict[str, Array]  # running mean of the gradient, by weight name
    second: dict[str, Array]  # running mean of its square, of the weights that AdamW updates


def learning_rate_schedule(config: Config) -> Callable[[Any], Any]:
    """Give the learning rate of update number `update`, counted from 1.

    Linear from 0 to the peak, reached at update `warmup_steps`, so the first update has peak /
    warmup_steps, and none is wasted on a rate of zero. From there to update `decay_steps`:

    - cosine: along a cosine to the floor, and the floor after that.
    - wsd (warm up, stay, decay): the peak, then linear to the floor over the last
      `wsd_decay_share` of `decay_steps`, which begins when warm-up has ended or later; the floor
      after that.
    - minimind_cosine: from 1.1 to 0.1 of the peak along a cosine that begins at the first update
      and ends after `decay_steps` of them, whatever the floor; warm-up multiplies it.

    Source:
        wsd: Hu et al. 2024, arXiv:2404.06395, section 4.2; linear: Haegele et al. 2024,
        arXiv:2405.18392. minimind_cosine: jingyaogong/minimind, `get_lr` of its trainers until
        December 2025; later ones begin at 1.0 of the peak.
    """
    optimizer = config.optimizer
    peak, floor = optimizer.learning_rate, optimizer.min_learning_rate
    warmup_steps = optimizer.warmup_steps
    decay_steps = max(config.decay_steps, warmup_steps + 1)
    cooldown_steps = min(optimizer.wsd_decay_share * decay_steps, decay_steps - warmup_steps)
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        end_value=floor,
    )

    def climbed(update: Any) -> Any:
        return jnp.minimum(update / max(warmup_steps, 1), 1.0)

    def wsd(update: Any) -> Any:
        left = jnp.clip((decay_steps - update) / cooldown_steps, 0.0, 1.0)
        return climbed(update) * (floor + (peak - floor) * left)

    def minimind_cosine(update: Any) -> Any:
        share = jnp.minimum((update - 1) / config.decay_steps, 1.0)
        return climbed(update) * (peak / 10 + 0.5 * peak * (1.0 + jnp.cos(jnp.pi * share)))

    schedules = {"cosine": cosine, "wsd": wsd, "minimind_cosine": minimind_cosine}
    schedule = schedules[optimizer.schedule]
    # An int32 count would make the rate float32 even where all else is float64.
    return lambda update: schedule(jnp.asarray(update, dtype=float))


def decays(weight: Any) -> bool:
    """Tell whether a weight is decayed: matrices (the embedding among them), never norms."""
    return weight.ndim >= 2


def is_hidden_matrix(name: str) -> bool:
    """Tell the matrices inside the blocks, by which vectors are multiplied, from all else.

    The embedding is no such matrix (its rows are looked up), nor is the head, and a router is so
    thin that its rows are rather vectors of their own.
    """
    return name.startswith("layers.") and name.endswith("_proj.kernel")


def has_second_moment(name: str, config: Config) -> bool:
    """Tell whether AdamW updates a weight, which is all that needs a second moment."""
    return config.optimizer.name == "adamw" or not is_hidden_matrix(name)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Chain clipping by global norm and AdamW, or Muon for the hidden matrices and AdamW beside it.

    Both take the same learning rate and decay.
    """
    settings, schedule = config.optimizer, learning_rate_schedule(config)

    def learning_rate(count: Any) -> Any:
        return schedule(count + 1)  # optax counts updates from 0

    optimizer = optax.adamw(
        learning_rate=learning_rate,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=lambda weights: jax.tree.map(decays, weights),
    )
    if settings.name == "muon":
        muon = optax.chain(
            _orthogonal_momentum(settings.muon_momentum),
            optax.add_decayed_weights(settings.weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
        optimizer = optax.partition(
            {"adamw": optimizer, "muon": muon},
            lambda weights: {
                name: "adamw" if has_second_moment(name, config) else "muon" for name in weights
            },
        )
    if settings.max_grad_norm == 0.0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), optimizer)


def _orthogonal_momentum(momentum: float) -> optax.GradientTransformation:
    """Make the nearest nearly orthogonal matrix of the running mean of the gradient, scaled.

    Each expert of a stack [experts, in, out] is a matrix by itself. Products run in the device's
    default precision, which may be less than float32's, as the authors' bfloat16 is: singular
    values end anywhere from 0.68 to 1.21, and those that began below 0.002 of the norm lower.
    """
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    orthogonalized = optax.contrib.scale_by_muon(
        ns_coeffs=NEWTON_SCHULZ,
        ns_steps=NEWTON_SCHULZ_STEPS,
        beta=momentum,
        eps=NEWTON_SCHULZ_EPSILON,
        nesterov=True,
        weight_dimension_numbers=lambda weights: jax.tree.map(lambda _: axes, weights),
    )

    def scaled(update: Any, _weight: Any) -> Any:
        return UPDATE_RMS * math.sqrt(max(update.shape[-2:])) * update

    return optax.chain(orthogonalized, optax.stateless_with_tree_map(scaled))


def read_moments(optimizer_state: Any) -> Moments:
    """Take the optimizer's memory out of an optax state."""
    leaves = jax.tree.leaves(optimizer_state, is_leaf=_is_counting_state)
    adam: Any
    (adam,) = [leaf for leaf in leaves if isinstance(leaf, optax.ScaleByAdamState)]
    muon = [leaf for leaf in leaves if isinstance(leaf, optax.contrib.MuonState)]
    first = {name: moment for state in (adam, *muon) for name, moment in _own(state.mu).items()}
    return Moments(adam.count, first, _own(adam.nu))


def write_moments(optimizer_state: Any, moments: Moments) -> Any:
    """Put the optimizer's memory into an optax state; the schedule counts the same updates."""
    count = jnp.asarray(moments.count, jnp.int32)

    # Each counter and moment is copied, so that no buffer is donated twice.
    def copied(places: Any, arrays: dict[str, Array]) -> Any:
        return places | {name: jnp.array(arrays[name]) for name in _own(places)}

    def replace(state: Any) -> Any:
        if isinstance(state, optax.ScaleByAdamState):
            first, second = copied(state.mu, moments.first), copied(state.nu, moments.second)
            return optax.ScaleByAdamState(jnp.array(count), first, second)
        if isinstance(state, optax.contrib.MuonState):
            first = copied(state.mu, moments.first)
            return state._replace(count=jnp.array(count), mu=first)
        if isinstance(state, optax.ScaleByScheduleState):
            return optax.ScaleByScheduleState(jnp.array(count))
        return state

    return jax.tree.map(replace, optimizer_state, is_leaf=_is_counting_state)


def _own(moments: Any) -> dict[str, Any]:
    """Leave out the places that optax keeps for the weights of the other optimizer."""
    return {
        name: moment for name, moment in moments.items() if not isinstance(moment, optax.MaskedNode)
    }


def _is_counting_state(state: Any) -> bool:
    kinds = (optax.ScaleByAdamState, optax.contrib.MuonState, optax.ScaleByScheduleState)
    return isinstance(state, kinds)
