"""The tokens that both sides of a comparison read: plain rows, packed rows and a prompt."""

import dataclasses
from pathlib import Path

import numpy as np

from convert.bundle import Bundle
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError

LONGEST_ROW, LONGEST_PROMPT = 128, 16


@dataclasses.dataclass(frozen=True)
class Sample:
    """The tokens that both sides read."""

    rows: np.ndarray  # [2, tokens]
    batch: dict[str, np.ndarray]  # [4, tokens], several documents in a row, and padding
    prompt: list[int]
    text: str  # where they are from


def sample_of(bundle: Bundle, *, text: Path | None, prompt: str | None) -> Sample:
    """Choose the tokens: of a file, a text, toy stories or, without a tokenizer, drawn ones.

    Raises:
        InputError: the file cannot be read, or there is no tokenizer to read it with.
    """
    model, tokenizer = bundle.model, bundle.tokenizer
    width = min(LONGEST_ROW, model.max_position_embeddings)
    if tokenizer is None:
        if text is not None or prompt is not None:
            raise InputError(
                f"{bundle.layout['read_from']}: holds no tokenizer to read a text with. Name one "
                "with --tokenizer PATH, or leave --text and --prompt out."
            )
        numbers, origin = np.random.default_rng(0), "random tokens"
        ids = numbers.integers(0, model.vocab_size, 6 * (width + 1)).tolist()
    else:
        origin = "toy stories" if prompt is None else "the prompt"
        words = "\n".join(generate_stories(seed=0, start=0, stop=24)) if prompt is None else prompt
        if text is not None:
            words, origin = read_text(text), str(text)
        ids = tokenizer.encode(words, bos=True)
        if not words.strip():
            raise InputError(f"{origin}: holds no text. Give one of a few words at least.")
    begin = ids if prompt is not None else ids[:LONGEST_PROMPT]
    begin = begin[: max(1, model.max_position_embeddings // 2)]
    stream = np.resize(np.array(ids, np.int32), 6 * (width + 1))
    rows = np.ascontiguousarray(stream[: 2 * width].reshape(2, width))
    return Sample(rows, packed(stream[2 * width :], width), begin, origin)


def read_text(path: Path) -> str:
    """Read a text file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"--text {path}: {why}. Name a text file in UTF-8.") from None


def packed(stream: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """Make rows of one, two and three documents, and of two with padding after them."""
    half, third, quarter = (max(1, width // part) for part in (2, 3, 4))
    layouts = [[width], [third, width - third], [quarter, quarter, half], [quarter, third]]
    tokens, targets, positions, segments = (np.zeros((4, width), np.int32) for _ in range(4))
    taken = 0
    for row, lengths in enumerate(layouts):
        start = 0
        for number, length in enumerate(lengths, start=1):
            length = min(length, width - start)
            place = slice(start, start + length)
            tokens[row, place] = stream[taken : taken + length]
            targets[row, place] = stream[taken + 1 : taken + 1 + length]
            positions[row, place] = np.arange(length)
            segments[row, place] = number
            start, taken = start + length, taken + length
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": segments > 0,
        "positions": positions,
        "segment_ids": segments,
    }
