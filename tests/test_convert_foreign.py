"""Checkpoints of TinyLLM, Tiny-K, MiniMind and llama2.c, as those projects save them."""

import json
import re

import numpy as np
import pytest
import torch
from convert_cases import (
    GROUPED,
    UNTIED,
    assert_same_weights,
    changed,
    meta_arguments,
    meta_state,
    random_bundle,
    save_torch,
)
from llama_oracle import random_weights

import convert
from convert.llama2c_run import SCHEDULE_NOTE
from tinyllm_jax.config import load_config
from tinyllm_jax.errors import InputError


def tinyllm_state(bundle: convert.Bundle) -> dict[str, np.ndarray]:
    """Hold a model as TinyLLM does: attention where others say self_attn."""
    state = {name.replace("self_attn", "attention"): a for name, a in bundle.weights.items()}
    state["lm_head.weight"] = bundle.weights["embed_tokens.weight"]
    return state


@pytest.mark.parametrize(
    ("state_key", "config_key"), [("model_state_dict", "model_config"), ("model", "config")]
)
def test_tinyllm_is_read_under_both_pairs_of_keys(state_key, config_key, tmp_path):
    expected = random_bundle(changed(GROUPED, num_key_value_heads=4, rope_theta=5000.0))
    model = expected.model
    table = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_layers": model.num_hidden_layers,
        "num_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
        "max_seq_len": model.max_position_embeddings,
        "rope_theta": model.rope_theta,
        "dropout": 0.1,
    }
    content = {state_key: tinyllm_state(expected), config_key: table, "step": 500, "val_loss": 2.0}
    found = convert.read(save_torch(tmp_path / "best.pt", content))
    assert_same_weights(found.weights, expected.weights)
    assert found.model == changed(model, compute_dtype="auto")
    assert found.layout["rope"] == "half-split"


@pytest.mark.parametrize("swapped", [False, True])
def test_tiny_k_is_read_with_w2_and_w3_either_way_round(swapped, tmp_path):
    expected = random_bundle()
    arguments = meta_arguments(expected.model)
    (tmp_path / "config.json").write_text(json.dumps(arguments))
    path = save_torch(tmp_path / "pretrain.pth", meta_state(expected, swapped=swapped))
    found = convert.read(path)
    assert_same_weights(found.weights, expected.weights)
    assert (found.layout["rope"], found.model.num_key_value_heads) == ("interleaved", 2)
    assert (
        any("w2 and w3 were swapped" in note for note in found.layout.get("notes", [])) is swapped
    )


def test_tiny_k_is_refused_where_shapes_cannot_tell_w2_from_w3(tmp_path):
    square = random_bundle(changed(GROUPED, intermediate_size=GROUPED.hidden_size))
    (tmp_path / "config.json").write_text(json.dumps(meta_arguments(square.model)))
    path = save_torch(tmp_path / "pretrain.pth", meta_state(square))
    with pytest.raises(InputError, match=r"shapes cannot tell feed_forward.w2 from w3"):
        convert.read(path)
    known = {"model": meta_state(square), "model_args": meta_arguments(square.model)}
    found = convert.read(save_torch(tmp_path / "ckpt.pt", known))
    assert_same_weights(found.weights, square.weights)


def test_a_state_dict_alone_takes_the_preset_of_its_shapes_and_says_so(tmp_path):
    config = load_config("minimind_26m").model
    weights = {n: a.astype(np.float16) for n, a in random_weights(config).items()}
    expected = convert.bundle.from_jax(weights)
    state = {f"model.{name}": array for name, array in expected.items()}
    state["lm_head.weight"] = expected["embed_tokens.weight"]
    found = convert.read(save_torch(tmp_path / "pretrain_512.pth", state))
    assert_same_weights(found.weights, expected)
    assert found.model == config
    assert found.model.rope_theta == 1e6
    (note,) = found.layout["notes"]
    assert "those of the preset minimind_26m were taken" in note


