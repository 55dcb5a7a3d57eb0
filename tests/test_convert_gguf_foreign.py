"""GGUF files that llama.cpp made, or nobody: read whole, or refused in one line."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_cases import (
    GROUPED,
    changed,
    random_bundle,
)

import convert
from convert.__main__ import main
from convert.tokenizer_files import build_sentencepiece, pieces_of
from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data.bytelevel import ByteLevelTokenizer
from tinyllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def bytelevel() -> Tokenizer:
    stories = list(generate_stories(seed=1, start=0, stop=200))
    return train_tokenizer(stories, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    stories = list(generate_stories(seed=1, start=0, stop=200))
    return train_tokenizer(stories, config=TokenizerConfig(kind="sentencepiece"), vocab_size=330)


def padded(tokenizer: Tokenizer, *, rows: int = 2) -> convert.Bundle:
    """Give a model with more rows than its tokenizer has tokens."""
    config = changed(GROUPED, vocab_size=tokenizer.vocab_size + rows)
    return random_bundle(config, tokenizer=tokenizer)


def one_line(caught: pytest.ExceptionInfo[InputError]) -> str:
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def test_a_byte_level_tokenizer_comes_back_whole_from_gguf(bytelevel, tmp_path):
    for name, bundle in (("x", padded(bytelevel, rows=0)), ("padded", padded(bytelevel))):
        convert.write(bundle, tmp_path / f"{name}.pt")
        assert main([str(tmp_path / f"{name}.pt"), str(tmp_path / f"{name}.gguf")]) == 0
        back = convert.read(tmp_path / f"{name}.gguf").tokenizer
        assert back is not None
        assert back.to_bytes() == bytelevel.to_bytes()


def patched(path: Path, changes: dict[str, Any]) -> Path:
    """Write a file again with other settings; None takes one out."""
    reader = gguf.GGUFReader(str(path))
    writer = gguf.GGUFWriter(str(path) + ".new", "llama")
    plain = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    for name, field in plain.items():
        if name not in changes and name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    kinds = {int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}
    for name, value in changes.items():
        if value is not None:
            getattr(writer, kinds[type(value)])(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()
    return Path(f"{path}.new")


def test_a_byte_level_tokenizer_of_llama_cpp_is_put_together_again(bytelevel, tmp_path):
    table = json.loads(bytelevel.to_bytes()) | {"normalizer": None}
    ours = ByteLevelTokenizer(json.dumps(table).encode(), origin="test")
    convert.write(padded(ours), tmp_path / "x.gguf")
    whole = {"tokenizer.huggingface.json": None}
    back = convert.read(patched(tmp_path / "x.gguf", whole)).tokenizer
    assert back is not None
    for text in [*generate_stories(seed=9, start=0, stop=20), "  naïve\n🙂 12", ""]:
        assert back.encode(text) == ours.encode(text), text
        assert back.decode(ours.encode(text)) == text
    assert (back.vocab_size, back.bos_id, back.eos_id) == (300, ours.bos_id, ours.eos_id)
    other = convert.read(patched(tmp_path / "x.gguf", whole | {"tokenizer.ggml.pre": "qwen2"}))
    assert other.tokenizer is None
    assert "it cuts text as qwen2" in other.layout["notes"][0]


def test_a_vocabulary_without_space_before_a_text_stays_without_in_gguf(sentencepiece, tmp_path):
    pieces = pieces_of(sentencepiece)  # type: ignore[arg-type]
    ours = build_sentencepiece(pieces, space_first=False, origin="test")
    convert.write(padded(ours, rows=0), tmp_path / "x.pt")
    assert main([str(tmp_path / "x.pt"), str(tmp_path / "x.gguf")]) == 0
    back = convert.read(tmp_path / "x.gguf").tokenizer
    assert back is not None
    assert back.encode("Once upon") == ours.encode("Once upon")
    with pytest.raises(InputError, match="the tokenizer gives other ids for"):
        main([str(tmp_path / "x.pt"), str(tmp_path / "x.bin")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4 and heads are 6"),
        ({"llama.attention.value_length": 4}, "attention.value_length=4 and heads are 6"),
        ({"llama.attention.key_length": 8}, "rope.dimension_count=6 and heads are 8"),
        ({"llama.rope.scale_linear": 2.0}, "scaled by linear"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.embedding_length": "24"}, "embedding_length=24 is no whole number"),
        ({"llama.block_count": [2, 2]}, r"block_count=\[2, 2\] is no whole number"),
        ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv="),
        ({"llama.rope.freq_base": "x"}, "freq_base=x is no number"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base=nan is no number"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "its tokenizer cannot be read"),
        ({"tokenizer.ggml.scores": None}, "its tokenizer cannot be read"),
    ],
)
def test_settings_of_gguf_that_are_not_computed_are_refused(
    changes, message, sentencepiece, tmp_path
):
    convert.write(padded(sentencepiece), tmp_path / "x.gguf")
    path = patched(tmp_path / "x.gguf", changes)
    with pytest.raises(InputError, match=message) as caught:
        convert.read(path)
    one_line(caught)
    if "tokenizer" in next(iter(changes)):
        assert convert.read(path, tokenizer="none").tokenizer is None


def test_a_count_that_a_file_cannot_hold_is_refused_before_lists_are_made(tmp_path):
    def field(name: str, kind: int, content: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + content

    start = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    for content in (
        field("a", 9, struct.pack("<IQ", 0, 2**62)),
        field("a", 9, struct.pack("<IQ", 8, 2**62)),
        field("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1) * 3000),
        field("a", 8, struct.pack("<Q", 2**62)),
        field("a", 99, b""),
    ):
        (tmp_path / "x.gguf").write_bytes(start + content + bytes(64))
        with pytest.raises(InputError, match="no whole GGUF file"):
            convert.read(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 2**60))
    with pytest.raises(InputError, match="no whole GGUF file"):
        convert.read(tmp_path / "x.gguf")


def complaint(path: Path) -> str:
    try:
        convert.read(path)
    except InputError as error:
        return str(error)
    return ""


def test_mutated_gguf_files_give_a_bundle_or_one_line(sentencepiece, tmp_path):
    convert.write(padded(sentencepiece), tmp_path / "x.gguf")
    content = (tmp_path / "x.gguf").read_bytes()
    start = len(content) - sum(a.nbytes for a in padded(sentencepiece).weights.values())
    numbers = np.random.default_rng(0)
    for _ in range(60):
        changed_bytes = bytearray(content)
        for place in numbers.integers(4, start, 3):
            changed_bytes[place] = numbers.integers(256)
        (tmp_path / "y.gguf").write_bytes(changed_bytes[: numbers.choice([len(content), start])])
        assert len(complaint(tmp_path / "y.gguf").splitlines()) <= 1
    assert convert.read(tmp_path / "x.gguf").tokenizer is not None
