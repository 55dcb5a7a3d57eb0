"""Runs that train adapters: the structure of what is trained, and the whole model of it."""

from collections.abc import Callable

from flax import nnx

from tinyllm_jax.config import Config
from tinyllm_jax.model.lora import adapted_names, adapted_structure, is_adapter, merge_adapters
from tinyllm_jax.model.weights import Weights, model_structure
from tinyllm_jax.training.parallel import Parallel


def trained_structure(config: Config) -> nnx.GraphDef:
    """Give the structure of the model that train steps run: with adapters where there are some."""
    if config.lora.rank > 0:
        return adapted_structure(config.model, config.lora)[0]
    return model_structure(config.model)[0]


def make_whole(config: Config, frozen: Weights, parallel: Parallel) -> Callable[[Weights], Weights]:
    """Make the function that gives the whole model of what is trained, in its place.

    Evaluations, samples and rollouts use the merged weights, so that they know nothing of adapters.
    They are a second copy of the adapted matrices for as long as somebody looks at them.
    """
    if config.lora.rank == 0:
        return lambda trained: trained

    def merge(kernels: Weights, adapters: Weights) -> Weights:
        return merge_adapters(kernels, adapters, lora=config.lora)

    compiled = parallel.compile_weights(merge)

    def whole(trained: Weights) -> Weights:
        adapters = {name: weight for name, weight in trained.items() if is_adapter(name)}
        others = {name: weight for name, weight in trained.items() if not is_adapter(name)}
        kernels = {name: frozen[name] for name in adapted_names(adapters)}
        return {**frozen, **others, **compiled(kernels, adapters)}

    return whole
