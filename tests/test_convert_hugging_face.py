"""Hugging Face folders as others make them: what they leave out, and what is wrong in them."""

import json
from pathlib import Path
from typing import Any

import pytest
from convert_cases import (
    GROUPED,
    assert_same_weights,
    changed,
    random_bundle,
)

import convert
from convert import conversion
from convert.__main__ import main
from convert.hugging_face_tokenizer import value_of
from tinyllm_jax.config import TokenizerConfig
from tinyllm_jax.data.bytelevel import ByteLevelTokenizer
from tinyllm_jax.data.tokenizer import Tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError


@pytest.fixture(scope="module")
def bytelevel() -> Tokenizer:
    stories = list(generate_stories(seed=1, start=0, stop=200))
    return train_tokenizer(stories, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)


def hugging_face(folder: Path, bundle: convert.Bundle | None = None, **fields: Any) -> Path:
    """Write a folder, and put fields into its config.json; ... takes one out."""
    convert.write(bundle or random_bundle(), folder, to="hf")
    file = folder / "config.json"
    table = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))
    return folder


def one_line(caught: pytest.ExceptionInfo[InputError]) -> str:
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


# Hugging Face folders -----------------------------------------------------------------------------

WRONG = [
    {"hidden_size": "24"}, {"hidden_size": [24]}, {"hidden_size": True}, {"hidden_size": 24.5},
    {"hidden_size": 10**12}, {"vocab_size": 0}, {"num_attention_heads": {"a": 1}},
    {"num_key_value_heads": -1}, {"head_dim": "six"}, {"max_position_embeddings": "many"},
    {"rope_theta": [1e4]}, {"rope_theta": "1e4"}, {"rope_theta": 0}, {"rms_norm_eps": 0},
    {"rms_norm_eps": None, "rope_parameters": {"rope_theta": "x"}}, {"rms_norm_eps": True},
    {"rope_theta": 10**400, "rope_parameters": None}, {"tie_word_embeddings": "false"},
    {"sliding_window": "4"}, {"model_type": ["llama"]}, {"model_type": {"a": "b"}},
    {"rope_scaling": "linear"}, {"rope_scaling": {"type": ["linear"]}}, {"hidden_act": ["silu"]},
    {"partial_rotary_factor": [0.5]}, {"attention_bias": [1]}, {"rope_parameters": {"type": 3}},
]  # fmt: skip


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_settings_of_another_type_are_one_line(fields, tmp_path):
    folder = hugging_face(tmp_path / "hf", **fields)
    with pytest.raises(InputError) as caught:
        convert.read(folder)
    assert next(iter(fields)).split("_")[0] in one_line(caught) or "rope" in one_line(caught)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", DEEP, "config.json: not JSON"),
        ("config.json", '{"a": NaN}', "config.json: not JSON"),
        ("config.json", b"\xff\xfe", "config.json: not JSON"),
        ("config.json", "[1]", "config.json: not a table"),
        ("model.safetensors.index.json", DEEP, "index.json: not JSON"),
        ("model.safetensors.index.json", "[]", "index.json: not a table"),
        ("model.safetensors.index.json", '{"weight_map": 3}', "no index of shards"),
        ("model.safetensors.index.json", '{"weight_map": {}}', "no index of shards"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 3}}', "3 is no name of a file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": ["x"]}}', "is no name of a file"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}', r"\.\./x is no name"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/x"}}', "/etc/x is no name"),
        ("model.safetensors.index.json", '{"weight_map": {"a": ".."}}', r"\.\. is missing"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "gone.* is mis"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "config.json"}}', "config.json: "),
    ],
)  # fmt: skip
def test_a_broken_json_file_of_a_folder_is_one_line(name, content, message, tmp_path):
    folder = hugging_face(tmp_path / "hf")
    (tmp_path / "x").write_bytes((folder / "model.safetensors").read_bytes())
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        convert.read(folder)
    one_line(caught)


