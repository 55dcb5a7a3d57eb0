"""Experts, norms of queries and keys, and stretched positions through every format of `convert`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_cases import assert_same_weights, random_bundle
from llama_oracle import SMALL, changed, torch_in_float64
from parity import relative_error

import convert
from convert.architectures import ARCHITECTURES, architecture_of
from convert.bundle import Bundle
from convert.formats import huggingface
from convert.parity import comparable
from convert.setting_values import (
    EXECUTION_SETTINGS,
    HUGGING_FACE_SETTINGS,
    SHARED_SETTINGS,
    computed_settings,
)
from convert.twins import JaxSide
from tinyllm_jax.config import ModelConfig
from tinyllm_jax.errors import InputError

# Wider than hidden_size / heads, so that a width which is taken for the other shows.
WIDE = changed(SMALL, head_dim=8, tie_word_embeddings=False)
EXPERTS = dataclasses.replace(
    WIDE, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=14, intermediate_size=14
)
YARN = {
    "rope_type": "yarn", "rope_factor": 4.0, "rope_original_max_position_embeddings": 16,
    "rope_beta_fast": 20.0, "rope_beta_slow": 2.0,
}  # fmt: skip
MODELS = {
    "llama": dataclasses.replace(WIDE, rope_type="linear", rope_factor=3.0),
    "llama, stretched as llama3": dataclasses.replace(
        WIDE, rope_type="llama3", rope_factor=8.0, rope_original_max_position_embeddings=24,
        rope_low_freq_factor=1.5, rope_high_freq_factor=3.0,
    ),
    "llama, yarn": dataclasses.replace(WIDE, **YARN, rope_attention_factor=0.7),
    "mistral": dataclasses.replace(WIDE, num_attention_heads=5, num_key_value_heads=1),
    "qwen3": dataclasses.replace(WIDE, qk_norm=True, **YARN),
    "qwen3_moe": dataclasses.replace(
        EXPERTS, qk_norm=True, norm_topk_prob=False, intermediate_size=30
    ),
    "qwen3_moe, tied": dataclasses.replace(EXPERTS, qk_norm=True, tie_word_embeddings=True, **YARN),
    "mixtral": dataclasses.replace(EXPERTS, rope_type="linear", rope_factor=2.0),
    "granitemoeshared": dataclasses.replace(EXPERTS, num_shared_experts=2, **YARN),
}  # fmt: skip
TOKENS = np.random.default_rng(3).integers(0, SMALL.vocab_size, (2, 50), dtype=np.int32)


def family_bundle(config: ModelConfig, **options: Any) -> Bundle:
    """Draw a model in float64, with routers that prefer some experts clearly."""
    bundle = random_bundle(dataclasses.replace(config, compute_dtype="float64"), **options)
    for name, array in bundle.weights.items():
        if name.endswith("mlp.gate.weight"):
            array *= 10
    return dataclasses.replace(bundle, model=config)


def our_logits(bundle: Bundle) -> np.ndarray:
    return JaxSide(comparable(bundle.model, "float64"), bundle.weights).by_layer(TOKENS)[-1]


def their_model(folder: Path) -> Any:
    """Load a folder, and hold transformers to leave nothing out and to make nothing up."""
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    model, info = found
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def their_logits(model: Any) -> np.ndarray:
    return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def config_of(folder: Path, **fields: Any) -> Path:
    """Put fields into a folder's config.json; ... takes one out."""
    file = folder / "config.json"
    table = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))
    return folder


# Hugging Face -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_what_was_exported_and_saves_what_is_read(name, tmp_path):
    expected = family_bundle(MODELS[name])
    assert architecture_of(expected.model).model_type == name.split(",")[0]
    convert.write(expected, tmp_path / "ours", to="hf")
    with torch_in_float64():
        theirs = their_model(tmp_path / "ours")
        logits = their_logits(theirs)
    assert relative_error(logits, our_logits(expected)) < 1e-10
    for form in (True, False):  # the names of transformers 4, and the stacks of 5
        folder = tmp_path / f"theirs {form}"
        theirs.save_pretrained(folder, save_original_format=form)
        config_of(folder, dtype="float64")
        for found in (convert.read(folder), convert.read(tmp_path / "ours")):
            assert_same_weights(found.weights, expected.weights)
            assert computed_settings(found.model) == computed_settings(expected.model)
            assert "notes" not in found.layout


