"""Continuations of token rows: read the prompts, then one token at a time from the cache.

    generator = Generator(config.model)
    rows = generator.generate(weights, prompts, sampling=config.sampling, eos_id=tokenizer.eos_id)
    rows[i][j].token_ids  # sample j of prompt i

Weights are an argument, so that a training run samples from its live ones.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tinyllm_jax.config import ModelConfig, SamplingConfig
from tinyllm_jax.errors import InputError
from tinyllm_torch.inference.sampling import RowSettings, next_tokens
from tinyllm_torch.model.kv_cache import LayerCache, empty_cache
from tinyllm_torch.model.layers import compute_dtype
from tinyllm_torch.model.moe import ROUTER
from tinyllm_torch.model.transformer import Transformer
from tinyllm_torch.model.weights import merge_weights, model_structure


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What followed one prompt.

    Attributes:
        token_ids: The new tokens, int32; when `ended` is "eos" the last one is the eos.
        ended: "eos", "length" (`max_new_tokens` are there) or "context" (prompt and continuation
            fill `max_position_embeddings`).
    """

    token_ids: np.ndarray
    ended: str


class Generator:
    """Generation for one model shape.

    Args:
        config: Shape and arithmetic of the model that the weights belong to.
        tokens: Ids from here on are never picked: an embedding may have more rows than its
            tokenizer has tokens. None picks of all.
    """

    def __init__(self, config: ModelConfig, *, tokens: int | None = None):
        self.config = config
        self._known = tokens or config.vocab_size
        self._structure, _ = model_structure(config)

    @torch.no_grad()
    def generate(
        self,
        weights: Mapping[str, Tensor],
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig,
        eos_id: int,
    ) -> list[list[Continuation]]:
        """Continue each prompt `sampling.num_samples` times.

        A continuation is a function of weights, prompt, settings, seed and its number among the
        samples of its prompt: the other rows of the batch change nothing but rounding. The same
        prompt twice gives the same text twice.

        Prompt and continuation together take `max_position_embeddings` tokens at most. With
        `sampling.slide`, a row of that length is cut to its last `max_position_embeddings // 2`
        tokens, which are read again from position 0, and goes on; a longer prompt is cut alike.
        The repetition penalty counts the tokens that slid out too.

        Args:
            weights: The flat dictionary of `tinyllm_torch.model.weights`.
            prompts: Token ids, bos included; lengths may differ.
            sampling: Every setting but `prompt`.
            eos_id: The token that ends a continuation; -1 for none.

        Raises:
            InputError: a prompt is empty, fills the context, or holds an id that the model lacks.
        """
        self.check(prompts, slide=sampling.slide)
        samples, limit = sampling.num_samples, self.config.max_position_embeddings
        dtype = compute_dtype(self.config)
        # The model casts each weight where it is used, but routers, which compute in float32 at least;
        # done here it costs once, not at each token.
        model = merge_weights(
            self._structure,
            {n: w if n.endswith(ROUTER) else w.to(dtype) for n, w in weights.items()},
        )
        new: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
        ended = [""] * len(new)
        while not all(ended):
            texts = [[*prompts[row // samples], *new[row]] for row in range(len(new))]
            budgets = np.zeros(len(new), np.int32)
            windows = []
            for row, text in enumerate(texts):
                window = text if len(text) < limit else text[-(limit // 2) :]
                windows.append(window)
                if not ended[row]:
                    left = sampling.max_new_tokens - len(new[row])
                    budgets[row] = min(left, limit - len(window))
            # All samples of a prompt start alike, so their first window is read once.
            first = not any(new)
            found = self._run_windows(
                model,
                windows[::samples] if first else windows,
                texts,
                budgets,
                samples=samples if first else 1,
                sampling=sampling,
                eos_id=eos_id,
                token_numbers=[len(tokens) for tokens in new],
            )
            for row, (tokens, met_eos) in enumerate(found):
                new[row].extend(tokens)
                if ended[row]:
                    continue
                if met_eos:
                    ended[row] = "eos"
                elif len(new[row]) == sampling.max_new_tokens:
                    ended[row] = "length"
                elif not sampling.slide:
                    ended[row] = "context"
        rows = [Continuation(np.array(t, np.int32), e) for t, e in zip(new, ended, strict=True)]
        return [rows[start : start + samples] for start in range(0, len(rows), samples)]

    def check(self, prompts: Sequence[Sequence[int]], *, slide: bool) -> None:
        """Raise an `InputError` for a prompt that cannot be continued."""
        limit, vocab = self.config.max_position_embeddings, self.config.vocab_size
        for prompt in prompts:
            if len(prompt) == 0:
                raise InputError("A prompt holds no token. Begin it with bos.")
            outside = [int(token) for token in prompt if not 0 <= token < vocab]
            if outside:
                raise InputError(
                    f"The prompt holds token {outside[0]}, and model.vocab_size={vocab}. Use the "
                    "tokenizer that the model was trained with."
                )
            if len(prompt) >= limit and not slide:
                raise InputError(
                    f"The prompt has {len(prompt)} tokens, and model.max_position_embeddings="
                    f"{limit} leaves no room for a continuation. Use {limit - 1} tokens or fewer, "
                    "or add --slide to go on from the last part of it."
                )

    def _run_windows(
        self,
        model: Transformer,
        windows: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        budgets: np.ndarray,
        *,
        samples: int,
        sampling: SamplingConfig,
        eos_id: int,
        token_numbers: Sequence[int],
    ) -> list[tuple[list[int], bool]]:
        """Continue windows by at most `budgets` tokens: (new tokens, whether eos ended them)."""
        rows, device = len(texts), model.norm.weight.device
        lengths = np.array([len(window) for window in windows], np.int64)
        tokens = np.zeros((len(windows), lengths.max()), np.int64)
        for row, window in enumerate(windows):
            tokens[row, : len(window)] = window
        present = np.zeros((rows, self.config.vocab_size), bool)
        for row, text in enumerate(texts):
            present[row, text] = True
        found, counts, met_eos = _continue_rows(
            model,
            torch.from_numpy(tokens).to(device),
            torch.from_numpy(lengths).to(device),
            torch.from_numpy(present).to(device),
            torch.from_numpy(budgets).to(device),
            torch.tensor(token_numbers, device=device),
            eos_id,
            row_settings(sampling, rows=rows, device=device),
            slots=int((np.repeat(lengths, samples) + budgets).max()),
            samples=samples,
            known=self._known,
        )
        texts_found = zip(found.tolist(), counts.tolist(), met_eos.tolist(), strict=True)
        return [(row[:count], is_eos) for row, count, is_eos in texts_found]


def row_settings(sampling: SamplingConfig, *, rows: int, device: torch.device) -> RowSettings:
    """Spread one setting over `rows` rows that are the samples of prompts, side by side."""
    temperature = 0.0 if sampling.greedy else sampling.temperature

    def spread(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    return RowSettings(
        temperature=spread(temperature, torch.float32),
        top_k=spread(sampling.top_k, torch.int64),
        top_p=spread(sampling.top_p, torch.float32),
        repetition_penalty=spread(sampling.repetition_penalty, torch.float32),
        seed=spread(sampling.seed, torch.int64),
        sample_number=torch.arange(rows, device=device) % sampling.num_samples,
    )


def read_prompts(
    model: Transformer, tokens: Int[Tensor, "prompts width"], *, slots: int
) -> tuple[LayerCache, ...]:
    """Give the cache of right-padded prompts, with `slots` slots.

    Padding leaves garbage in the slots after a prompt; each is overwritten by the token of its
    position before any query sees it.
    """
    config, (prompts, width) = model.config, tokens.shape
    cache = empty_cache(
        config, batch=prompts, slots=slots, dtype=compute_dtype(config), device=tokens.device
    )
    positions = torch.arange(width, device=tokens.device)[None].expand(tokens.shape)
    cache = model.hidden(tokens, positions, cache=cache).cache
    assert cache is not None
    return cache


def _continue_rows(
    model: Transformer,
    tokens: Int[Tensor, "prompts width"],
    lengths: Int[Tensor, "prompts"],
    present: Bool[Tensor, "rows vocab"],
    budgets: Int[Tensor, "rows"],
    token_numbers: Int[Tensor, "rows"],
    eos_id: int,
    settings: RowSettings,
    *,
    slots: int,
    samples: int,
    known: int,
) -> tuple[Int[Tensor, "rows slots"], Int[Tensor, "rows"], Bool[Tensor, "rows"]]:
    """Read prompts once, then draw until each row has met eos or its budget of new tokens."""
    cache = tuple(
        LayerCache(*(x.repeat_interleave(samples, dim=0) for x in layer))
        for layer in read_prompts(model, tokens, slots=slots)
    )
    token = torch.take_along_dim(tokens, (lengths - 1)[:, None], dim=1)[:, 0]
    token, lengths = (x.repeat_interleave(samples, dim=0) for x in (token, lengths))
    every_row = torch.arange(lengths.shape[0], device=tokens.device)
    found = torch.zeros(lengths.shape[0], slots, dtype=torch.int64, device=tokens.device)
    counts, met_eos = torch.zeros_like(lengths), torch.zeros_like(lengths, dtype=torch.bool)
    done, step = budgets <= 0, 0
    while not bool(done.all()):
        # At step 0 this reads the last token of the prompt once more. A row that is done goes on
        # beside the others, in its last slot, and what it finds is not counted.
        positions = (lengths - 1 + step).clamp(max=slots - 1)[:, None]
        states = model.hidden(token[:, None], positions, cache=cache).states
        logits = model.logits(states)[:, 0]
        logits[:, known:] = -torch.inf
        token = next_tokens(
            logits,
            present=present,
            settings=settings,
            token_number=token_numbers + step,
        )
        present[every_row, token] = True
        found[:, step] = token
        counts += ~done
        met_eos |= ~done & (token == eos_id)
        step += 1
        done = done | met_eos | (step >= budgets)
    return found, counts, met_eos
