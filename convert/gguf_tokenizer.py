"""Tokenizers inside GGUF files.

A SentencePiece vocabulary is held as pieces and scores. A byte-level one is held as llama.cpp reads
it, tokens and merges, and whole as well: `tokenizer.huggingface.json` is GGUF's own key for that.

Source: ggml-org/ggml, docs/gguf.md ("Tokenizer"); ggml-org/llama.cpp, src/llama-vocab.cpp (cuts by
the name in `tokenizer.ggml.pre`).
"""

import json
from collections.abc import Mapping
from typing import Any

from convert.bundle import Bundle
from convert.hugging_face_tokenizer import chat_template_of
from convert.tokenizer_files import (
    Kind,
    Piece,
    build_sentencepiece,
    note_of_normaliser,
    pieces_of,
    puts_space_first,
)
from tinyllm_jax.data.bytelevel import ByteLevelTokenizer
from tinyllm_jax.data.sentencepiece_bpe import SPACE_MARK, SentencePieceTokenizer
from tinyllm_jax.data.tokenizer import Tokenizer
from tinyllm_jax.errors import InputError

WHOLE = "tokenizer.huggingface.json"
# What llama.cpp calls the cut that the library's `ByteLevel` makes, and Llama 3's.
GPT_2 = ("gpt-2", "gpt2")
LLAMA_3 = ("llama-bpe", "llama3", "llama-v3")
LLAMA_3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def add_tokenizer(writer: Any, bundle: Bundle) -> None:
    """Add a bundle's tokenizer to a file that is being written."""
    tokenizer = bundle.tokenizer
    assert tokenizer is not None
    rows = bundle.model.vocab_size
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = pieces_of(tokenizer)
        pieces += [Piece(f"[PAD{id}]", -1000.0, Kind.UNUSED) for id in range(len(pieces), rows)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([piece.text for piece in pieces])
        writer.add_token_scores([piece.score for piece in pieces])
        writer.add_token_types([int(piece.kind) for piece in pieces])
        writer.add_add_space_prefix(puts_space_first(tokenizer))
        if note := note_of_normaliser(tokenizer, "llama.cpp"):
            bundle.note(note)
    else:
        _add_byte_level(writer, bundle, rows)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.unk_id >= 0:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    if (template := chat_template_of(tokenizer)) is not None:
        writer.add_eot_token_id(template.end_id)
        writer.add_chat_template(template.jinja)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _add_byte_level(writer: Any, bundle: Bundle, rows: int) -> None:
    """Add a byte-level BPE vocabulary under the name of the cut it makes, GPT-2's.

    llama.cpp has no normaliser, so text that NFKC would change gets other tokens there.
    """
    assert bundle.tokenizer is not None
    text = bundle.tokenizer.to_bytes().decode("utf-8-sig")
    table = json.loads(text)
    if table["model"].get("type") != "BPE":
        raise InputError(
            f"tokenizer.json: {table['model'].get('type')} has no form in GGUF. Add --tokenizer "
            "none to leave the tokenizer out."
        )
    tokens = {id: text for text, id in table["model"]["vocab"].items()}
    added = {row["id"]: row for row in table.get("added_tokens", ())}
    tokens |= {id: row["content"] for id, row in added.items()}
    kinds = [
        Kind.UNUSED
        if id not in tokens
        else Kind.NORMAL
        if id not in added
        else Kind.CONTROL
        if added[id].get("special")
        else Kind.USER_DEFINED
        for id in range(rows)
    ]
    merges = [row if isinstance(row, str) else " ".join(row) for row in table["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(id, f"[PAD{id}]") for id in range(rows)])
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(merges)
    writer.add_string(WHOLE, text)
    cut = table.get("pre_tokenizer") or {}
    if cut.get("type") != "ByteLevel" or not cut.get("use_regex", True):
        bundle.note("llama.cpp will cut text as GPT-2 does, which this tokenizer does not")
    if table.get("normalizer"):
        bundle.note("llama.cpp does not normalise text as this tokenizer does (NFKC)")


def read_tokenizer(fields: Mapping[str, Any], bundle: Bundle, *, origin: str) -> Tokenizer | None:
    """Make the tokenizer of a file's settings, or note why there is none.

    Raises:
        InputError: the settings of the tokenizer do not fit together.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind is None:
        return None
    try:
        if kind == "llama":
            tokenizer: Tokenizer | None = _sentencepiece(fields, origin=origin)
        elif isinstance(fields.get(WHOLE), str):
            tokenizer = ByteLevelTokenizer(fields[WHOLE].encode(), origin=f"{origin}, {WHOLE}")
        elif kind == "gpt2":
            tokenizer = _byte_level(fields, bundle, origin=origin)
        else:
            bundle.note(f"a tokenizer of kind {kind} is not read; --tokenizer PATH gives one")
            return None
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{origin}: its tokenizer cannot be read ({error!r}). Add --tokenizer PATH with the one "
            "it was trained with, or --tokenizer none."
        ) from None
    for name in ("bos", "eos") if tokenizer else ():
        stated = fields.get(f"tokenizer.ggml.{name}_token_id")
        if stated is not None and stated != getattr(tokenizer, f"{name}_id"):
            bundle.note(f"the file calls token {stated} its {name}, and "
                        f"{getattr(tokenizer, f'{name}_id')} is taken, by its text")  # fmt: skip
    return tokenizer


def _sentencepiece(fields: Mapping[str, Any], *, origin: str) -> SentencePieceTokenizer:
    rows = zip(
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.scores"],
        fields["tokenizer.ggml.token_type"],
        strict=True,
    )
    pieces = [Piece(text.replace(" ", SPACE_MARK), score, Kind(kind)) for text, score, kind in rows]
    first = fields.get("tokenizer.ggml.add_space_prefix", True)
    return build_sentencepiece(pieces, space_first=first is True, origin=origin)


def _byte_level(fields: Mapping[str, Any], bundle: Bundle, *, origin: str) -> Tokenizer | None:
    """Put a tokenizer.json together of a vocabulary whose cut is known here."""
    cut = fields.get("tokenizer.ggml.pre")
    level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if cut in GPT_2:
        pre = level | {"use_regex": True}
    elif cut in LLAMA_3:
        pattern = {"Regex": LLAMA_3_CUT}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        pre = {"type": "Sequence", "pretokenizers": [split, level | {"use_regex": False}]}
    else:
        bundle.note(
            f"the file's tokenizer was left out: it cuts text as {cut}, which is not known here; "
            "--tokenizer PATH gives its tokenizer.json"
        )
        return None
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = [Kind(kind) for kind in fields.get("tokenizer.ggml.token_type", [1] * len(tokens))]
    rows = list(enumerate(zip(tokens, kinds, strict=True)))
    while rows and rows[-1][1][1] == Kind.UNUSED:  # rows that pad the embedding
        rows.pop()
    vocab = {text: id for id, (text, _) in rows}
    if len(vocab) < len(rows):
        raise ValueError("two tokens have the same text")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": id, "content": text, "special": kind == Kind.CONTROL, **plain}
        for id, (text, kind) in rows
        if kind in (Kind.CONTROL, Kind.USER_DEFINED)
    ]
    table = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [row.split(" ", 1) for row in fields.get("tokenizer.ggml.merges", [])],
            # Llama 3's takes a piece whole where it is a token, whatever the merges would make.
            "ignore_merges": cut in LLAMA_3,
        },
    }
    return ByteLevelTokenizer(json.dumps(table, ensure_ascii=False).encode(), origin=origin)
