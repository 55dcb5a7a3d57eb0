"""The model as what gives log-probabilities of tokens."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from tinyllm_jax.evaluation.run import with_compute_dtype
from tinyllm_torch.inference.language_model import LanguageModel
from tinyllm_torch.model.transformer import Transformer
from tinyllm_torch.model.weights import merge_weights, model_structure
from tinyllm_torch.objectives.log_probs import target_log_probs
from tinyllm_torch.training.devices import default_device


class TokenScorer:
    """Scores tokens.

    Args:
        model: The model with its weights.
        compute_dtype: float32, or "model" for what the model's settings say.
    """

    def __init__(self, model: LanguageModel, *, compute_dtype: str):
        config = with_compute_dtype(model.config, compute_dtype)
        structure, _ = model_structure(config)
        self._module = merge_weights(structure, model.weights)

    @torch.no_grad()
    def __call__(
        self,
        tokens: Int32[np.ndarray, "rows width"],
        targets: Int32[np.ndarray, "rows width"],
        positions: Int32[np.ndarray, "rows width"],
        segment_ids: Int32[np.ndarray, "rows width"],
    ) -> tuple[Float[np.ndarray, "rows width"], Bool[np.ndarray, "rows width"]]:
        """Give log p(target) in nats, and whether the target is the likeliest token."""
        arrays = (tokens, targets, positions, segment_ids)
        on_device = [torch.from_numpy(array).to(default_device()) for array in arrays]
        hidden = self._module.hidden(on_device[0], on_device[2], on_device[3]).states
        # Row by row, since the logits of all rows would be the largest array by far.
        found = [score_row(self._module, *row) for row in zip(hidden, on_device[1], strict=True)]
        log_probs, greedy = (torch.stack(each).cpu().numpy() for each in zip(*found, strict=True))
        return log_probs, greedy


def score_row(
    module: Transformer, hidden: Float[Tensor, "width hidden"], targets: Int[Tensor, " width"]
) -> tuple[Float[Tensor, " width"], Bool[Tensor, " width"]]:
    """Score the targets of one row."""
    logits = module.logits(hidden[None])
    log_probs = target_log_probs(logits, targets[None])[0]
    return log_probs, torch.argmax(logits[0], dim=-1) == targets
