"""The pieces of a SentencePiece tokenizer, and llama2.c's tokenizer.bin that is made of them.

Source: karpathy/llama2.c, tokenizer.py (`export`).
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from tinyllm_jax.data.chat_template import CONTROL_TOKENS
from tinyllm_jax.data.sentencepiece_bpe import SPACE_MARK, SentencePieceTokenizer
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError

ODD_TEXTS = (
    "", " ", "  two spaces", "one  two   three", "\n\nline\n", "tab\there", "na\u00efve caf\u00e9",
    "\u65e5\u672c\u8a9e", "\U0001f642\U0001f642 smile", "......", "aaaaaaa", "x ", "\r\n", "e\u0301",
    "1234567", "\x00", "\ufb01ne",
)  # fmt: skip
# So many tokens of a vocabulary are tried by themselves.
MOST_TRIED = 1000


class Kind(IntEnum):
    """Kinds of pieces, with SentencePiece's numbers, which are also llama.cpp's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of a SentencePiece vocabulary."""

    text: str
    score: float
    kind: Kind


def pieces_of(tokenizer: SentencePieceTokenizer) -> list[Piece]:
    """List the vocabulary in the order of the ids."""
    return [Piece(row.piece, row.score, Kind(row.type)) for row in proto_of(tokenizer).pieces]


def puts_space_first(tokenizer: SentencePieceTokenizer) -> bool:
    """Tell whether a space is put before every text."""
    return proto_of(tokenizer).normalizer_spec.add_dummy_prefix


def normalises(tokenizer: Tokenizer) -> bool:
    """Tell a SentencePiece model that changes text before it cuts it."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    spec = proto_of(tokenizer).normalizer_spec
    return bool(spec.precompiled_charsmap) or spec.remove_extra_whitespaces


def note_of_normaliser(tokenizer: Tokenizer, who: str) -> str:
    """Say that others leave text as it is where this tokenizer does not, or nothing."""
    return f"{who} does not normalise text as this tokenizer does" if normalises(tokenizer) else ""


def sample_texts(tokenizer: Tokenizer) -> list[str]:
    """Choose texts in which another tokenizer shows: stories, odd ones, and tokens by themselves.

    Without a normaliser that a copy may lack: only texts that no normaliser changes.
    """
    tried = range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // MOST_TRIED))
    texts = [*generate_stories(seed=0, start=0, stop=4), *ODD_TEXTS]
    texts += [tokenizer.token_text(id) for id in tried]
    if normalises(tokenizer):
        return [text for text in texts if text.isascii() and text == " ".join(text.split())]
    return texts


def load_any_tokenizer(path: Path) -> Tokenizer:
    """Load a SentencePiece model, a tokenizer.json or llama2.c's tokenizer.bin, by content."""
    if path.is_file() and (rows := parse_tokenizer_bin(path.read_bytes())):
        return tokenizer_from_bin(rows, origin=str(path))
    return load_tokenizer(path)


def tokenizer_bin(tokenizer: SentencePieceTokenizer) -> bytes:
    """Write a vocabulary as run.c reads it: longest piece, then score, length and bytes of each."""
    rows = []
    for id, piece in enumerate(pieces_of(tokenizer)):
        text = piece.text
        if id == tokenizer.bos_id:
            text = "\n<s>\n"
        elif id == tokenizer.eos_id:
            text = "\n</s>\n"
        rows.append((piece.score, text.replace(SPACE_MARK, " ").encode()))
    longest = max(len(text) for _, text in rows)
    body = b"".join(struct.pack("<fI", score, len(text)) + text for score, text in rows)
    return struct.pack("<I", longest) + body


def parse_tokenizer_bin(content: bytes) -> list[tuple[float, bytes]] | None:
    """Read (score, bytes) of every token, or None where the bytes are no tokenizer.bin."""
    rows = []
    place = 4
    while place < len(content):
        if place + 8 > len(content):
            return None
        score, length = struct.unpack_from("<fI", content, place)
        rows.append((score, content[place + 8 : place + 8 + length]))
        place += 8 + length
    longest = max((len(text) for _, text in rows), default=0)
    whole = place == len(content) and len(content) >= 4
    return rows if whole and struct.unpack_from("<I", content)[0] == longest > 0 else None


def tokenizer_from_bin(
    rows: Sequence[tuple[float, bytes]], *, origin: str
) -> SentencePieceTokenizer:
    """Make a SentencePiece model of llama2.c's table; the kinds of pieces are told by their text.

    The ids and what every text becomes are the same; the file's bytes, and so its hash, are not.
    """
    pieces = []
    for score, content in rows:
        text = content.decode("utf-8", errors="replace").replace(" ", SPACE_MARK)
        text = {"\n<s>\n": "<s>", "\n</s>\n": "</s>"}.get(text, text)
        pieces.append(Piece(text, score, _kind_by_text(text)))
    texts = [piece.text for piece in pieces]
    if "<s>" not in texts or "</s>" not in texts:
        raise InputError(
            f"{origin}: no tokenizer.bin that llama2.c wrote, whose tokens <s> and </s> are named "
            "so. Give the SentencePiece .model instead."
        )
    return build_sentencepiece(pieces, space_first=True, origin=origin)


def build_sentencepiece(
    pieces: Sequence[Piece], *, space_first: bool, origin: str
) -> SentencePieceTokenizer:
    """Put a SentencePiece BPE model together that leaves text as it is, as llama2.c and GGUF do.

    Args:
        space_first: A space is put before every text.
    """
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for piece in pieces:
        proto.pieces.add(piece=piece.text, score=piece.score, type=int(piece.kind))
    texts = [piece.text for piece in pieces]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = 2  # BPE
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = any(piece.kind == Kind.BYTE for piece in pieces)
    for field, text in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
        setattr(trainer, f"{field}_id", texts.index(text) if text in texts else -1)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = space_first
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return SentencePieceTokenizer(proto.SerializeToString(), origin=origin)


def _kind_by_text(text: str) -> Kind:
    if text == "<unk>":
        return Kind.UNKNOWN
    if text in ("<s>", "</s>", "<pad>", *CONTROL_TOKENS):
        return Kind.CONTROL
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return Kind.BYTE if is_byte else Kind.NORMAL


def proto_of(tokenizer: SentencePieceTokenizer) -> Any:
    """Read a model file's own fields."""
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.to_bytes())
    return proto
