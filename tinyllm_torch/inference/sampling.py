"""From logits to the next token: repetition penalty, then temperature, then top-k, then top-p.

Settings are tensors with one value for each row, so that rows of one batch may differ.

Source: the order and every rule are those of transformers, generation/logits_process.py; the
penalty: Keskar et al. 2019, arXiv:1909.05858, section 4.1; top-p: Holtzman et al. 2020,
arXiv:1904.09751, section 3.1.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tinyllm_jax.data.batches import mix


class RowSettings(NamedTuple):
    """How each row of a batch is sampled; the fields mean what they mean in `SamplingConfig`."""

    temperature: Float[Tensor, "batch"]
    top_k: Int[Tensor, "batch"]
    top_p: Float[Tensor, "batch"]
    repetition_penalty: Float[Tensor, "batch"]
    seed: Int[Tensor, "batch"]
    sample_number: Int[Tensor, "batch"]  # counts the samples of one prompt


def next_tokens(
    logits: Float[Tensor, "batch vocab"],
    *,
    present: Bool[Tensor, "batch vocab"],
    settings: RowSettings,
    token_number: Int[Tensor, "batch"],
) -> Int[Tensor, "batch"]:
    """Pick the next token of each row: the likeliest at temperature 0, else a drawn one.

    A row's noise depends on its seed, sample number and token number alone, so its text does not
    depend on what else is in the batch.

    Args:
        present: True for the tokens that stand in the row's prompt or output.
        token_number: How many new tokens the row already has.
    """
    # Probabilities at least in float32, whatever the model computes in.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = penalise_repetition(logits, present=present, penalty=settings.repetition_penalty)
    drawing = settings.temperature > 0
    picked = first_largest(logits)
    if drawing.any():
        noisy = filtered(logits, settings=settings) + row_noise(logits, settings, token_number)
        picked = torch.where(drawing, first_largest(noisy), picked)
    return picked


def first_largest(scores: Float[Tensor, "batch vocab"]) -> Int[Tensor, "batch"]:
    """Find the largest score of each row and, of equals, the first; torch's argmax may take any."""
    is_largest = scores == scores.amax(dim=-1, keepdim=True)
    return is_largest.to(torch.int8).argmax(dim=-1)


def filtered(
    logits: Float[Tensor, "batch vocab"], *, settings: RowSettings
) -> Float[Tensor, "batch vocab"]:
    """Scale by temperature and put -inf where top-k or top-p leaves a token out.

    Rows of temperature 0 are not scaled.
    """
    temperature = torch.where(settings.temperature > 0, settings.temperature, 1.0)
    logits = logits / temperature.to(logits.dtype)[:, None]
    logits = keep_top_k(logits, top_k=settings.top_k)
    return keep_top_p(logits, top_p=settings.top_p)


def penalise_repetition(
    logits: Float[Tensor, "batch vocab"],
    *,
    present: Bool[Tensor, "batch vocab"],
    penalty: Float[Tensor, "batch"],
) -> Float[Tensor, "batch vocab"]:
    """Divide positive and multiply negative logits of tokens that are already there."""
    penalty = penalty.to(logits.dtype)[:, None]
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(present, penalised, logits)


def keep_top_k(
    logits: Float[Tensor, "batch vocab"], *, top_k: Int[Tensor, "batch"]
) -> Float[Tensor, "batch vocab"]:
    """Keep the k largest logits of each row, and every equal of the k-th; 0 keeps all."""
    vocab = logits.shape[1]
    wanted = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    return _keep_likeliest(logits, torch.ones_like(logits), reach=wanted.to(logits.dtype))


def keep_top_p(
    logits: Float[Tensor, "batch vocab"], *, top_p: Float[Tensor, "batch"]
) -> Float[Tensor, "batch vocab"]:
    """Keep the fewest, likeliest tokens of each row that together reach `top_p`; 1 keeps all.

    Every equal of the last one stays too, where transformers' choice depends on its sort.
    """
    probabilities = torch.softmax(logits, dim=-1)
    # Infinity is never reached, so all stay, and rounding of the sum cannot cost a token.
    reach = torch.where(top_p >= 1, torch.inf, top_p).to(probabilities.dtype)
    return _keep_likeliest(logits, probabilities, reach=reach)


def _keep_likeliest(
    logits: Float[Tensor, "batch vocab"],
    amounts: Float[Tensor, "batch vocab"],
    *,
    reach: Float[Tensor, "batch"],
) -> Float[Tensor, "batch vocab"]:
    """Keep the largest logits, as few as it takes for their amounts to add up to `reach`.

    By sorting, where `tinyllm_jax` searches bit by bit: two ways to the same set prove each other.
    """
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)
    totals = amounts.gather(-1, places).cumsum(dim=-1)
    # The first place whose total reaches; where none does, the last.
    last = (totals < reach[:, None]).sum(dim=-1).clamp(max=logits.shape[1] - 1)
    threshold = ordered.gather(-1, last[:, None])
    return torch.where(logits >= threshold, logits, -torch.inf)


def row_noise(
    logits: Float[Tensor, "batch vocab"], settings: RowSettings, token_number: Int[Tensor, "batch"]
) -> Float[Tensor, "batch vocab"]:
    """Draw the Gumbel noise whose sum with log-probabilities is largest at a fair sample.

    The bits are torch's, so texts drawn at a temperature are other ones than `tinyllm_jax` draws.
    """

    def one_row(seed: int, sample_number: int, number: int) -> Float[Tensor, "vocab"]:
        mixed = mix(np.array([seed], np.uint64)) + np.uint64(sample_number)
        mixed = mix(mix(mixed) + np.uint64(number))
        # torch's generator of the CPU looks at the low 32 bits of its seed only.
        generator = torch.Generator().manual_seed(int(mixed[0]) & 0xFFFF_FFFF)
        exponential = torch.empty(logits.shape[1], dtype=logits.dtype)
        return -exponential.exponential_(generator=generator).log()

    rows = zip(
        settings.seed.tolist(),
        settings.sample_number.tolist(),
        token_number.tolist(),
        strict=True,
    )
    return torch.stack([one_row(*row) for row in rows]).to(logits.device)
