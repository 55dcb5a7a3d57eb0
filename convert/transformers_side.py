"""A bundle as transformers' own model: the oracle beside the twins, which could share a mistake."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.bundle import Bundle
from convert.formats import huggingface


class TransformersSide:
    """The model as `AutoModelForCausalLM` reads it from the folder that `--to hf` writes.

    It computes norms, angles and softmax in float32, whatever its weights are.

    Raises:
        InputError: the format cannot hold this model.
    """

    def __init__(self, bundle: Bundle, *, dtype: str):
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "model"
            huggingface.write(bundle, place)
            model: Any = AutoModelForCausalLM.from_pretrained(
                place, local_files_only=True, attn_implementation="eager"
            )
            # The files may be mapped; the copy must not need them any longer.
            self._model = model.to(getattr(torch, dtype)).eval()
            for weight in self._model.parameters():
                weight.data = weight.data.clone()
        if hasattr(self._model, "set_experts_implementation"):  # transformers 5
            # Its usual product of all experts at once takes no float64.
            self._model.set_experts_implementation("eager")
        settings = self._model.generation_config
        settings.eos_token_id, settings.pad_token_id = None, 0

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Score every token of the vocabulary after each token."""
        return self._model(torch.from_numpy(tokens).long()).logits.numpy()

    def greedy(self, prompt: Sequence[int], *, count: int) -> list[int]:
        """Continue a prompt with the likeliest tokens; eos ends nothing."""
        found = self._model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
        )
        return found[0, len(prompt) :].tolist()
