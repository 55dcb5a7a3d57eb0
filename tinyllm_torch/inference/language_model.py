"""A trained model with its tokenizer: text in, text out, or token ids in, logits out."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from tinyllm_jax.cli import say
from tinyllm_jax.config import GenerateConfig, ModelConfig, SamplingConfig
from tinyllm_jax.data.asking import as_question, as_text
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import build
from tinyllm_jax.training.step_folders import find_checkpoint
from tinyllm_torch.inference.generate import Generator
from tinyllm_torch.model.transformer import Transformer
from tinyllm_torch.model.weights import as_tensors, merge_weights, model_structure
from tinyllm_torch.training.checkpoint import holds_checkpoint, read_checkpoint
from tinyllm_torch.training.devices import default_device

if TYPE_CHECKING:
    from convert.bundle import Bundle


class LanguageModel:
    """A model that reads and writes text.

    Args:
        config: Shape and arithmetic.
        weights: The flat dictionary of `tinyllm_torch.model.weights`, NumPy arrays or tensors.
        tokenizer: The tokenizer that the model was trained with.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], tokenizer: Tokenizer):
        self.config = config
        self.tokenizer = tokenizer
        self.weights = as_tensors(weights, config, device=default_device())
        self._generator = Generator(config, tokens=tokenizer.vocab_size)
        structure, _ = model_structure(config)
        self.model = merge_weights(structure, self.weights)

    @torch.no_grad()
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
        logits = self.model(torch.from_numpy(tokens).to(default_device()))
        return logits.float().cpu().numpy()

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
        found = self._generator.generate(
            self.weights, [each.ids for each in asked], sampling=sampling, eos_id=asked[0].end_id
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


def load(path: str | Path) -> LanguageModel:
    """Load a trained model and its tokenizer.

    Says on stderr which step it is, and which damaged checkpoints were passed over.

    Args:
        path: A run folder of this package, of which `best` is taken or, where there is none, the
            newest good checkpoint; or a step folder, or `best` itself; or anything else that
            `convert` reads.

    Raises:
        InputError: there is no good checkpoint.
    """
    path = Path(path)
    if path.exists() and not holds_checkpoint(path):
        # By name: to read one's own, convert need not be there.
        bundle = importlib.import_module("convert").read(path, prefer_best=True, say=say)
        if bundle.tokenizer is None:
            raise InputError(
                f"{path}: holds no tokenizer. Convert it, with --tokenizer PATH, and load that."
            )
        return LanguageModel(bundle.model, bundle.weights, bundle.tokenizer)
    checkpoint = read_checkpoint(find_checkpoint(path, on_damaged=say, prefer_best=True))
    say(f"{checkpoint.folder}: step {checkpoint.step}")
    return LanguageModel(checkpoint.config.model, checkpoint.weights, checkpoint.tokenizer)


def model_from_bundle(bundle: "Bundle") -> Transformer:
    """Make the model that a bundle of `convert` describes."""
    structure, _ = model_structure(bundle.model)
    return merge_weights(structure, as_tensors(bundle.weights, bundle.model, device="cpu"))


def bundle_from_model(model: Transformer, tokenizer: Tokenizer | None) -> "Bundle":
    """Describe a model as a bundle of `convert`, without anything of its training."""
    weights = {name: weight.detach().cpu().numpy() for name, weight in model.named_parameters()}
    layout = {
        "format": "tinyllm_torch",
        "rope": "half-split",
        "tied": model.config.tie_word_embeddings,
        "transposed": False,
        "dtype": str(next(iter(weights.values())).dtype),
    }
    return importlib.import_module("convert.bundle").Bundle(
        model=model.config, weights=weights, tokenizer=tokenizer, training=None, layout=layout
    )
