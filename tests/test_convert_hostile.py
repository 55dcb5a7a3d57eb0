"""Files whose parts are not what they say: one line that names the part, and no memory spent."""

import json
import math
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_cases import (
    GROUPED,
    UNTIED,
    assert_same_weights,
    changed,
    llama2c_checkpoint,
    meta_arguments,
    meta_state,
    random_bundle,
    save_torch,
    with_training,
)

import convert
from convert.formats import safetensors
from tinyllm_jax.errors import InputError
from tinyllm_jax.training import step_folders

METAS: dict[str, Any] = {
    "step is text": ({"step": "soon"}, "step=soon is not a whole number"),
    "no step": ({"step": ...}, "is no table of format, config, step"),
    "no best": ({"best": ...}, "is no table of format, config, step"),
    "negative count": ({"count": -1}, "count=-1 is not between 0 and"),
    "count of 40 bits": ({"count": 2**40}, "count=1099511627776 is not between 0 and"),
    "streak is null": ({"nonfinite_streak": None}, "nonfinite_streak=None is not a whole number"),
    "best is a number": ({"best": 3}, "best=3 is no table of step and loss"),
    "best has no loss": ({"best": {"step": 3}}, "best.loss=None is not a finite number"),
    "hash is a list": ({"dataset_hash": []}, r"dataset_hash=\[\] is not text"),
    "format is a table": ({"format": {}}, "checkpoint format {}, this version reads 1"),
    "config is a list": ({"config": [1]}, r"its settings: \[1\] is no table"),
    "config says text": ({"config": {"model": {"hidden_size": "wide"}}}, "model.hidden_size='wide'"),
    "a huge width": ({"config": {"model": {"hidden_size": 10**15, "num_attention_heads": 7}}},
                     "hidden_size above 16777216"),
    "a huge number": ({"config": {"model": {"rope_theta": 10**400}}}, "does not fit. Give a number"),
    "many settings": ({"config": {f"x{n}": n for n in range(10**5)}}, "100,000 of them"),
}  # fmt: skip


@pytest.mark.parametrize("name", METAS)
def test_metadata_that_is_none_of_a_run_is_one_line(name, tmp_path):
    changes, message = METAS[name]
    bundle = with_training(random_bundle())
    convert.write(bundle, tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    meta = json.loads(content["meta"]) | changes
    content["meta"] = json.dumps({key: value for key, value in meta.items() if value is not ...})
    torch.save(content, tmp_path / "x.pt")
    expect_line(tmp_path / "x.pt", message)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1]", '{"format": NaN}'])
