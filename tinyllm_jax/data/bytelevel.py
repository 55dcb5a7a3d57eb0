"""Byte-level BPE of Hugging Face `tokenizers`: the tokenizer of Tiny-K, MiniMind and GPT-2."""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tinyllm_jax.data.files import write_file
from tinyllm_jax.data.text import require_unicode, text_ids
from tinyllm_jax.errors import InputError

FILE_NAME = "tokenizer.json"
# Tiny-K's control tokens, with ids 0 to 4.
CONTROL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CONVERSATION_NAMES = ("<|im_start|>", "<|im_end|>")
# How the tokenizers of other projects name begin and end, likeliest meaning first.
BEGIN_END_NAMES = [
    ("<s>", "</s>"),
    CONVERSATION_NAMES,
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("[BOS]", "[EOS]"),
    ("<|endoftext|>", "<|endoftext|>"),
]
PAD_NAMES = ["<pad>", "[PAD]", "<|pad|>", "<unk>", "[UNK]", "<|endoftext|>"]
UNK_NAMES = ["<unk>", "[UNK]"]


class ByteLevelTokenizer:
    """A `tokenizer.json`; every byte has a token, so nothing is out of vocabulary.

    `decode(encode(text))` is the text after the file's normaliser: NFKC for those trained here,
    which makes one of characters that mean the same ("ﬁ" and "fi").
    """

    kind = "bytelevel"
    file_name = FILE_NAME

    def __init__(self, content: bytes, *, origin: str):
        """Read a tokenizer.json's bytes; `origin` names it in messages."""
        self._content, self._origin = content, origin
        self._tokenizer = parse(content, origin=origin)
        self.hash = hashlib.sha256(content).hexdigest()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        pairs = [pair for pair in BEGIN_END_NAMES if pair[0] in ids and pair[1] in ids]
        if not pairs:
            usual = ", ".join(f"{begin} {end}" for begin, end in BEGIN_END_NAMES)
            raise InputError(
                f"{origin}: no tokens that begin and end a document; looked for {usual}. Use a "
                "tokenizer that has such a pair."
            )
        # Tokens that were put behind a vocabulary for conversations begin and end no document of a
        # model that was pretrained before.
        own = self._tokenizer.get_vocab(with_added_tokens=False)
        pairs.sort(key=lambda pair: pair == CONVERSATION_NAMES and pair[0] not in own)
        self.bos_id, self.eos_id = (ids[name] for name in pairs[0])
        self.unk_id = next((ids[name] for name in UNK_NAMES if name in ids), -1)
        self.pad_id = next((ids[name] for name in PAD_NAMES if name in ids), self.eos_id)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Turn text into ids, with bos before and eos after where asked."""
        ids = self.encode_batch([text])[0]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into ids, about 5 MB/s on one core, without bos and eos."""
        for text in texts:
            require_unicode(text)
        # A file may ask for bos and eos of its own (`post_processor`); they are added by name here.
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except BaseException as error:
            self._refuse_broken(error)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Turn ids into text: stop at the first eos, leave control tokens out."""
        kept = text_ids(
            ids,
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            left_out={self.bos_id, self.pad_id},
        )
        try:
            return self._tokenizer.decode(kept, skip_special_tokens=True)
        except BaseException as error:
            self._refuse_broken(error)
            raise

    def _refuse_broken(self, error: BaseException) -> None:
        """Tell what the library complains about from any other exception.

        A file of which it can make no sense only when it is used ends in a bare `Exception`, or in a
        panic of Rust, which is a `BaseException`.
        """
        if type(error) is Exception or is_panic(error):
            raise InputError(
                f"{self._origin}: this tokenizer.json contradicts itself ({error}). Use another one."
            ) from None

    def token_text(self, id: int) -> str:
        """Show one token to a person; bytes that are no text by themselves show as `<0xE2>`."""
        token = self._tokenizer.id_to_token(id)
        if token is None:  # some files skip ids
            return f"<{id}>"
        if id in self._tokenizer.get_added_tokens_decoder():
            return token
        raw = b"".join(BYTE_OF.get(letter, letter.encode()) for letter in token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in raw)

    def control_id(self, text: str) -> int | None:
        """Look up the control token of this name; None where there is none."""
        id = self._tokenizer.token_to_id(text)
        added = self._tokenizer.get_added_tokens_decoder()
        return id if id in added and added[id].special else None

    def tokens(self) -> set[str]:
        """List all tokens, control tokens included."""
        return {*self._tokenizer.get_vocab(with_added_tokens=True)}

    def to_bytes(self) -> bytes:
        """Give the tokenizer.json."""
        return self._content

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.json` into a folder, whole or not at all."""
        path = Path(folder) / FILE_NAME
        write_file(path, self._content)
        return path


