"""A trained model with its tokenizer: text in, text out, or token ids in, logits out."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tinyllm_jax.cli import say
from tinyllm_jax.config import GenerateConfig, ModelConfig, SamplingConfig
from tinyllm_jax.data.asking import as_question, as_text
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.generate import Generator, bucket
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.weights import merge_weights, model_structure
from tinyllm_jax.settings import build
from tinyllm_jax.training.checkpoint import open_checkpoint


class LanguageModel:
    """A model that reads and writes text.

    Args:
        config: Shape and arithmetic.
        weights: The flat dictionary of `tinyllm_jax.model.weights`, NumPy or JAX arrays.
        tokenizer: The tokenizer that the model was trained with.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        with precision(self.config):
            self.weights = {name: jnp.asarray(value) for name, value in weights.items()}
            self._generator = Generator(config, tokens=tokenizer.vocab_size)
            structure, _ = model_structure(config)
        self._logits = compiled(lambda weights, tokens: merge_weights(structure, weights)(tokens))

    def logits(self, token_ids: Any) -> Float[np.ndarray, "batch seq vocab"]:
        """Score every token of the vocabulary after each token, as float32.

        Args:
            token_ids: Whole numbers, [batch, seq]; no bos is added.

        Raises:
            InputError: not two axes of known ids, or longer than the context.
        """
        try:
            array = np.asarray(token_ids)
        except ValueError:
            raise InputError("token_ids has rows of different lengths. Pad them.") from None
        tokens = self._checked(array)
        if tokens.size == 0:
            return np.zeros((*tokens.shape, self.config.vocab_size), np.float32)
        # What stands before padding on the right cannot see it, and buckets save compilations.
        seq = tokens.shape[1]
        width = bucket(seq, limit=self.config.max_position_embeddings)
        with precision(self.config):
            logits = self._logits(self.weights, np.pad(tokens, ((0, 0), (0, width - seq))))
        return np.asarray(logits[:, :seq], np.float32)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = SamplingConfig.max_new_tokens,
        temperature: float = SamplingConfig.temperature,
        top_k: int = SamplingConfig.top_k,
        top_p: float = SamplingConfig.top_p,
        repetition_penalty: float = SamplingConfig.repetition_penalty,
        greedy: bool = SamplingConfig.greedy,
        seed: int = SamplingConfig.seed,
        num_samples: int = SamplingConfig.num_samples,
        slide: bool = SamplingConfig.slide,
        chat: bool = False,
    ) -> list[str]:
        """Go on with each prompt; every text begins with its prompt.

        An empty prompt begins a new document. The settings are those of `SamplingConfig`.

        Args:
            prompts: One text or several.
            chat: Each prompt is what a user says; the texts are answers, without it.

        Returns:
            `num_samples` texts for each prompt, side by side.

        Raises:
            InputError: a setting is out of range, or a prompt fills the context.
        """
        settings = {
            "sampling.max_new_tokens": max_new_tokens,
            "sampling.temperature": temperature,
            "sampling.top_k": top_k,
            "sampling.top_p": top_p,
            "sampling.repetition_penalty": repetition_penalty,
            "sampling.greedy": greedy,
            "sampling.seed": seed,
            "sampling.num_samples": num_samples,
            "sampling.slide": slide,
        }
        checked = build(GenerateConfig, [("", settings)])
        found = self.continue_texts(
            [prompts] if isinstance(prompts, str) else prompts, sampling=checked.sampling, chat=chat
        )
        return [text for text, _ in found]

    def continue_texts(
        self, prompts: Sequence[str], *, sampling: SamplingConfig, chat: bool
    ) -> list[tuple[str, str]]:
        """Do what `generate` does, and say why each text ended (`Continuation.ended`)."""
        asked = [
            as_question(prompt, self.tokenizer, system="")
            if chat
            else as_text(prompt, self.tokenizer)
            for prompt in prompts
        ]
        if not asked:
            return []
        with precision(self.config):
            found = self._generator.generate(
                self.weights,
                [each.ids for each in asked],
                sampling=sampling,
                eos_id=asked[0].end_id,
            )
        return [
            (each.text(sample.token_ids.tolist()), sample.ended)
            for each, samples in zip(asked, found, strict=True)
            for sample in samples
        ]

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        vocab, limit = self.config.vocab_size, self.config.max_position_embeddings
        if tokens.ndim != 2 or not (tokens.size == 0 or np.issubdtype(tokens.dtype, np.integer)):
            raise InputError(
                f"token_ids has shape {tokens.shape} and type {tokens.dtype}. Give whole numbers "
                "as [batch, seq]."
            )
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab):
            raise InputError(
                f"token_ids goes from {tokens.min()} to {tokens.max()}, and model.vocab_size="
                f"{vocab}. Use the tokenizer that the model was trained with."
            )
        if tokens.shape[1] > limit:
            raise InputError(
                f"token_ids has {tokens.shape[1]} tokens a row, and model.max_position_embeddings="
                f"{limit}. Cut the rows."
            )
        return tokens.astype(np.int32)


def precision(config: ModelConfig) -> contextlib.AbstractContextManager[Any]:
    """Let JAX keep float64 where the model asks for it; without this it makes float32."""
    double = config.compute_dtype == "float64"
    return jax.enable_x64(True) if double else contextlib.nullcontext()


def load(path: str | Path) -> LanguageModel:
    """Load a trained model and its tokenizer.

    Says on stderr which step it is, and which damaged checkpoints were passed over.

    Args:
        path: A run folder, of which `best` is taken or, where there is none, the newest good
            checkpoint; or a step folder, or `best` itself; or anything `convert` reads.

    Raises:
        InputError: there is no good checkpoint.
    """
    checkpoint = open_checkpoint(Path(path), on_damaged=say, prefer_best=True)
    config = checkpoint.config.model
    if config.attention == "cudnn" and jax.default_backend() != "gpu":
        # The kernel is a matter of the machine, not of the model.
        config = dataclasses.replace(config, attention="auto")
    say(f"{checkpoint.folder}: step {checkpoint.step}")
    return LanguageModel(config, checkpoint.weights, checkpoint.tokenizer)
