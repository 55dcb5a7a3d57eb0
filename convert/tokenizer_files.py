"""A SentencePiece tokenizer in the forms of others: tokenizer.json, llama2.c's tokenizer.bin.

Source: karpathy/llama2.c, tokenizer.py (`export`); huggingface/transformers,
convert_slow_tokenizer.py (`SpmConverter`).
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from tinyllm_jax.data.bytelevel import ByteLevelTokenizer
from tinyllm_jax.data.sentencepiece_bpe import SPACE_MARK, SentencePieceTokenizer
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError

# What a tokenizer.json says where nothing is put round a text.
NO_TEMPLATE = b'"post_processor": null'


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
    return [Piece(row.piece, row.score, Kind(row.type)) for row in _proto(tokenizer).pieces]


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
    return build_sentencepiece(pieces, origin=origin)


def build_sentencepiece(pieces: Sequence[Piece], *, origin: str) -> SentencePieceTokenizer:
    """Put a SentencePiece BPE model together that leaves text as it is, as llama2.c and GGUF do."""
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
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return SentencePieceTokenizer(proto.SerializeToString(), origin=origin)


def write_hugging_face_tokenizer(tokenizer: Tokenizer, path: Path, *, longest: int) -> None:
    """Write the files that `AutoTokenizer.from_pretrained` reads offline.

    A SentencePiece tokenizer becomes its own `tokenizer.model` and a `tokenizer.json` that gives
    the same ids; a byte-level one keeps its `tokenizer.json`. Both put bos before a text, as
    training did, unless the byte-level file says itself what stands round a text.
    """
    tokenizer.save(path)
    if isinstance(tokenizer, ByteLevelTokenizer):
        content = tokenizer.to_bytes().replace(NO_TEMPLATE, bos_template(tokenizer), 1)
        (path / tokenizer.file_name).write_bytes(content)
    if isinstance(tokenizer, SentencePieceTokenizer):
        (path / "tokenizer.json").write_text(sentencepiece_json(tokenizer), encoding="utf-8")
    names = {
        f"{field}_token": tokenizer.token_text(id).replace(" ", SPACE_MARK)
        for field in ("bos", "eos", "unk", "pad")
        if (id := getattr(tokenizer, f"{field}_id")) >= 0
    }
    table = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        **names,
    }
    text = json.dumps(table, indent=2, ensure_ascii=False)
    (path / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def bos_template(tokenizer: Tokenizer) -> bytes:
    """Write what puts bos before a text, in place of `NO_TEMPLATE` of a tokenizer.json."""
    bos = tokenizer.token_text(tokenizer.bos_id)
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    pair = {"Sequence": {"id": "B", "type_id": 1}}
    table = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, pair],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }
    return NO_TEMPLATE.replace(b"null", json.dumps(table).encode())


def read_hugging_face_tokenizer(path: Path) -> Tokenizer:
    """Load a folder's tokenizer, without the template that was put into it on the way out.

    So a byte-level tokenizer keeps its bytes, and the hash that training knows it by.
    """
    tokenizer = load_tokenizer(path)
    content = tokenizer.to_bytes()
    template = bos_template(tokenizer)
    if isinstance(tokenizer, ByteLevelTokenizer) and template in content:
        plain = content.replace(template, NO_TEMPLATE, 1)
        return ByteLevelTokenizer(plain, origin=str(path / tokenizer.file_name))
    return tokenizer


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> str:
    """Write a SentencePiece BPE model as a tokenizer.json that gives the same ids.

    Raises:
        InputError: the model is no BPE model.
    """
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Fast

    proto = _proto(tokenizer)
    if proto.trainer_spec.model_type != 2:
        raise InputError(
            "tokenizer.model: a SentencePiece model that is not BPE has no tokenizer.json. Add "
            "--tokenizer none to leave the tokenizer out."
        )
    pieces = pieces_of(tokenizer)
    vocabulary = {piece.text: id for id, piece in enumerate(pieces)}
    unk = pieces[tokenizer.unk_id].text
    fast: Any = Fast(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(pieces),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=any(piece.kind == Kind.BYTE for piece in pieces),
        )
    )
    _set_pipeline(fast, tokenizer, proto)
    controls = [piece.text for piece in pieces if piece.kind in (Kind.CONTROL, Kind.UNKNOWN)]
    fast.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in controls])
    defined = [piece.text for piece in pieces if piece.kind == Kind.USER_DEFINED]
    fast.add_tokens(
        [AddedToken(text.replace(SPACE_MARK, " "), normalized=False) for text in defined]
    )
    return fast.to_str(pretty=True)


def merges_of(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """List the pairs that make a piece, best first.

    SentencePiece joins the pair whose piece has the highest score, so every way to split a piece
    gets that piece's place.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == Kind.NORMAL}
    found = []
    for text, score in scores.items():
        for place in range(1, len(text)):
            left, right = text[:place], text[place:]
            if left in scores and right in scores:
                found.append((score, left, right))
    return [(left, right) for _, left, right in sorted(found, key=lambda row: -row[0])]


def _set_pipeline(fast: Any, tokenizer: SentencePieceTokenizer, proto: Any) -> None:
    """Do to text what the model's normaliser does, and undo it when decoding."""
    from tokenizers import Regex, decoders, normalizers, processors

    spec = proto.normalizer_spec
    before: list[Any] = []
    if spec.precompiled_charsmap:
        before.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        before.append(normalizers.Prepend(SPACE_MARK))
    before.append(normalizers.Replace(" ", SPACE_MARK))
    fast.normalizer = normalizers.Sequence(before)
    after: list[Any] = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        after.append(decoders.Strip(content=" ", left=1))
    fast.decoder = decoders.Sequence(after)
    bos = tokenizer.token_text(tokenizer.bos_id)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)]
    )


def _kind_by_text(text: str) -> Kind:
    if text == "<unk>":
        return Kind.UNKNOWN
    if text in ("<s>", "</s>", "<pad>"):
        return Kind.CONTROL
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return Kind.BYTE if is_byte else Kind.NORMAL


def _proto(tokenizer: SentencePieceTokenizer) -> Any:
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.to_bytes())
    return proto