def test_a_state_dict_alone_of_no_preset_needs_settings(tmp_path):
    expected = random_bundle()
    path = save_torch(tmp_path / "x.pth", dict(expected.weights))
    with pytest.raises(
        InputError, match=r"x.pth: it holds no settings.*--config NAME or FILE.toml"
    ):
        convert.read(path)
    found = convert.read(path, settings=expected.model)
    assert_same_weights(found.weights, expected.weights)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_compiled_and_distributed_models_come_off(prefix, tmp_path):
    expected = random_bundle(UNTIED)
    state = {prefix + name: array for name, array in meta_state(expected).items()}
    content = {"model": state, "model_args": meta_arguments(expected.model)}
    found = convert.read(save_torch(tmp_path / "ckpt.pt", content))
    assert_same_weights(found.weights, expected.weights)
    assert not found.model.tie_word_embeddings


def test_both_moments_of_llama2c_come_along(tmp_path):
    """Step PyTorch's own AdamW with llama2.c's two groups, and save what its train.py saves."""
    expected = random_bundle()
    state = {name: torch.from_numpy(a.copy()) for name, a in meta_state(expected).items()}
    head = state.pop("output.weight")  # the same parameter as the table
    parameters = {name: tensor.requires_grad_() for name, tensor in state.items()}
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    numbers = np.random.default_rng(3)
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.from_numpy(numbers.standard_normal(parameter.shape)).float()
        optimizer.step()
    state = {name: parameter.detach() for name, parameter in parameters.items()}
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
        | {"_orig_mod.output.weight": state["tok_embeddings.weight"]},
        "optimizer": optimizer.state_dict(),
        "model_args": meta_arguments(expected.model),
        "iter_num": 2,
        "best_val_loss": torch.tensor(1.25),
        "config": {"learning_rate": 1e-3, "max_iters": 50, "batch_size": 8, "beta2": 0.95,
                   "warmup_iters": 3, "max_seq_len": 32, "dropout": 0.25, "decay_lr": True, "always_save_checkpoint": False, "dataset": "tinystories"},
    }  # fmt: skip
    assert head.shape == state["tok_embeddings.weight"].shape
    torch.save(content, tmp_path / "ckpt.pt")
    found = convert.read(tmp_path / "ckpt.pt")
    training = found.training
    assert training is not None
    assert (training.step, training.count, training.best) == (2, 2, {"step": 2, "loss": 1.25})
    assert training.config.optimizer.learning_rate == 1e-3
    assert training.config.train.max_steps == 50
    assert training.config.data.sequence_length == 32
    assert found.model == training.config.model
    assert found.model.residual_dropout == found.model.attention_dropout == 0.25
    assert SCHEDULE_NOTE in found.layout["notes"]
    for moments, key in ((training.first, "exp_avg"), (training.second, "exp_avg_sq")):
        theirs = {n: optimizer.state[p][key].numpy() for n, p in parameters.items()}
        theirs["output.weight"] = theirs["tok_embeddings.weight"]
        held = convert.Bundle(found.model, moments, None, None, {})
        assert_same_weights(meta_state(held), theirs)


def test_stored_rotary_tables_and_masks_are_no_weights(tmp_path):
    expected = random_bundle()
    state = meta_state(expected) | {
        "freqs_cos": np.zeros((64, 3), np.float32),
        "layers.0.attention.mask": np.zeros((1, 1, 64, 64), np.float32),
    }
    content = {"model": state, "model_args": meta_arguments(expected.model)}
    found = convert.read(save_torch(tmp_path / "ckpt.pt", content))
    assert_same_weights(found.weights, expected.weights)


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    expected = random_bundle()
    state = meta_state(expected)
    del state["layers.1.attention.wv.weight"], state["norm.weight"]
    state["layers.0.attention.wq.bias"] = np.zeros(24, np.float32)
    state["layers.1.ffn_norm.weight"] = np.zeros(23, np.float32)
    content = {"model": state, "model_args": meta_arguments(expected.model)}
    with pytest.raises(InputError) as caught:
        convert.read(save_torch(tmp_path / "ckpt.pt", content))
    message = str(caught.value)
    assert "\n" not in message
    assert "missing: layers.1.self_attn.v_proj.weight, norm.weight" in message
    assert "unknown: layers.0.attention.wq.bias" in message
    assert re.search(
        r"layers.1.post_attention_layernorm.weight has shape \[23\] instead of \[24\]", message
    )
