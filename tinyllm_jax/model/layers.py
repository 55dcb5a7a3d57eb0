"""The layers that blocks are made of: matrix product, embedding table, RMSNorm, SwiGLU MLP.

Letters: r row (one token of the batch), e input width, f output width.

Source: RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467; SwiGLU: Shazeer 2020, arXiv:2002.05202.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import Precision
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tinyllm_jax.config import ModelConfig
from tinyllm_jax.model.dropout import dropout


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Name the type of activations; `auto` is bfloat16 on GPU and TPU, float32 on CPU."""
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def parameter_dtype(config: ModelConfig) -> jnp.dtype:
    """Name the type of weights: float32, or float64 where the model computes in float64."""
    return jnp.promote_types(compute_dtype(config), jnp.float32)


def matmul_precision(dtype: jnp.dtype) -> Precision:
    """Keep float32 products in float32 on devices whose default multiplies in fewer bits."""
    return Precision.DEFAULT if dtype == jnp.bfloat16 else Precision.HIGHEST


@functools.partial(jax.jit, static_argnames=("shape", "std", "dtype"))
def draw(
    key: PRNGKeyArray, shape: tuple[int, ...], *, std: float, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """Draw a first weight around 0, in a program that all weights of this shape share."""
    return std * jax.random.normal(key, shape, dtype)


@jax.custom_vjp
def _turned_gradient(kernel: Array) -> Array:
    """Give the matrix itself, whose gradient XLA is to make with the matrix turned around.

    XLA's CPU backend takes up to twice as long for a sum over rows whose wider side is not the last one. The
    barrier keeps it from turning the product back.
    """
    return kernel


_turned_gradient.defvjp(
    lambda kernel: (kernel, None),
    lambda _, change: (jax.lax.optimization_barrier(change.T).T,),
)


class Linear(nnx.Module):
    """Matrix product without bias."""

    def __init__(
        self, in_size: int, out_size: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(draw(rngs.params(), (in_size, out_size), std=std, dtype=dtype))

    def __call__(
        self, x: Float[Array, "batch seq in"], *, adapter_key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch seq out"]:
        """Multiply rows as one matrix: with batch and sequence apart, XLA's CPU backend transposes
        a copy of every gradient, which doubles the time of the MLP.

        Args:
            adapter_key: Dropout of the adapter, where there is one beside it (`LoraLinear`).
        """
        del adapter_key
        kernel = jnp.asarray(self.kernel[...], x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if kernel.shape[0] > kernel.shape[1] and jax.default_backend() == "cpu":
            kernel = _turned_gradient(kernel)
        out = jnp.einsum("re,ef->rf", rows, kernel, precision=matmul_precision(x.dtype))
        return out.reshape(*x.shape[:-1], kernel.shape[-1])


class Embedding(nnx.Module):
    """Table of one vector for each token."""

    def __init__(self, rows: int, size: int, *, std: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(draw(rngs.params(), (rows, size), std=std, dtype=dtype))

    def __call__(
        self, tokens: Int[Array, "batch seq"], *, dtype: jnp.dtype
    ) -> Float[Array, "batch seq hidden"]:
        # Cast after the look-up: the gradient of a frequent token is a sum of thousands, which
        # bfloat16 cannot hold.
        return jnp.take(self.weight[...], tokens, axis=0).astype(dtype)


class RMSNorm(nnx.Module):
    """Scale each vector to unit root mean square, then by a learnt weight."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch hidden"]:
        """Normalise at least in float32; the weight is applied in the type of `x`."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        # Both are rounded to the type of `x` and then widened: the product is the same, and the
        # gradient of the weight, a sum over all rows, is not summed in bfloat16.
        factors = [normed, jnp.expand_dims(self.weight[...], tuple(range(x.ndim - 1)))]
        normed, weight = (factor.astype(x.dtype).astype(wide.dtype) for factor in factors)
        return (normed * weight).astype(x.dtype)


@jax.custom_vjp
def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _gated_kept(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gated(gate, up), (gate, up)


def _gated_gradients(kept: tuple[Array, Array], change: Array) -> tuple[Array, Array]:
    gate, up = kept
    wide = jnp.promote_types(change.dtype, jnp.float32)
    # The barriers keep XLA from finding the same exponentials in the forward pass, or for both gradients:
    # it would keep them, which takes more time and memory than making them three times.
    gate_again = jax.lax.optimization_barrier(gate.astype(wide))
    gate_for_up = jax.lax.optimization_barrier(gate_again)
    up, change = up.astype(wide), change.astype(wide)
    sigmoid = 1.0 / (1.0 + jnp.exp(-gate_again))
    of_gate = change * up * sigmoid * (1.0 + gate_again * (1.0 - sigmoid))
    of_up = change * gate_for_up / (1.0 + jnp.exp(-gate_for_up))
    return of_gate.astype(kept[0].dtype), of_up.astype(kept[1].dtype)


_gated.defvjp(_gated_kept, _gated_gradients)


class MLP(nnx.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig, *, inner: int, rngs: nnx.Rngs):
        hidden, dtype = config.hidden_size, parameter_dtype(config)
        std = config.initializer_range
        residual_std = std / (2 * config.num_hidden_layers) ** 0.5
        self.gate_proj = Linear(hidden, inner, std=std, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden, inner, std=std, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, std=residual_std, dtype=dtype, rngs=rngs)
        self.dropout_rate = config.mlp_dropout

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        *,
        dropout_key: PRNGKeyArray | None,
        adapter_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch seq hidden"]:
        keys = keys_of(adapter_key, 3)
        gate = self.gate_proj(x, adapter_key=keys[0])
        inner = _gated(gate, self.up_proj(x, adapter_key=keys[1]))
        inner = dropout(inner, rate=self.dropout_rate, key=dropout_key)
        return self.down_proj(inner, adapter_key=keys[2])


def keys_of(key: PRNGKeyArray | None, count: int) -> list[Any]:
    """Split a key; without one there is none, and no dropout."""
    return [None] * count if key is None else [*jax.random.split(key, count)]