def test_metadata_that_is_no_table_is_one_line(text, tmp_path):
    convert.write(random_bundle(), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    torch.save(content | {"meta": text}, tmp_path / "x.pt")
    expect_line(tmp_path / "x.pt", "x.pt: its metadata")


def expect_line(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        convert.read(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 6000


def laughs() -> list:
    found: list = []
    for _ in range(40):
        found = [found] * 10
    return found


def circle() -> dict:
    found: dict = {}
    found["again"] = found
    return found


class Bytes:
    """A pickle of this asks for a gigabyte of zeros."""

    def __reduce__(self):
        return bytearray, (10**9,)


class Nothing:
    """A pickle of this asks for a tensor that the file has no content of."""

    def __reduce__(self):
        return torch.Tensor, (10**8,)


STATES: dict[str, Any] = {
    "heads are text": ({"model_args": {"n_heads": "many"}}, "n_heads='?many'? is"),
    "heads are a table": ({"model_args": {"n_heads": {"a": 1}}}, r"n_heads=\{.* is"),
    "a theta for each": ({"model_args": {"rope_theta": torch.ones(3)}}, "rope_theta=.* is"),
    "a huge theta": ({"model_args": {"rope_theta": 10**400}}, "rope_theta=.* is"),
    "a gate of one number": (
        {"model": {"layers.0.feed_forward.w1.weight": torch.tensor(1.0)}}, r"has shape \[\]"),
    "names that are numbers": ({"model": {7: torch.ones(2)}}, "keys that are no names: 7"),
    "a layer of 5,000 digits": (
        {"model": {f"layers.{'9' * 5000}.ffn_norm.weight": torch.ones(24)}}, "unknown: layers.9999"),
    "a name of two lines": ({"model": {"a\nb": torch.ones(2)}}, r"unknown: a\\nb"),
    "8 bits": ({"model": {"norm.weight": torch.ones(24).to(torch.float8_e4m3fn)}}, "Float8_e4m3fn"),
    "expanded": ({"model": {"norm.weight": torch.ones(1).expand(2**38)}}, "share their bytes"),
    "sparse": ({"model": {"norm.weight": torch.eye(2).to_sparse()}}, "sparse, quantized, nested"),
    "without content": ({"model": {"norm.weight": torch.empty(9, device="meta")}}, "without content"),
    "no content at all": ({"extra": Nothing()}, "share their bytes"),
    "a gigabyte of zeros": ({"extra": Bytes()}, "holds a bytearray"),
    "circle": ({"extra": circle()}, "no whole PyTorch file .*recursion"),
    "step is text": ({"iter_num": "soon"}, "iter_num=soon is not a whole number"),
    "step is negative": ({"iter_num": -4}, "iter_num=-4 is not between"),
    "a rate of infinity": ({"config": {"learning_rate": math.inf}}, "its run: its settings: .*finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_dict_of_strange_values_is_one_line(name, tmp_path):
    changes, message = STATES[name]
    content = llama2c_checkpoint(random_bundle())
    for key, value in changes.items():
        both = isinstance(value, dict) and key in content
        content[key] = content[key] | value if both else value
    torch.save(content, tmp_path / "x.pt")
    expect_line(tmp_path / "x.pt", message)


def test_lists_of_any_depth_are_one_line(tmp_path):
    lists = b"]" * 100_000 + b"a" * 99_999
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}X\x05\x00\x00\x00model" + lists + b"s.")
        archive.writestr("x/version", "3")
    expect_line(tmp_path / "x.pt", "no whole PyTorch file .*recursion")


def test_lists_that_hold_each_other_are_not_written_out(tmp_path):
    torch.save(llama2c_checkpoint(random_bundle()) | {"extra": laughs()}, tmp_path / "x.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.torch_archive.MOST_VALUES", 100_000)
        expect_line(tmp_path / "x.pt", "holds more than 100,000 values")


@pytest.mark.parametrize(
    "change",
    [
        lambda _: {"param_groups": 3},
        lambda _: {"param_groups": ["params"]},
        lambda _: {"param_groups": [{"params": 5}]},
        lambda _: {"param_groups": [{"params": [[1]] * 20}]},
        lambda _: {"param_groups": [{"params": [0] * 20}]},
        lambda _: {"state": [1, 2]},
        lambda state: {"state": dict.fromkeys(state["state"], 3)},
        lambda state: {"state": {n: row | {"exp_avg": [1.0]} for n, row in state["state"].items()}},
        lambda state: {"state": {n: row | {"step": "x"} for n, row in state["state"].items()}},
        lambda state: {"state": {n: row | {"step": -1} for n, row in state["state"].items()}},
        lambda state: {"state": {n: row | {"step": math.nan} for n, row in state["state"].items()}},
        lambda state: {"state": {n: row | {"step": n} for n, row in state["state"].items()}},
    ],
)
def test_an_optimizer_that_is_not_adamw_is_left_out_and_said(change, tmp_path):
    content = llama2c_checkpoint(random_bundle())
    assert convert.read(save_torch(tmp_path / "x.pt", content)).training is not None
    content["optimizer"] = content["optimizer"] | change(content["optimizer"])
    found = convert.read(save_torch(tmp_path / "x.pt", content))
    assert found.training is None
    assert any("the optimizer's state was left out" in note for note in found.layout["notes"])
    assert_same_weights(found.weights, random_bundle().weights)


@pytest.mark.parametrize("loss", [math.inf, math.nan, "low", [1.0], True, 10**400, torch.ones(3)])
def test_a_loss_that_is_no_number_is_no_best(loss, tmp_path):
    content = llama2c_checkpoint(random_bundle()) | {"best_val_loss": loss}
    found = convert.read(save_torch(tmp_path / "x.pt", content)).training
    assert found is not None
    assert found.best is None


@pytest.mark.parametrize(
    "content",
    [b"\x80\x02.", b"\x80\x03", b"\x80\x02}", b"\x80\x04N.", b"PK\x03\x04", b"\x80\x02X\xff\xff"],
)
def test_pickles_of_a_few_bytes_are_one_line(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    expect_line(tmp_path / "x.pt", "x.pt: ")


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"tokenizer_file": None}, False), ({"tokenizer": b"x"}, False), ({"weights": [1]}, False),
     ({"first_moments": {"a": 3}}, False), ({"format": torch.ones(3)}, False), ({"extra": 1}, True)],
)  # fmt: skip
def test_parts_of_our_own_file_are_checked(changes, kept, trained_run, tmp_path):
    convert.write(convert.read(trained_run), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    torch.save(content | changes, tmp_path / "y.pt")
    if kept:
        assert convert.read(tmp_path / "y.pt").tokenizer is not None
    else:
        expect_line(tmp_path / "y.pt", "y.pt: ")


def test_a_tokenizer_of_the_same_size_and_other_pieces_is_refused(trained_run, tmp_path):
    convert.write(convert.read(trained_run), tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    meta = json.loads(content["meta"]) | {"tokenizer_hash": "0" * 64}
    torch.save(content | {"meta": json.dumps(meta)}, tmp_path / "x.pt")
    expect_line(tmp_path / "x.pt", "made with the tokenizer 0000")


def test_writing_a_pt_file_leaves_the_callers_arrays_alone(trained_run, tmp_path):
    bundle = convert.read(trained_run)
    assert bundle.training is not None
    tables = [bundle.weights, bundle.training.first, bundle.training.second]
    before = [dict(table) for table in tables]
    convert.write(bundle, tmp_path / "x.pt")
    for table, expected in zip(tables, before, strict=True):
        assert all(table[name] is array for name, array in expected.items())


def test_layers_that_share_their_weights_are_no_bomb(tmp_path):
    content = llama2c_checkpoint(random_bundle())
    for name in list(content["model"]):
        if name.startswith("layers.1."):
            content["model"][name] = content["model"][name.replace("1", "0", 1)]
    torch.save({key: content[key] for key in ("model", "model_args")}, tmp_path / "x.pt")
    found = convert.read(tmp_path / "x.pt").weights
    np.testing.assert_array_equal(
        found["layers.1.mlp.up_proj.weight"], found["layers.0.mlp.up_proj.weight"]
    )


def test_many_wrong_names_are_counted_not_listed(tmp_path):
    content = llama2c_checkpoint(random_bundle())
    content["model"] |= {f"extra.{number}": torch.ones(1) for number in range(1000)}
    torch.save(content, tmp_path / "x.pt")
    expect_line(tmp_path / "x.pt", r"unknown: extra\.0, .*extra\.19, and 980 more\)")


@pytest.mark.parametrize(
    ("table", "expected", "whose"),
    [
        ({"model_type": "llama"}, (1e-6, 1e4, 2048), "llama"),
        ({"architectures": ["LlamaForCausalLM"]}, (1e-6, 1e4, 2048), "llama"),
        ({"model_type": "minimind"}, (1e-5, 1e6, 32768), "minimind"),
        ({}, (1e-5, 1e4, 256), "this project"),
    ],
)
def test_settings_that_nothing_tells_are_the_defaults_of_their_project_and_noted(
    table, expected, whose, tmp_path
):
    bundle = random_bundle()
    weights = {f"model.{name}": array for name, array in bundle.weights.items()}
    table = table | {"num_attention_heads": GROUPED.num_attention_heads}
    (tmp_path / "config.json").write_text(json.dumps(table))
    convert.write(bundle, tmp_path / "hf", to="hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "x.safetensors")
    for path in (save_torch(tmp_path / "x.pt", weights), tmp_path / "x.safetensors"):
        found = convert.read(path)
        model, notes = found.model, " ".join(found.layout["notes"])
        assert (model.rms_norm_eps, model.rope_theta, model.max_position_embeddings) == expected
        for name in ("rms_norm_eps", "rope_theta", "max_position_embeddings"):
            assert f"{name}=" in notes
        assert f"the defaults of {whose}" in notes
    (tmp_path / "config.json").write_text(json.dumps(table | {"rope_theta": 500.0}))
    found = convert.read(tmp_path / "x.pt")
    assert found.model.rope_theta == 500.0
    assert "rope_theta" not in " ".join(found.layout["notes"])


def test_a_theta_beside_a_file_without_heads_goes_over_the_preset(tmp_path):
    from tinyllm_jax.config import load_config

    preset = load_config("tiny").model
    path = save_torch(tmp_path / "x.pt", dict(random_bundle(preset).weights))
    assert convert.read(path).model.rope_theta == preset.rope_theta
    (tmp_path / "config.json").write_text('{"rope_theta": 777.0}')
    assert convert.read(path).model.rope_theta == 777.0


def test_a_config_that_flags_replace_is_not_asked(tmp_path):
    content = llama2c_checkpoint(random_bundle())
    content["model_args"] = {"n_heads": 4, "norm_eps": "small"}
    torch.save(content, tmp_path / "x.pt")
    expect_line(tmp_path / "x.pt", "norm_eps=small")
    assert convert.read(tmp_path / "x.pt", settings=changed(GROUPED)).model == GROUPED


def test_an_ordered_state_dict_of_an_untied_model_is_read(tmp_path):
    bundle = random_bundle(UNTIED)
    content = {"model": OrderedDict(meta_state(bundle)), "model_args": meta_arguments(bundle.model)}
    assert_same_weights(
        convert.read(save_torch(tmp_path / "x.pt", content)).weights, bundle.weights
    )


def test_checksums_that_are_no_table_are_damage(tmp_path):
    convert.write(with_training(random_bundle()), tmp_path / "x", to="safetensors")
    for text in (
        "[1]",
        "{}",
        '{"\\u0007": 3}',
        '{"model.safetensors": 3}',
        "[" * 100_000,
        "",
        "\xff",
    ):
        (tmp_path / "x" / safetensors.SUMS).write_text(text)
        expect_line(tmp_path / "x", r"x: damaged checkpoint \(")


@pytest.mark.parametrize("damage", ["flipped", "no state", "gone"])
def test_a_damaged_best_is_said_and_the_newest_is_taken(damage, run_copy):
    best = run_copy / "best"
    if damage == "flipped":
        file = best / "meta.json"
        file.write_bytes(file.read_bytes() + b" ")
    elif damage == "no state":
        best.unlink()
        best.mkdir()
    else:
        best.unlink()
        best.symlink_to("checkpoints/7")
    said: list[str] = []
    found = convert.read(run_copy, prefer_best=True, say=said.append)
    newest = max((run_copy / "checkpoints").iterdir(), key=lambda path: int(path.name))
    # Where `best` points at the newest, the one before it is the newest good one.
    whole = [p for p in (run_copy / "checkpoints").iterdir() if step_folders.damage(p) is None]
    assert Path(found.layout["read_from"]) == max(whole, key=lambda path: int(path.name))
    assert re.search(r"best: damaged checkpoint \(.*\); the newest good one is used\.", said[0])
    assert len(said) == 1 + (newest not in whole)


def test_the_settings_of_a_run_of_llama2c_come_along(tmp_path):
    content = llama2c_checkpoint(random_bundle())
    content["config"] |= {"max_seq_len": 32, "dropout": 0.1, "decay_lr": True}
    found = convert.read(save_torch(tmp_path / "x.pt", content))
    assert found.training is not None
    config = found.training.config
    assert (config.data.sequence_length, config.model.attention_dropout) == (32, 0.1)
    assert config.model == found.model
    assert any("the schedule goes on one update ahead" in note for note in found.layout["notes"])
    convert.write(found, tmp_path / "y.pt")
    assert convert.read(tmp_path / "y.pt").training.config == config  # type: ignore[union-attr]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    expect_line(tmp_path / "pipe", "pipe: neither a file nor a folder")


def test_a_step_folder_is_a_number_of_plain_digits(run_copy):
    (run_copy / "checkpoints/\u00b2").mkdir()
    assert convert.read(run_copy).training is not None
