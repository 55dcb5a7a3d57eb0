"""Weights as one flat dictionary from dotted names to tensors, the form everything else uses.

And the one rule between these names and those of `tinyllm_jax`: `X.weight` of a matrix product
[out, in] is `X.kernel` [in, out] there, transposed; all else has the same name and shape. Experts, which are modules of
their own here, are stacked there: `experts.E.X.weight` is `experts.X.kernel[E]`.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyllm_jax.config import ModelConfig
from tinyllm_torch.model.layers import parameter_dtype
from tinyllm_torch.model.transformer import Transformer

Weights = dict[str, Tensor]
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")


def split_weights(model: Transformer) -> tuple[Transformer, Weights]:
    """Take a model apart into its structure, which holds no numbers, and its weights by name."""
    structure, _ = model_structure(model.config)
    return structure, {name: weight.detach() for name, weight in model.named_parameters()}


def merge_weights(structure: Transformer, weights: Mapping[str, Tensor]) -> Transformer:
    """Put a model together again, around these very tensors; gradients reach its parameters.

    Names and structure must come from the same config.
    """
    model = copy.deepcopy(structure)
    model.load_state_dict(weights, assign=True)
    return model


def model_structure(config: ModelConfig) -> tuple[Transformer, Weights]:
    """Give structure, names, shapes and types of a model without computing a weight."""
    with torch.device("meta"):
        model = Transformer(config, generator=None)
    return model, dict(model.named_parameters())


def initial_weights(config: ModelConfig, *, seed: int) -> Weights:
    """Draw the initial weights; other numbers than `tinyllm_jax` draws, of the same spread."""
    model = Transformer(config, generator=torch.Generator().manual_seed(seed))
    return split_weights(model)[1]


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Count all parameters, and those outside the embedding table (the head counts if untied)."""
    _, shapes = model_structure(config)
    total = sum(shape.numel() for shape in shapes.values())
    return total, total - shapes["embed_tokens.weight"].numel()


def count_active_parameters(config: ModelConfig) -> int:
    """Count the parameters that one token passes: all but the experts that were not chosen."""
    idle = max(config.num_experts - config.num_experts_per_tok, 0)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return count_parameters(config)[0] - config.num_hidden_layers * idle * expert


def flops_per_token(config: ModelConfig, *, sequence_length: int) -> float:
    """Count floating-point operations of training on one token: 6 N + 6 L Q S.

    N is every parameter that multiplies a token (norms and idle experts left out, embedding look-up
    left out, head counted whether tied or not): 2 operations forward, 4 backward. Attention adds, in each of L layers of
    query width Q, 2 x 2 x Q x S forward for scores and mixing over S keys, three times that with
    the backward pass, and half of it since a causal query sees S / 2 keys on average.

    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B.
    """
    layers, table = config.num_hidden_layers, config.vocab_size * config.hidden_size
    norms = (2 * layers + 1) * config.hidden_size + 2 * layers * config.head_dim * config.qk_norm
    look_up = 0 if config.tie_word_embeddings else table
    multiplying = count_active_parameters(config) - norms - look_up
    query = config.num_attention_heads * config.head_dim
    return 6.0 * multiplying + 6.0 * config.num_hidden_layers * query * sequence_length


def from_jax_weights(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rename and transpose weights of `tinyllm_jax`, as NumPy arrays; types stay as they are.

    Moments, which have the weights' names and shapes, go the same way.
    """
    renamed = {}
    for name, array in weights.items():
        array, stem = np.asarray(array), name.removesuffix(".kernel")
        if stem == name:
            renamed[name] = array
        elif array.ndim == 3:
            for expert, kernel in enumerate(array):
                own = stem.replace(".experts.", f".experts.{expert}.")
                renamed[f"{own}.weight"] = kernel.T
        else:
            renamed[f"{stem}.weight"] = array.T
    # Libraries that read the buffer and not the strides scramble a transposed view.
    return {name: np.ascontiguousarray(array) for name, array in renamed.items()}


def to_jax_weights(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Rename and transpose weights of this package for `tinyllm_jax`, as NumPy arrays."""
    renamed, experts = {}, {}
    for name, array in weights.items():
        array, stem = np.asarray(array), name.removesuffix(".weight")
        if found := _EXPERT.fullmatch(stem):
            experts.setdefault(f"{found[1]}.experts.{found[3]}.kernel", {})[int(found[2])] = array.T
        elif stem.endswith(("_proj", "lm_head", "mlp.gate", "score")):
            renamed[f"{stem}.kernel"] = array.T
        else:
            renamed[name] = array
    stacked = {name: np.stack([of[e] for e in sorted(of)]) for name, of in experts.items()}
    return {name: np.ascontiguousarray(array) for name, array in (renamed | stacked).items()}


def as_tensors(
    weights: Mapping[str, Any], config: ModelConfig, *, device: torch.device | str
) -> Weights:
    """Turn NumPy weights of any floating type, or tensors, into the type that weights have here."""
    dtype = parameter_dtype(config)
    # bfloat16 of NumPy, which torch does not take, fits into float32 whole.
    kind = np.float64 if dtype == torch.float64 else np.float32
    tensors = {
        name: value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, kind))
        for name, value in weights.items()
    }
    return {name: tensor.to(device, dtype).contiguous() for name, tensor in tensors.items()}
