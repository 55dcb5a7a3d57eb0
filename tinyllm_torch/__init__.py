"""tinyllm in PyTorch: the literal twin of `tinyllm_jax`, which proves its numbers.

    import tinyllm_torch
    model = tinyllm_torch.load("checkpoints/pretrain_tiny_torch")
    print(model.generate("Once upon a time")[0])

Files, functions and their order, einsum strings and constants are those of `tinyllm_jax`, so either
can be read beside the other. Imports no jax; settings and data are `tinyllm_jax`'s own, which import
none either. Importing this package imports no framework; that waits until something is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllm_torch.inference.language_model import load
    from tinyllm_torch.model import Transformer

__all__ = ["Transformer", "load"]


def __getattr__(name: str) -> Any:
    """Import what is asked for the first time."""
    if name == "load":
        return importlib.import_module("tinyllm_torch.inference.language_model").load
    if name == "Transformer":
        return importlib.import_module("tinyllm_torch.model").Transformer
    raise AttributeError(f"module 'tinyllm_torch' has no attribute {name!r}")
