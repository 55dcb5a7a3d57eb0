"""Text to token ids and back, behind one interface for both kinds of tokenizer."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, SupportsIndex, runtime_checkable

from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data import bytelevel, sentencepiece_bpe
from tinyllm_jax.errors import InputError

# What a folder with a tokenizer holds one of.
FILE_NAMES = (sentencepiece_bpe.FILE_NAME, bytelevel.FILE_NAME)


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer offers. `pad_id` may be `unk_id`: rows are masked by length, not by id.

    Control tokens (`<s>`, `</s>`, `<pad>`, ...) come only from ids, never from text: the text
    "</s>" is encoded as the four characters it is.
    """

    kind: str
    vocab_size: int
    pad_id: int
    unk_id: int  # -1 where the tokenizer has none
    bos_id: int
    eos_id: int
    hash: str  # sha256 of the tokenizer file
    file_name: str

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Turn text into ids, with bos before and eos after where asked."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into ids in one library call, without bos and eos."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Turn ids into text: stop at the first eos; pad, bos and other control tokens stay out."""
        ...

    def token_text(self, id: int) -> str:
        """Show one token to a person; a byte that is no text by itself shows as `<0xE2>`."""
        ...

    def control_id(self, text: str) -> int | None:
        """Look up the control token of this name; None where there is none."""
        ...

    def to_bytes(self) -> bytes:
        """Give the tokenizer file."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the tokenizer file into a folder, whole or not at all, and name it."""
        ...


def train_tokenizer(
    documents: Iterable[str], *, config: TokenizerConfig, vocab_size: int
) -> Tokenizer:
    """Train a tokenizer of the configured kind; the same documents give the same bytes.

    Raises:
        InputError: the text allows fewer tokens than asked, needs more, or there is none.
    """
    if config.kind == "sentencepiece":
        return sentencepiece_bpe.train(
            documents,
            vocab_size=vocab_size,
            character_coverage=config.character_coverage,
            max_sentences=config.max_sentences,
        )
    return bytelevel.train(documents, vocab_size=vocab_size, min_frequency=config.min_frequency)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer file, or the one in a folder; what it holds decides the kind, not its name.

    A folder with both files gives `tokenizer.model`.

    Raises:
        InputError: there is no such file, or it is neither kind.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise InputError(
                f"{path}: no tokenizer in this folder. Give one that holds {' or '.join(FILE_NAMES)}."
            )
        path = found[0]
    if not path.is_file():
        raise InputError(
            f"{path}: no such tokenizer file. Give a SentencePiece .model or a tokenizer.json."
        )
    content = path.read_bytes()
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return bytelevel.ByteLevelTokenizer(content, origin=str(path))
    return sentencepiece_bpe.SentencePieceTokenizer(content, origin=str(path))


def extend_tokenizer(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """Put control tokens behind the vocabulary; every text keeps the ids that it has.

    Those that the tokenizer has already are not added again, and with all of them it is given back
    as it is.

    Raises:
        InputError: a token is there already as one that text can become.
    """
    missing = [text for text in tokens if tokenizer.control_id(text) is None]
    if not missing:
        return tokenizer
    if isinstance(tokenizer, sentencepiece_bpe.SentencePieceTokenizer):
        extended: Tokenizer = sentencepiece_bpe.extend(tokenizer, missing)
    else:
        assert isinstance(tokenizer, bytelevel.ByteLevelTokenizer)
        extended = bytelevel.extend(tokenizer, missing)
    places = range(tokenizer.vocab_size, extended.vocab_size)
    assert [extended.control_id(text) for text in missing] == list(places)
    return extended


def check_tokenizer_hash(tokenizer: Tokenizer, *, expected: str, origin: str) -> None:
    """Refuse a tokenizer that is not the one something was made with.

    Args:
        expected: Hash of the tokenizer that `origin` was made with.
        origin: What was made with it, such as a checkpoint's path; starts the message.

    Raises:
        InputError: the hashes differ; both stand in the message.
    """
    if tokenizer.hash != expected:
        raise InputError(
            f"{origin}: made with the tokenizer {expected}, this one is {tokenizer.hash}, and the "
            "same ids mean other text. Use the tokenizer file that lies beside it."
        )
