"""Low-rank adapters: a matrix W stays as it is, and a product of two thin ones is learnt beside it.

y = x W + alpha / rank * dropout(x) A B, with B zero at first, so that a run begins with the model
that it adapts. Names are PEFT's, `kernel` and [in, out] are ours: beside `q_proj.kernel` stand
`q_proj.lora_A.kernel` [in, rank] and `q_proj.lora_B.kernel` [rank, out].

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; A is drawn as PEFT draws it (peft,
tuners/lora/layer.py, `reset_lora_parameters`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from tinyllm_jax.config import LoraConfig, ModelConfig
from tinyllm_jax.model.dropout import dropout
from tinyllm_jax.model.layers import Linear, parameter_dtype
from tinyllm_jax.model.transformer import DecoderLayer, Transformer
from tinyllm_jax.model.weights import (
    EMBEDDING,
    HEAD,
    SCORES,
    Weights,
    count_parameters,
    split_weights,
)

A, B = ".lora_A.kernel", ".lora_B.kernel"


class LoraLinear(Linear):
    """Matrix product with an adapter beside it."""

    def __init__(self, base: Linear, lora: LoraConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        in_size, out_size = base.kernel.shape
        self.kernel = base.kernel
        self.lora_A = Linear(in_size, lora.rank, std=1.0, dtype=dtype, rngs=rngs)
        self.lora_B = Linear(lora.rank, out_size, std=0.0, dtype=dtype, rngs=rngs)
        self.scale, self.dropout_rate = lora.alpha / lora.rank, lora.dropout

    def __call__(
        self, x: Float[Array, "batch seq in"], *, adapter_key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch seq out"]:
        kept = dropout(x, rate=self.dropout_rate, key=adapter_key)
        return super().__call__(x) + self.scale * self.lora_B(self.lora_A(kept))


def adapted_structure(
    config: ModelConfig, lora: LoraConfig
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """Give the structure of a model with adapters, and the names, shapes and types of all weights."""
    shapes: dict[str, Any] = {}

    def build() -> Any:
        rngs = nnx.Rngs(params=0)
        model, dtype = Transformer(config, rngs=rngs), parameter_dtype(config)
        for layer in model.layers:
            add_adapters(layer, lora, dtype=dtype, rngs=rngs)
        structure, weights = split_weights(model)
        shapes["structure"] = structure
        return weights

    abstract = jax.eval_shape(build)
    return shapes["structure"], abstract


def add_adapters(
    layer: DecoderLayer, lora: LoraConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> None:
    """Put adapters beside the matrices of a block that are named."""
    for name in lora.targets:
        home = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        setattr(home, name, LoraLinear(getattr(home, name), lora, dtype=dtype, rngs=rngs))


def is_adapter(name: str) -> bool:
    """Tell the weights of adapters by their names."""
    return name.endswith((A, B))


def trained_names(config: ModelConfig, lora: LoraConfig) -> list[str]:
    """List what a run with adapters trains: these, and the head for scores, which begins at zero.

    With `lora.embeddings` the rows of tokens, too.
    """
    _, shapes = adapted_structure(config, lora)
    others = {SCORES, *((EMBEDDING, HEAD) if lora.embeddings else ())}
    return [name for name in shapes if is_adapter(name) or name in others]


def initial_adapters(config: ModelConfig, lora: LoraConfig, *, seed: int) -> Weights:
    """Draw A, uniform within 1 / sqrt(in) of 0, and make B zero."""
    _, shapes = adapted_structure(config, lora)
    names = sorted(name for name in shapes if is_adapter(name))

    def draw(key: PRNGKeyArray, name: str) -> Array:
        shape, dtype = shapes[name].shape, shapes[name].dtype
        if name.endswith(B):
            return jnp.zeros(shape, dtype)
        limit = shape[0] ** -0.5
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    keys = jax.random.split(jax.random.key(seed), len(names))
    return {name: draw(key, name) for name, key in zip(names, keys, strict=True)}


def merge_adapters(
    frozen: Mapping[str, Any], trained: Mapping[str, Any], *, lora: LoraConfig
) -> dict[str, Any]:
    """Give the weights of a model without adapters that computes the same; NumPy or JAX.

    Args:
        frozen: Weights that are not trained.
        trained: Adapters, and weights that take the place of frozen ones.
    """
    merged = {**frozen, **{name: w for name, w in trained.items() if not is_adapter(name)}}
    for name in adapted_names(trained):
        stem = name.removesuffix(".kernel")
        with jax.default_matmul_precision("highest"):
            product = trained[stem + A] @ trained[stem + B]
        merged[name] = frozen[name] + lora.alpha / lora.rank * product
    return merged


def adapted_names(trained: Mapping[str, Any]) -> list[str]:
    """List the matrices that have adapters."""
    return [name.removesuffix(A) + ".kernel" for name in trained if name.endswith(A)]


def describe_adapters(config: ModelConfig, lora: LoraConfig) -> str:
    """Say for people how much of a model is trained."""
    _, shapes = adapted_structure(config, lora)
    names = trained_names(config, lora)
    trained = sum(shapes[name].size for name in names)
    share = trained / count_parameters(config)[0]
    others = ", the score head" if SCORES in names else ""
    others += ", the rows of all tokens" if lora.embeddings else ""
    return f"{trained:,} parameters ({share:.2%} of the model's) in adapters of rank {lora.rank}{others}"