def test_a_tensor_in_two_shards_is_refused_and_the_whole_file_comes_first(tmp_path):
    conversion.huggingface.write(random_bundle(), tmp_path / "hf", shard_bytes=10_000)
    shards = sorted((tmp_path / "hf").glob("model-*"))
    last = shards[-1].read_bytes()
    shards[-1].write_bytes(shards[0].read_bytes())
    with pytest.raises(InputError, match=r"model.embed_tokens.weight, .* is in another shard"):
        convert.read(tmp_path / "hf")
    shards[-1].write_bytes(last)
    whole = random_bundle(seed=3)
    convert.write(whole, tmp_path / "other", to="hf")
    (tmp_path / "other/model.safetensors").rename(tmp_path / "hf/model.safetensors")
    # As transformers chooses where both are there.
    assert_same_weights(convert.read(tmp_path / "hf").weights, whole.weights)


def test_a_pickle_that_is_no_state_dict_is_one_line(tmp_path):
    import torch

    folder = hugging_face(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    for content in ([torch.zeros(2)], {"a": 1}, {3: torch.zeros(2)}):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(InputError, match="no state dict of names and tensors"):
            convert.read(folder)


def test_missing_settings_are_those_of_transformers_and_said(tmp_path, capsys):
    from transformers import LlamaConfig

    gone = ("rms_norm_eps", "rope_theta", "rope_parameters", "max_position_embeddings",
            "num_key_value_heads", "head_dim", "model_type")  # fmt: skip
    config = changed(GROUPED, num_key_value_heads=4)
    folder = hugging_face(tmp_path / "hf", random_bundle(config), **dict.fromkeys(gone, ...))
    assert main([str(folder), str(tmp_path / "x.safetensors")]) == 0
    printed = capsys.readouterr().out
    found, theirs = convert.read(tmp_path / "x.safetensors").model, LlamaConfig()
    assert found.rms_norm_eps == theirs.rms_norm_eps == 1e-6
    assert found.max_position_embeddings == theirs.max_position_embeddings == 2048
    assert theirs.rope_parameters is not None
    assert found.rope_theta == theirs.rope_parameters["rope_theta"] == 10000
    assert found.num_key_value_heads == 4
    for said in ("rms_norm_eps=1e-06", "max_position_embeddings=2048", "rope_theta=10000",
                 "num_key_value_heads=4"):  # fmt: skip
        assert said in printed
    complete = hugging_face(tmp_path / "complete")
    assert "notes" not in convert.read(complete).layout


def test_a_mistral_folder_that_says_nothing_of_its_window_has_one(tmp_path):
    fields = {"model_type": "mistral", "max_position_embeddings": 8192}
    with pytest.raises(InputError, match="sliding_window=4096"):
        convert.read(hugging_face(tmp_path / "a", **fields))
    found = convert.read(hugging_face(tmp_path / "b", sliding_window=None, **fields))
    assert found.model.max_position_embeddings == 8192


# Byte-level tokenizers ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["compact", "pretty", "without the key"])
def test_any_tokenizer_json_gets_a_template_and_loses_it_again(form, bytelevel, tmp_path):
    from transformers import AutoTokenizer

    table = json.loads(bytelevel.to_bytes())
    # The key's name inside the vocabulary is not the key.
    table["added_tokens"][0]["content"] = table["added_tokens"][0]["content"]
    if form == "without the key":
        del table["post_processor"]
    text = json.dumps(table, indent=3 if form == "pretty" else None, ensure_ascii=False)
    ours = ByteLevelTokenizer(text.encode(), origin="test")
    bundle = random_bundle(changed(GROUPED, vocab_size=300), tokenizer=ours)
    convert.write(bundle, tmp_path / "x.pt")
    assert main([str(tmp_path / "x.pt"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("Once upon") == [ours.bos_id, *ours.encode("Once upon")]
    back = convert.read(tmp_path / "hf").tokenizer
    assert back is not None
    assert back.encode("Once upon") == ours.encode("Once upon")
    if form != "without the key":
        assert back.to_bytes() == ours.to_bytes()


def test_a_key_is_found_in_the_outermost_table_only():
    text = '{"a": {"key": 1}, "b": "\\"key\\": 2", "key" : [3, {"key": 4}] , "c": 5}'
    place = value_of(text, "key")
    assert place is not None
    assert text[place] == '[3, {"key": 4}]'
    assert value_of(text, "d") is None
