"""Dropout as a pure function of its key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def dropout(
    x: Float[Array, "*shape"], *, rate: float, key: PRNGKeyArray | None
) -> Float[Array, "*shape"]:
    """Set a share `rate` of `x` to zero and scale the rest by 1 / (1 - rate); no key, no change.

    Source: Srivastava et al. 2014, JMLR 15, "inverted" form.
    """
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros((), x.dtype))
