"""SentencePiece BPE with byte fallback: the tokenizer of TinyLLM, llama2.c and Llama."""

import hashlib
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import sentencepiece

from tinyllm_jax.data.files import write_file
from tinyllm_jax.data.text import require_unicode, text_ids
from tinyllm_jax.errors import InputError
from tinyllm_jax.host import available_cores

FILE_NAME = "tokenizer.model"
# SentencePiece writes a space as this character, so the character itself needs care.
SPACE_MARK = "\u2581"
# SentencePiece leaves training lines of more than 4,192 bytes out; 1,000 characters always fit.
LONGEST_LINE = 1000
# Threads have to be started: two encode 4 texts of 60 characters in 1.16 times the time of one, 16 in 0.78 of it.
MANY_TEXTS = 16
# What Hugging Face's tokenizers takes for no in TOKENIZERS_PARALLELISM.
OFF = ("", "off", "false", "f", "no", "n", "0")


class SentencePieceTokenizer:
    """A SentencePiece model; `decode(encode(text)) == text` for any text where it has bytes.

    That holds for models trained here and for Llama's. Another model may normalise text or lack
    byte tokens, and then loses what it was made to lose.
    """

    kind = "sentencepiece"
    file_name = FILE_NAME

    def __init__(self, content: bytes, *, origin: str):
        """Read a model file's bytes; `origin` names it in messages."""
        self._content = content
        self._processor = processor = sentencepiece.SentencePieceProcessor()
        neither = f"{origin}: neither a SentencePiece model nor a tokenizer.json. Give one of them."
        try:
            processor.LoadFromSerializedProto(content)
        except (RuntimeError, UnicodeDecodeError):  # the second: what it complains about is no text
            raise InputError(neither) from None
        self.vocab_size = processor.vocab_size()
        if not self.vocab_size:  # an empty file is a valid message of nothing
            raise InputError(neither)
        self.hash = hashlib.sha256(content).hexdigest()
        self.unk_id = processor.unk_id()
        self.bos_id = processor.bos_id()
        self.eos_id = processor.eos_id()
        for name, id in (("bos", self.bos_id), ("eos", self.eos_id)):
            if id < 0:
                raise InputError(
                    f"{origin}: this SentencePiece model has no {name} token, and every document "
                    f"needs one. Train it with --{name}_id, or use another tokenizer."
                )
        # What the library gives for a piece that is not there, whatever the model says of it.
        absent = processor.piece_to_id("\0 no such piece")
        special = (absent, self.unk_id, self.bos_id, self.eos_id)
        if min(special) < 0 or max(special) >= self.vocab_size:
            raise InputError(neither)
        try:
            processor.id_to_piece(list(range(self.vocab_size)))
        except UnicodeDecodeError:
            raise InputError(
                f"{origin}: a piece of this SentencePiece model is no text. Get the file again."
            ) from None
        # Llama's models have no pad token; unk does its work, since bytes leave unk nothing to do.
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.unk_id
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_ids = byte_ids if all(processor.is_byte(byte_ids)) else None
        unseen = [self.bos_id, self.pad_id]
        self._left_out = {id for id in unseen if id != self.unk_id or self._byte_ids}
        # Private characters that no piece holds come out as bytes, whatever stands round them.
        private = map(chr, range(0xE000, 0xF900))
        unheld = (c for c in private if processor.piece_to_id(c) == self.unk_id)
        self._stand_in = next(unheld, "")
        if not self._stand_in:
            raise InputError(
                f"{origin}: this SentencePiece model has no token for what it does not know, or has "
                "pieces of all private characters. Use another tokenizer."
            )

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Turn text into ids, with bos before and eos after where asked."""
        ids = self.encode_batch([text])[0]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into ids, about 8 MB/s on one core, without bos and eos.

        Many texts go on all cores, unless TOKENIZERS_PARALLELISM=false says that this process is one
        of several, as it does to the other library.
        """
        for text in texts:
            require_unicode(text)
        plain = [text.replace(SPACE_MARK, self._stand_in) for text in texts]
        if not self._byte_ids:
            plain = list(texts)
        is_alone = os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() not in OFF
        threads = available_cores() if is_alone and len(texts) >= MANY_TEXTS else 1
        encoded = self._processor.encode(plain, out_type=int, num_threads=threads)
        for row, text in enumerate(texts):
            if SPACE_MARK in text and self._byte_ids:
                encoded[row] = self._restore_marks(encoded[row], text)
        return encoded

    def _restore_marks(self, ids: list[int], text: str) -> list[int]:
        """Turn the bytes of each stand-in back into those of the U+2581 it stood for.

        The library would read a literal U+2581 as a space. A text may hold the stand-in as well,
        so the order of both in the text tells them apart.
        """
        assert self._byte_ids
        mark = [self._byte_ids[byte] for byte in SPACE_MARK.encode()]
        stand_in = [self._byte_ids[byte] for byte in self._stand_in.encode()]
        was_mark = (c == SPACE_MARK for c in text if c in (SPACE_MARK, self._stand_in))
        restored: list[int] = []
        for id in ids:
            restored.append(id)
            if restored[-3:] == stand_in and next(was_mark):
                restored[-3:] = mark
        assert next(was_mark, None) is None
        return restored

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Turn ids into text: stop at the first eos, leave control tokens out."""
        kept = text_ids(
            ids,
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            left_out=self._left_out,
        )
        return self._processor.decode(kept)

    def token_text(self, id: int) -> str:
        """Show one token to a person; a byte shows as `<0xE2>`."""
        return self._processor.id_to_piece(id).replace(SPACE_MARK, " ")

    def control_id(self, text: str) -> int | None:
        """Look up the control token of this name; None where there is none."""
        id = self._processor.piece_to_id(text)
        return id if self._processor.is_control(id) else None

    def to_bytes(self) -> bytes:
        """Give the model file."""
        return self._content

    def save(self, folder: Path) -> Path:
        """Write `tokenizer.model` into a folder, whole or not at all."""
        path = Path(folder) / FILE_NAME
        write_file(path, self._content)
        return path


def train(
    documents: Iterable[str], *, vocab_size: int, character_coverage: float, max_sentences: int
) -> SentencePieceTokenizer:
    """Train a model on lines of text: pad 0, unk 1, bos 2, eos 3, then 256 bytes, then pieces.

    No text is normalised. Newlines, tabs and characters outside `character_coverage` become bytes.
    The lines, `max_sentences` at most, are held in memory.

    Raises:
        InputError: the text allows fewer tokens than asked, needs more, or there is none.
    """
    lines = sample_lines(training_lines(documents), limit=max_sentences)
    if not lines:
        raise InputError("There is no text to train a tokenizer on. Give --data with documents.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=consume(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            # Text with few spaces would leave the mark outside the coverage, and then every space
            # would come back as a literal U+2581.
            required_chars=SPACE_MARK,
            # The library's own sampling differs from process to process; `sample_lines` does it.
            input_sentence_size=0,
            shuffle_input_sentence=False,
            # Written into the model, so the number of this machine's cores would change its bytes;
            # the pieces are the same for any number.
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        explain(error, vocab_size=vocab_size)
    return SentencePieceTokenizer(model.getvalue(), origin=FILE_NAME)


def extend(tokenizer: SentencePieceTokenizer, tokens: Sequence[str]) -> SentencePieceTokenizer:
    """Append control pieces to a model; SentencePiece never makes those of text.

    Raises:
        InputError: a token is an ordinary piece already.
    """
    # Here, since only this needs protobuf.
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.to_bytes())
    known = {piece.piece for piece in proto.pieces}
    for text in tokens:
        if text in known:
            raise InputError(
                f"{FILE_NAME}: {text} is an ordinary piece of this model, so a text could hold it. "
                "Use another tokenizer."
            )
        proto.pieces.add(piece=text, score=0.0, type=proto.SentencePiece.CONTROL)
        proto.trainer_spec.control_symbols.append(text)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return SentencePieceTokenizer(proto.SerializeToString(), origin=FILE_NAME)


def explain(error: RuntimeError, *, vocab_size: int) -> NoReturn:
    """Turn the trainer's complaint about text or vocabulary size into what to type."""
    if found := re.search(r"set it to a value <= (\d+)", str(error)):
        raise InputError(
            f"model.vocab_size={vocab_size} is more than this text gives tokens for: "
            f"{found[1]}. Use --model.vocab_size {found[1]} or less, or give more text."
        ) from None
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        raise InputError(
            f"model.vocab_size={vocab_size} is less than the {found[1]} control tokens, bytes and "
            f"characters that this text needs. Use --model.vocab_size {found[1]} or more."
        ) from None
    if "sentences_.empty()" in str(error):
        raise InputError(
            "No line of the text is left to train a tokenizer on: SentencePiece leaves out those "
            "with U+2585 in them. Give other text, or use --tokenizer.kind bytelevel."
        ) from None
    raise error


def training_lines(documents: Iterable[str]) -> Iterator[str]:
    """Cut documents at newlines, and long lines at spaces, into what the trainer takes whole.

    Pieces never cross a space, and the trainer puts one before every line, so a cut there changes
    no count.
    """
    for document in documents:
        require_unicode(document)
        for line in document.split("\n"):
            while len(line) > LONGEST_LINE:
                space = line.rfind(" ", 1, LONGEST_LINE)
                yield line[: space if space > 0 else LONGEST_LINE]
                line = line[space + 1 if space > 0 else LONGEST_LINE :]
            if line:
                yield line


def sample_lines(lines: Iterable[str], *, limit: int) -> list[str]:
    """Keep all lines, or an even sample of `limit` of them, the same one every time.

    Source:
        Vitter 1985, "Random sampling with a reservoir", algorithm R.
    """
    pick = random.Random(0)
    kept: list[str] = []
    for index, line in enumerate(lines):
        if index < limit:
            kept.append(line)
        elif (slot := int(pick.random() * (index + 1))) < limit:
            kept[slot] = line
    return kept


def consume(lines: list[str]) -> Iterator[str]:
    """Give each line and forget it, since the trainer keeps a copy of its own."""
    while lines:
        yield lines.pop()