def parse(content: bytes, *, origin: str) -> Tokenizer:
    """Read a tokenizer.json so that control tokens in a text stay text, and all of it is kept."""
    try:
        text = content.decode("utf-8-sig")
        check_maps(text)
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise InputError(
            f"{origin}: no tokenizer.json that this version of tokenizers reads ({error}). Give "
            "one, or a SentencePiece .model."
        ) from None
    # The file cannot say so, and without it a story with "</s>" in it would end there.
    tokenizer.encode_special_tokens = True
    # Files saved after training another model may ask for both.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def is_panic(error: BaseException) -> bool:
    """Tell what the library raises where its code in Rust gives up: it has no class to import."""
    return type(error).__name__ == "PanicException"


def check_maps(text: str) -> None:
    """Refuse a tokenizer.json with a map of characters that says it is larger than it is.

    The library would ask for that much memory, up to 4 GiB, and end the process where there is less.

    Raises:
        ValueError: there is one.
    """
    if '"precompiled_charsmap"' not in text:
        return

    def check(table: dict[str, Any]) -> dict[str, Any]:
        if isinstance(packed := table.get("precompiled_charsmap"), str):
            content = base64.b64decode(packed)
            size = int.from_bytes(content[:4], "little")
            if not 0 < size <= len(content) - 4 or size % 4:
                raise ValueError("its precompiled_charsmap is damaged")
        return table

    json.loads(text, object_hook=check)


def train(documents: Iterable[str], *, vocab_size: int, min_frequency: int) -> ByteLevelTokenizer:
    """Train as Tiny-K does: NFKC, no space before the text, a token for each of the 256 bytes.

    Raises:
        InputError: the text gives fewer tokens than asked, or bytes and control tokens need more.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(CONTROL_TOKENS)
    if vocab_size < smallest:
        raise InputError(
            f"model.vocab_size={vocab_size} is less than the {smallest} bytes and control tokens. "
            f"Use --model.vocab_size {smallest} or more."
        )
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(checked(documents), trainer)
    if (reached := tokenizer.get_vocab_size()) < vocab_size:
        raise InputError(
            f"model.vocab_size={vocab_size} is more than this text gives tokens for: {reached} "
            f"with tokenizer.min_frequency={min_frequency}. Use --model.vocab_size {reached} or "
            "less, or give more text."
        )
    return ByteLevelTokenizer(tokenizer.to_str(pretty=True).encode(), origin=FILE_NAME)


def extend(tokenizer: ByteLevelTokenizer, tokens: Sequence[str]) -> ByteLevelTokenizer:
    """Append special tokens to a tokenizer.json.

    Raises:
        InputError: a token is an ordinary one already, or the file skips ids, and the library gives
            a new token the first id that is free.
    """
    try:
        table = json.loads(tokenizer.to_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # Rust's JSON takes numbers of any length
        raise InputError(f"{FILE_NAME}: cannot be extended ({error}). Use another one.") from None
    added = table["added_tokens"] = table.get("added_tokens") or []
    known = tokenizer.tokens()
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for id, text in enumerate(tokens, tokenizer.vocab_size):
        if text in known:
            raise InputError(
                f"{FILE_NAME}: {text} is an ordinary token of this file, so a text could hold it. "
                'Mark it as "special", or use another tokenizer.'
            )
        added.append({"id": id, "content": text, **plain, "special": True})
    content = json.dumps(table, indent=2, ensure_ascii=False).encode()
    extended = ByteLevelTokenizer(content, origin=FILE_NAME)
    for id, text in enumerate(tokens, tokenizer.vocab_size):
        if extended.control_id(text) != id:
            raise InputError(
                f"{FILE_NAME}: the ids of its tokens have gaps, so {text} cannot stand behind them. "
                "Use another tokenizer."
            )
    return extended


def checked(documents: Iterable[str]) -> Iterator[str]:
    """Pass documents on, refusing what is no Unicode text."""
    for document in documents:
        require_unicode(document)
        yield document


def byte_letters() -> dict[str, bytes]:
    """Map the printable letter that byte-level BPE writes for a byte to that byte.

    Source:
        Radford et al. 2019 (GPT-2), `bytes_to_unicode`: printable Latin-1 stands for itself, the
        other bytes for U+0100 onwards.
    """
    printable = [byte for byte in range(256) if re.match(r"[!-~¡-¬®-ÿ]", chr(byte))]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(0x100 + place): bytes([byte]) for place, byte in enumerate(others)}


BYTE_OF = byte_letters()
