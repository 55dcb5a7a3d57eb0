"""The decoder and its weights; knows no meshes, files or training."""

from tinyllm_jax.model.transformer import Transformer

__all__ = ["Transformer"]
