"""tinyllm in JAX: small language models, from raw text to a model that talks.

    import tinyllm_jax
    model = tinyllm_jax.load("checkpoints/pretrain_tiny")
    print(model.generate("Once upon a time")[0])

Importing this package imports no framework; that waits until `load` or `model` is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllm_jax import model
    from tinyllm_jax.inference.language_model import load

__all__ = ["load", "model"]


def __getattr__(name: str) -> Any:
    """Import what is asked for the first time."""
    if name == "load":
        return importlib.import_module("tinyllm_jax.inference.language_model").load
    if name == "model":
        return importlib.import_module("tinyllm_jax.model")
    raise AttributeError(f"module 'tinyllm_jax' has no attribute {name!r}")
