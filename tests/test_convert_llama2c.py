"""llama2.c's files: an interpreter of run.c's forward pass, written apart, computes our logits."""

import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from convert_cases import GROUPED, UNTIED, assert_same_weights, changed, random_bundle

import convert
from convert.formats import llama2c
from convert.verify import Comparer
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.weights import merge_weights, model_structure

TOKENS = [3, 41, 0, 66, 12, 12, 5, 30, 7]


def run_c(path: Path, tokens: list[int]) -> np.ndarray:
    """Read a version 0 file as run.c maps it and do its forward pass, token by token."""
    content = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", content)
    shared, vocab = vocab > 0, abs(vocab)
    size, kv = dim // heads, dim // heads * kv_heads
    numbers = np.frombuffer(content, "<f4", offset=28).astype(np.float64)
    place = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal place
        count = int(np.prod(shape))
        place += count
        return numbers[place - count : place].reshape(shape)

    table = take(vocab, dim)
    att_norm, wq, wk = take(layers, dim), take(layers, dim, dim), take(layers, kv, dim)
    wv, wo, ffn_norm = take(layers, kv, dim), take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    final = take(dim)
    place += context * size  # tables that run.c skips
    head = table if shared else take(vocab, dim)
    assert place == len(numbers)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * (x / np.sqrt((x * x).mean() + 1e-5))

    def turn(vector: np.ndarray, position: int) -> np.ndarray:
        turned = vector.copy()
        for i in range(0, len(vector), 2):
            angle = position / 10000.0 ** ((i % size) / size)
            a, b = vector[i], vector[i + 1]
            turned[i] = a * np.cos(angle) - b * np.sin(angle)
            turned[i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return turned

    keys, values = np.zeros((layers, len(tokens), kv)), np.zeros((layers, len(tokens), kv))
    logits = []
    for position, token in enumerate(tokens):
        x = table[token].copy()
        for layer in range(layers):
            normed = norm(x, att_norm[layer])
            query = turn(wq[layer] @ normed, position)
            keys[layer, position] = turn(wk[layer] @ normed, position)
            values[layer, position] = wv[layer] @ normed
            mixed = np.zeros(dim)
            for h in range(heads):
                q, g = slice(h * size, (h + 1) * size), h // (heads // kv_heads)
                k = slice(g * size, (g + 1) * size)
                scores = keys[layer, : position + 1, k] @ query[q] / np.sqrt(size)
                share = np.exp(scores - scores.max())
                mixed[q] = (share / share.sum()) @ values[layer, : position + 1, k]
            x += wo[layer] @ mixed
            normed = norm(x, ffn_norm[layer])
            gate = w1[layer] @ normed
            x += w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ normed))
        logits.append(head @ norm(x, final))
    return np.stack(logits)


def jax_logits(bundle: convert.Bundle) -> np.ndarray:
    config = changed(bundle.model, compute_dtype="float32", head_dim=bundle.model.head_dim)
    structure, _ = model_structure(config)
    weights = convert.bundle.to_jax(bundle.weights)
    forward = jax.jit(lambda weights, tokens: merge_weights(structure, weights)(tokens))
    return np.asarray(forward(weights, np.asarray([TOKENS])))[0]


@pytest.mark.parametrize(
    "config",
    [
        GROUPED,
        UNTIED,
        changed(GROUPED, num_key_value_heads=1),
        changed(GROUPED, num_key_value_heads=4),
    ],
    ids=["grouped", "untied", "one key head", "as many key heads"],
)
def test_run_c_computes_our_logits(config, tmp_path):
    bundle = random_bundle(config)
    convert.write(bundle, tmp_path / "x.bin")
    np.testing.assert_allclose(run_c(tmp_path / "x.bin", TOKENS), jax_logits(bundle), atol=2e-5)
    found = convert.read(tmp_path / "x.bin")
    assert_same_weights(found.weights, bundle.weights)
    assert found.model == changed(config, compute_dtype="auto")


@pytest.mark.parametrize("config", [GROUPED, UNTIED], ids=["tied", "untied"])
def test_version_1_holds_the_same(config: ModelConfig, tmp_path):
    bundle = random_bundle(config)
    convert.write(bundle, tmp_path / "x.bin", llama2c_version=1)
    start = (tmp_path / "x.bin").read_bytes()[:256]
    assert struct.unpack_from("<Ii", start) == (0x616B3432, 1)
    assert struct.unpack_from("<7i", start, 8) == (24, 40, 2, 4, 2, 67, 64)
    assert start[36] == config.tie_word_embeddings
    found = convert.read(tmp_path / "x.bin")
    assert_same_weights(found.weights, bundle.weights)


@pytest.mark.parametrize("config", [GROUPED, UNTIED], ids=["tied", "untied"])
def test_version_2_is_within_half_a_step_of_each_group(config, tmp_path):
    bundle = random_bundle(config)
    bundle.weights["embed_tokens.weight"][5] = 0.0  # a group without a scale
    convert.write(bundle, tmp_path / "x.bin", llama2c_version=2)
    found = convert.read(tmp_path / "x.bin")
    assert found.layout["dtype"] == "int8 in groups of 8"
    for name, array in bundle.weights.items():
        if array.ndim == 1:
            np.testing.assert_array_equal(found.weights[name], array)
            continue
        # Rows are permuted, columns are not, so groups stand in the same places of a row.
        steps = np.abs(array).reshape(-1, 8).max(axis=1, keepdims=True) / 127
        gaps = np.abs(found.weights[name] - array).reshape(-1, 8)
        assert (gaps <= steps * 0.5001).all(), name
        assert gaps.max() > 0
    double = Comparer(config, double=False)
    gap = double.logits(found) - double.logits(bundle)
    assert 0 < np.abs(gap).max() < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 5000.0}, r"rope_theta=5000.0 \(run.c has 10000\)"),
        ({"rms_norm_eps": 1e-6}, r"rms_norm_eps=1e-06 \(run.c has 1e-05\)"),
        ({"head_dim": 8}, r"head_dim=8 \(run.c has hidden_size / num_attention_heads = 6\)"),
    ],
)
def test_what_run_c_hard_codes_is_refused_otherwise(fields, message, tmp_path):
    bundle = random_bundle(changed(GROUPED, **fields))
    with pytest.raises(InputError, match=message):
        convert.write(bundle, tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_beside_the_file_stays(tmp_path, trained_run):
    bundle = convert.read(trained_run)
    (tmp_path / "tokenizer.bin").write_bytes(b"other")
    with pytest.raises(InputError, match="tokenizer.bin: already there, of another model"):
        convert.write(bundle, tmp_path / "x.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.bin"]
    (tmp_path / "tokenizer.bin").unlink()
    for name in ("x.bin", "y.bin"):
        convert.write(bundle, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.bin", "x.bin", "y.bin"]


def test_groups_are_halved_until_they_fit():
    assert llama2c._group_size(changed(GROUPED, hidden_size=128, intermediate_size=352)) == 32


def test_groups_that_cut_rows_are_no_file_of_llama2c(tmp_path):
    convert.write(random_bundle(), tmp_path / "x.bin", llama2c_version=2)
    content = bytearray((tmp_path / "x.bin").read_bytes())
    content[37:41] = struct.pack("<i", 7)
    header = llama2c.Header(2, 24, 40, 2, 4, 2, 67, 64, True, 7)
    (tmp_path / "x.bin").write_bytes(
        content.ljust(llama2c._file_size(header), b"\0")[: llama2c._file_size(header)]
    )
    with pytest.raises(InputError, match="x.bin: not a known format"):
        convert.read(tmp_path / "x.bin")
