"""The decoder and its weights; knows no files or training."""

from tinyllm_torch.model.transformer import Transformer

__all__ = ["Transformer"]
