"""Tokenizers in Hugging Face folders: what `AutoTokenizer.from_pretrained` reads offline.

Source: huggingface/transformers, convert_slow_tokenizer.py (`SpmConverter`).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.tokenizer_files import Kind, Piece, pieces_of, proto_of, sample_texts
from tinyllm_jax.data.bytelevel import ByteLevelTokenizer
from tinyllm_jax.data.chat_template import CONTROL_TOKENS, ChatTemplate
from tinyllm_jax.data.sentencepiece_bpe import SPACE_MARK, SentencePieceTokenizer
from tinyllm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tinyllm_jax.errors import InputError

# The key of a tokenizer.json that says what is put round a text.
TEMPLATE = "post_processor"


def write_hugging_face_tokenizer(tokenizer: Tokenizer, path: Path, *, longest: int) -> list[str]:
    """Write the files that `AutoTokenizer.from_pretrained` reads offline.

    A SentencePiece tokenizer becomes its own `tokenizer.model` and a `tokenizer.json` that gives
    the same ids; a byte-level one keeps its `tokenizer.json`. Both put bos before a text, as
    training did, unless the byte-level file says itself what stands round a text. One that has the
    control tokens of conversations comes with their template.

    Returns:
        What a person should know of them.
    """
    notes = []
    tokenizer.save(path)
    if isinstance(tokenizer, ByteLevelTokenizer):
        (path / tokenizer.file_name).write_bytes(with_template(tokenizer))
    if isinstance(tokenizer, SentencePieceTokenizer):
        text = sentencepiece_json(tokenizer)
        (path / "tokenizer.json").write_text(text, encoding="utf-8")
        notes = _differences(tokenizer, text)
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
    if (template := chat_template_of(tokenizer)) is not None:
        table["chat_template"] = template.jinja
    text = json.dumps(table, indent=2, ensure_ascii=False)
    (path / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return notes


def chat_template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Give the template of conversations of a tokenizer that has control tokens for it."""
    if any(tokenizer.control_id(text) is None for text in CONTROL_TOKENS):
        return None
    return ChatTemplate(tokenizer)


def end_ids(tokenizer: Tokenizer) -> int | list[int]:
    """Name the tokens that end what a model writes: eos, and what ends an answer."""
    template = chat_template_of(tokenizer)
    if template is None or template.end_id == tokenizer.eos_id:
        return tokenizer.eos_id
    return [tokenizer.eos_id, template.end_id]


def with_template(tokenizer: ByteLevelTokenizer) -> bytes:
    """Give a tokenizer.json that puts bos before a text, every other byte of it unchanged.

    A file that says itself what stands round a text stays as it is.
    """
    content = tokenizer.to_bytes()
    text = content.decode("utf-8-sig")
    place = value_of(text, TEMPLATE)
    if place is None:
        start = text.index("{") + 1
        return f'{text[:start]}"{TEMPLATE}": {bos_template(tokenizer)}, {text[start:]}'.encode()
    if text[place] != "null":
        return content
    return f"{text[: place.start]}{bos_template(tokenizer)}{text[place.stop :]}".encode()


def read_hugging_face_tokenizer(path: Path) -> Tokenizer:
    """Load a folder's tokenizer, without the template that was put into it on the way out.

    So a byte-level tokenizer keeps its bytes, and the hash that training knows it by.
    """
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, ByteLevelTokenizer):
        return tokenizer
    text = tokenizer.to_bytes().decode("utf-8-sig")
    place = value_of(text, TEMPLATE)
    if place is None or text[place] != bos_template(tokenizer):
        return tokenizer
    plain = f"{text[: place.start]}null{text[place.stop :]}".encode()
    return ByteLevelTokenizer(plain, origin=str(path / tokenizer.file_name))


def bos_template(tokenizer: Tokenizer) -> str:
    """Write what puts bos before a text, as a tokenizer.json has it."""
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
    return json.dumps(table)


def value_of(text: str, key: str) -> slice | None:
    """Find where the value of a key of the outermost table stands in a JSON text."""
    decoder = json.JSONDecoder()
    place = text.index("{") + 1
    while text[place := _skip(text, place)] != "}":
        name, place = decoder.raw_decode(text, place)
        start = _skip(text, place)
        _, place = decoder.raw_decode(text, start)
        if name == key:
            return slice(start, place)
    return None


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> str:
    """Write a SentencePiece BPE model as a tokenizer.json that gives the same ids.

    Raises:
        InputError: the model is no BPE model.
    """
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Fast

    proto = proto_of(tokenizer)
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


def _skip(text: str, place: int) -> int:
    """Go over what may stand between the keys and values of a table."""
    while text[place] in " \t\r\n,:":
        place += 1
    return place


def _differences(tokenizer: SentencePieceTokenizer, text: str) -> list[str]:
    """Say for which texts a tokenizer.json gives other ids than the model that it was made of."""
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_str(text)
    # A control token in a text is one there, and plain text here.
    controls = [p.text for p in pieces_of(tokenizer) if p.kind in (Kind.CONTROL, Kind.UNKNOWN)]
    texts = [text for text in sample_texts(tokenizer) if not any(c in text for c in controls if c)]
    found = fast.encode_batch(texts, add_special_tokens=False)
    wanted = tokenizer.encode_batch(texts)
    other = [text for text, one, ids in zip(texts, found, wanted, strict=True) if one.ids != ids]
    if not other:
        return []
    return [
        f"tokenizer.json gives other ids than tokenizer.model for {len(other)} of {len(texts)} texts "
        f"that were tried, such as {other[0][:40]!r}; transformers reads the first"
    ]