@pytest.mark.parametrize("name", MODELS)
def test_every_word_for_stretched_positions_reads_alike(name, tmp_path):
    expected = family_bundle(MODELS[name])
    convert.write(expected, tmp_path / "hf", to="hf")
    table = json.loads((tmp_path / "hf/config.json").read_text())
    scaling, parameters = table["rope_scaling"], table["rope_parameters"]
    assert (scaling is None) == (expected.model.rope_type == "default")
    if scaling is None:
        return
    old = {key: value for key, value in scaling.items() if key != "rope_type"}
    forms = [
        {"rope_parameters": ..., "rope_scaling": scaling},
        {"rope_parameters": ..., "rope_scaling": old | {"type": scaling["rope_type"]}},
        {"rope_parameters": parameters, "rope_scaling": ..., "rope_theta": ...},
        {"rope_parameters": parameters | {"attention_factor": parameters.get("attention_factor")},
         "rope_scaling": None},
    ]  # fmt: skip
    if "original_max_position_embeddings" in old:
        original = old.pop("original_max_position_embeddings")
        forms.append({"rope_parameters": ..., "rope_scaling": old | {"type": scaling["rope_type"]},
                      "original_max_position_embeddings": original})  # fmt: skip
    for form in forms:
        (tmp_path / "hf/config.json").write_text(json.dumps(table))
        found = convert.read(config_of(tmp_path / "hf", **form)).model
        assert computed_settings(found) == computed_settings(expected.model), form


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_a_config_leaves_out_is_what_transformers_takes(kind):
    from transformers import AutoConfig

    theirs: Any = AutoConfig.for_model(kind)
    for name, value in ARCHITECTURES[kind].defaults.items():
        found = theirs.rope_parameters[name] if name == "rope_theta" else getattr(theirs, name)
        assert found == value, name


def test_defaults_of_experts_and_contexts_are_taken_and_said(tmp_path):
    bundle = family_bundle(
        dataclasses.replace(EXPERTS, num_experts_per_tok=2, qk_norm=True, **YARN)
    )
    convert.write(bundle, tmp_path / "hf", to="hf")
    scaling = {"type": "yarn", "factor": 2.0}
    gone = dict.fromkeys(("norm_topk_prob", "num_experts", "num_local_experts", "rope_theta",
                          "rope_parameters", "moe_intermediate_size", "num_experts_per_tok"), ...)  # fmt: skip
    with pytest.raises(InputError, match="num_experts_per_tok=8 is more than"):
        convert.read(config_of(tmp_path / "hf", **gone, rope_scaling=scaling))
    found = convert.read(config_of(tmp_path / "hf", num_experts_per_tok=2))
    model = found.model
    assert (model.num_experts, model.moe_intermediate_size, model.norm_topk_prob) == (5, 14, False)
    assert (model.rope_original_max_position_embeddings, model.rope_beta_fast) == (64, 32.0)
    assert (model.rope_theta, model.rope_attention_factor) == (10000.0, 0.0)
    said = " ".join(found.layout["notes"])
    assert "norm_topk_prob=false" in said
    assert "rope_original_max_position_embeddings=64" in said


NOT_EXPORTED = {
    "num_shared_experts=1 with qk_norm=True": {"qk_norm": True, "num_shared_experts": 1},
    r"norm_topk_prob=False with qk_norm=False.*true \(mixtral\), or model.qk_norm=true": {
        "norm_topk_prob": False
    },
    r"norm_topk_prob=False.*model.norm_topk_prob=true \(granitemoeshared\), or use": {
        "norm_topk_prob": False,
        "num_shared_experts": 2,
    },
}


@pytest.mark.parametrize("message", NOT_EXPORTED)
def test_what_no_architecture_computes_is_refused_before_anything_is_written(message, tmp_path):
    bundle = family_bundle(dataclasses.replace(EXPERTS, **NOT_EXPORTED[message]))
    with pytest.raises(InputError, match=message) as caught:
        convert.write(bundle, tmp_path / "hf", to="hf")
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


