"""GGUF, read back with the library that llama.cpp's own conversion uses."""

import json

import numpy as np
import pytest
from convert_cases import (
    GROUPED,
    UNTIED,
    assert_same_weights,
    changed,
    interleave_rows,
    random_bundle,
)

import convert
from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories

gguf = pytest.importorskip("gguf")
# Rows of 32 and 64 fill whole blocks of Q8_0; the vocabulary is the small run's.
WIDE = changed(GROUPED, vocab_size=512, hidden_size=32, intermediate_size=64)


@pytest.fixture(scope="module")
def tokenizer(trained_run):
    return load_tokenizer(trained_run)


def contents(path) -> tuple[dict, dict]:
    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_tensors_are_ours_with_interleaved_rows(tmp_path):
    bundle = random_bundle(UNTIED)
    convert.write(bundle, tmp_path / "x.gguf")
    _, tensors = contents(tmp_path / "x.gguf")
    theirs = {
        "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head",
        "blk.1.attn_norm": "layers.1.input_layernorm", "blk.1.attn_v": "layers.1.self_attn.v_proj",
        "blk.0.attn_output": "layers.0.self_attn.o_proj", "blk.0.ffn_gate": "layers.0.mlp.gate_proj",
        "blk.0.ffn_up": "layers.0.mlp.up_proj", "blk.1.ffn_down": "layers.1.mlp.down_proj",
        "blk.1.ffn_norm": "layers.1.post_attention_layernorm",
    }  # fmt: skip
    assert len(tensors) == len(bundle.weights)
    for name, ours in theirs.items():
        np.testing.assert_array_equal(
            tensors[f"{name}.weight"].data, bundle.weights[f"{ours}.weight"]
        )
    for letter in "qk":
        ours = bundle.weights[f"layers.1.self_attn.{letter}_proj.weight"]
        stored = tensors[f"blk.1.attn_{letter}.weight"].data
        np.testing.assert_array_equal(stored, interleave_rows(ours, UNTIED.head_dim))


def test_metadata_is_what_llama_cpp_reads(tmp_path, tokenizer):
    convert.write(random_bundle(WIDE, tokenizer=tokenizer), tmp_path / "x.gguf")
    fields, tensors = contents(tmp_path / "x.gguf")
    expected = {
        "general.architecture": "llama", "llama.embedding_length": 32, "llama.block_count": 2,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.context_length": 64,
        "llama.rope.dimension_count": 8, "llama.rope.freq_base": 10000.0, "llama.vocab_size": 512,
        "general.file_type": 0, "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert json.loads(fields["tinyllm.layout"])["rope"] == "half-split"
    assert "output.weight" not in tensors
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (len(tokens), len(types)) == (512, 512)
    assert (tokens[:5], types[:5]) == (["<pad>", "<unk>", "<s>", "</s>", "<0x00>"], [3, 2, 3, 3, 6])
    assert fields["tokenizer.ggml.scores"][400] == tokenizer._processor.get_score(400)
    assert tokens[400] == tokenizer._processor.id_to_piece(400)


def test_a_sentencepiece_tokenizer_comes_back_with_the_same_ids(tmp_path, tokenizer):
    convert.write(random_bundle(WIDE, tokenizer=tokenizer), tmp_path / "x.gguf")
    found = convert.read(tmp_path / "x.gguf")
    assert found.tokenizer is not None
    assert found.model == changed(WIDE, compute_dtype="auto")
    for text in [*generate_stories(seed=9, start=0, stop=10), "  naïve\n🙂", "......"]:
        assert found.tokenizer.encode(text) == tokenizer.encode(text)


def test_a_byte_level_tokenizer_keeps_its_merges(tmp_path):
    stories = list(generate_stories(seed=1, start=0, stop=100))
    ours = train_tokenizer(stories, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)
    # Two rows more than tokens, as folders padded to a round size have.
    bundle = random_bundle(changed(WIDE, vocab_size=302), tokenizer=ours)
    convert.write(bundle, tmp_path / "x.gguf")
    fields, _ = contents(tmp_path / "x.gguf")
    table = json.loads(ours.to_bytes())
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens = fields["tokenizer.ggml.tokens"]
    assert {text: id for id, text in enumerate(tokens[:300])} == table["model"]["vocab"]
    assert tokens[300:] == ["[PAD300]", "[PAD301]"]
    assert fields["tokenizer.ggml.token_type"][298:] == [1, 1, 5, 5]
    assert fields["tokenizer.ggml.token_type"][:6] == [3, 3, 3, 3, 3, 1]
    merges = [tuple(row.split(" ")) for row in fields["tokenizer.ggml.merges"]]
    assert merges == [tuple(row) for row in table["model"]["merges"]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_float_type_comes_back_bitwise(dtype, tmp_path):
    expected = convert.bundle.cast_bundle(random_bundle(UNTIED), dtype)
    convert.write(expected, tmp_path / "x.gguf")
    found = convert.read(tmp_path / "x.gguf").weights
    norms = {name for name in found if "norm" in name}
    # Norms are float32 in GGUF, whatever the rest is.
    wanted = {n: a.astype(np.float32) if n in norms else a for n, a in expected.weights.items()}
    assert_same_weights(found, wanted)


def test_q8_0_is_the_librarys_and_close(tmp_path):
    bundle = random_bundle(WIDE)
    convert.write(bundle, tmp_path / "x.gguf", dtype="q8_0")
    fields, tensors = contents(tmp_path / "x.gguf")
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    ours = bundle.weights["layers.0.mlp.up_proj.weight"]
    stored = tensors["blk.0.ffn_up.weight"]
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(stored.data, gguf.quants.quantize(ours, q8_0))
    found = convert.read(tmp_path / "x.gguf").weights
    steps = np.abs(ours).reshape(-1, 32).max(axis=1, keepdims=True) / 127
    gaps = np.abs(found["layers.0.mlp.up_proj.weight"] - ours).reshape(-1, 32)
    assert (gaps <= steps * 0.52).all()  # half a step, and the scale's own rounding to float16


def test_rows_that_fill_no_block_stay_float16_under_q8_0(tmp_path):
    convert.write(random_bundle(GROUPED), tmp_path / "x.gguf", dtype="q8_0")
    _, tensors = contents(tmp_path / "x.gguf")
    kinds = {tensor.tensor_type.name for tensor in tensors.values()}
    assert kinds == {"F16", "F32"}