SCALED = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
REFUSED = [
    ("qwen3", {"rope_scaling": SCALED | {"rope_type": "dynamic"}}, "scaled by dynamic"),
    ("qwen3", {"rope_scaling": SCALED | {"mscale": 0.7}}, "scaled by yarn with mscale"),
    ("qwen3", {"rope_scaling": SCALED | {"mscale_all_dim": 1}}, "yarn with mscale_all_dim"),
    ("qwen3", {"rope_scaling": SCALED | {"truncate": False}}, "yarn with truncate=false"),
    ("qwen3", {"rope_scaling": {"type": "yarn"}}, r"yarn without factor \(rope_scaling\)"),
    ("qwen3", {"rope_scaling": SCALED | {"factor": 0.5}}, "rope_factor"),
    ("qwen3", {"rope_scaling": SCALED | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("qwen3", {"rope_scaling": SCALED}, "rope_scaling and rope_parameters with different"),
    ("qwen3", {"rope_scaling": None, "rope_parameters": {"full_attention": SCALED}}, "their own"),
    ("qwen3", {"sliding_window": 8, "use_sliding_window": True}, "sliding_window=8"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("qwen3", {"model_type": "llama"}, r"unknown: layers.0.self_attn.\w_norm.weight"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("qwen3_moe", {"num_experts": "5"}, "num_experts=5 is no whole number"),
    ("qwen3_moe", {"num_experts": 10**6}, "num_experts=1000000 in each of 2 layers"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob=1 is neither true nor false"),
    ("qwen3_moe", {"model_type": "qwen3"}, "unknown: layers.0.mlp.experts.0.down_proj.weight"),
    ("mixtral", {"sliding_window": 8}, "sliding_window=8"),
    ("granitemoeshared", {"attention_multiplier": 0.125}, "attention_multiplier=0.125 with head"),
    ("granitemoeshared", {"attention_multiplier": ...}, "attention_multiplier=1.0 with head_dim=8"),
    ("granitemoeshared", {"residual_multiplier": 0.22}, "residual_multiplier=0.22"),
    ("granitemoeshared", {"logits_scaling": 6.0}, "logits_scaling=6.0"),
    ("granitemoeshared", {"shared_intermediate_size": 15}, "=15, no multiple of 14"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_this_model_does_not_compute_is_refused_by_name(name, fields, message, tmp_path):
    convert.write(family_bundle(MODELS[name]), tmp_path / "hf", to="hf")
    with pytest.raises(InputError, match=message) as caught:
        convert.read(config_of(tmp_path / "hf", **fields))
    assert len(str(caught.value).splitlines()) == 1


def test_stacks_that_are_none_are_refused(tmp_path):
    bundle = family_bundle(MODELS["granitemoeshared"])
    write = huggingface.to_hugging_face
    good = write(bundle.weights, kind="granitemoeshared")
    stack = "layers.1.block_sparse_moe.input_linear.weight"
    for bad in (good[stack][:, :-1], good[stack][0], np.zeros((2,))):
        convert.write(bundle, tmp_path / "hf", to="hf", overwrite=True)
        weights = {huggingface.hugging_face_name(n): a for n, a in (good | {stack: bad}).items()}
        huggingface.write_tensors(tmp_path / "hf/model.safetensors", weights, metadata={})
        with pytest.raises(InputError, match="no stack of gate_proj and up_proj"):
            convert.read(tmp_path / "hf")


# Formats of plain Llamas --------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["gguf", "llama2c"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_type": "linear", "rope_factor": 2.0}, "rope_type=linear, rope_factor=2.0"),
        (YARN, "rope_type=yarn, rope_factor=4.0"),
        ({"rope_type": "llama3", "rope_factor": 1.0}, "rope_type=llama3"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"num_experts": 3, "num_experts_per_tok": 1}, "num_experts=3, num_experts_per_tok=1"),
    ],
)
def test_formats_of_plain_llamas_refuse_the_rest_of_the_family(to, fields, named, tmp_path):
    bundle = random_bundle(changed(SMALL, **fields))
    with pytest.raises(InputError, match=f"{to}: {named}.* is not held by this format") as caught:
        convert.write(bundle, tmp_path / "x", to=to)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_settings_of_what_a_model_does_not_have_stand_in_nobodys_way(tmp_path):
    idle = {"num_experts_per_tok": 1, "norm_topk_prob": False, "router_aux_loss_coef": 0.1,
            "rope_beta_fast": 20.0, "moe_intermediate_size": 7}  # fmt: skip
    bundle = random_bundle(changed(SMALL, rope_theta=1e4, rms_norm_eps=1e-5, **idle))
    for to in ("gguf", "llama2c", "hf"):
        convert.write(bundle, tmp_path / to, to=to)
        assert_same_weights(convert.read(tmp_path / to).weights, bundle.weights)


def test_every_setting_of_a_model_has_one_place():
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    places = [*SHARED_SETTINGS, *HUGGING_FACE_SETTINGS, *EXECUTION_SETTINGS]
    assert sorted(places) == sorted(names)
    everything = dataclasses.replace(EXPERTS, num_shared_experts=1, qk_norm=True, **YARN)
    llama3 = dataclasses.replace(everything, rope_type="llama3")
    found = {*computed_settings(everything), *computed_settings(llama3), *computed_settings(SMALL)}
    assert found == SHARED_SETTINGS | HUGGING_FACE_SETTINGS
