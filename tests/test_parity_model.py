"""The PyTorch twin computes what the JAX model computes: logits, loss and every gradient."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from llama_oracle import (
    SMALL,
    changed,
    random_weights,
    torch_in_float64,
    torch_name,
    transformers_llama,
)
from parity import (
    PACKINGS,
    assert_equal_in,
    both_numbers,
    errors,
    precision,
    real_batch,
    relative_error,
    scaled_down,
    small_config,
    torch_model,
    torch_numbers,
)

from tinyllm_jax.config import ModelConfig, load_config, preset_names
from tinyllm_jax.model import kv_cache as jax_cache
from tinyllm_jax.model import weights as jax_weights
from tinyllm_torch.model import kv_cache as torch_cache
from tinyllm_torch.model import weights as torch_weights
from tinyllm_torch.model.attention import attention
from tinyllm_torch.model.dropout import dropout

OPTIMIZED = True

SHAPE = small_config("packed").model
HEADS = {"multi_head": 4, "grouped": 2, "multi_query": 1}


def variant(heads: str, *, tied: bool, dtype: str) -> ModelConfig:
    return changed(
        SHAPE,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=HEADS[heads],
        tie_word_embeddings=tied,
        compute_dtype=dtype,
    )


def test_the_batches_hold_what_they_are_to_show(prepared_folder: Path) -> None:
    packed, padded = (real_batch(packing, prepared_folder) for packing in ("packed", "padded"))
    assert (packed["segment_ids"].max(axis=1) > 1).all(), "no documents side by side"
    assert (packed["positions"] < np.arange(64)).any(axis=1).all()
    assert not padded["loss_mask"].all(axis=1).any(), "no padding"


# Logits, loss and gradients -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_scaled_down_has_the_same_numbers_in_both(
    preset: str, prepared_folder: Path
) -> None:
    batch = real_batch(load_config(preset).data.packing, prepared_folder)
    actual, expected = both_numbers(scaled_down(preset), batch)
    assert_equal_in("float64", actual, expected)
    assert np.abs(expected["logits"]).max() > 0.1, "logits this small could hide an error"


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "packing"), list(zip(HEADS, PACKINGS, strict=True)))
def test_every_form_of_heads_and_tying_has_the_same_numbers_in_both(
    heads: str, packing: str, tied: bool, prepared_folder: Path
) -> None:
    batch = real_batch(packing, prepared_folder)
    actual, expected = both_numbers(variant(heads, tied=tied, dtype="float64"), batch)
    assert_equal_in("float64", actual, expected)


FAMILY = {
    "experts": {"num_experts": 4, "router_z_loss_coef": 0.01},
    "experts_of_rows": {"num_experts": 5, "num_experts_per_tok": 3, "num_shared_experts": 2,
                        "norm_topk_prob": False, "router_aux_loss_level": "sequence"},
    "one_expert_of_many": {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 9},
    "norms_of_queries_and_keys": {"qk_norm": True},
    "linear": {"rope_type": "linear", "rope_factor": 3.0},
    "llama3": {"rope_type": "llama3", "rope_factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_factor": 4.0, "head_dim": 16,
             "rope_original_max_position_embeddings": 300},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("member", FAMILY)
def test_every_member_of_the_family_has_the_same_numbers_in_both(
    member: str, dtype: str, prepared_folder: Path
) -> None:
    config = changed(variant("grouped", tied=False, dtype=dtype), **FAMILY[member])
    actual, expected = both_numbers(config, real_batch("packed", prepared_folder))
    assert ("expert_load" in expected) == (config.num_experts > 0)
    assert_equal_in(dtype, actual, expected)


@pytest.mark.parametrize(("heads", "packing"), list(zip(HEADS, PACKINGS, strict=True)))
def test_float32_has_the_same_numbers_in_both(
    heads: str, packing: str, prepared_folder: Path
) -> None:
    batch = real_batch(packing, prepared_folder)
    actual, expected = both_numbers(variant(heads, tied=heads == "grouped", dtype="float32"), batch)
    assert_equal_in("float32", actual, expected)


def skewed_batch() -> dict[str, np.ndarray]:
    """Make 4,096 tokens, of which one is a third."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.3, (32, 129)), SHAPE.vocab_size - 1).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((32, 128), bool),
    }


@pytest.mark.slow
def test_bfloat16_is_as_near_to_the_twin_as_to_float32() -> None:
    """Of enough rows that a gradient summed in bfloat16 would be wrong by several percent."""
    batch = skewed_batch()
    config = changed(
        variant("grouped", tied=False, dtype="bfloat16"),
        attention="reference",
        max_position_embeddings=128,
    )
    actual, expected = both_numbers(config, batch)
    assert_equal_in("bfloat16", actual, expected)
    exact = torch_numbers(changed(config, compute_dtype="float32"), random_weights(config), batch)
    assert_equal_in("bfloat16", actual, exact)
    assert_equal_in("bfloat16", expected, exact)
    assert max(errors(actual, exact).values()) > 1e-3, "not computed in bfloat16"


@pytest.mark.parametrize("packing", ["stream", "packed"])
def test_torchs_own_attention_is_the_reference(packing: str, prepared_folder: Path) -> None:
    config = variant("grouped", tied=True, dtype="float64")
    batch, weights = real_batch(packing, prepared_folder), random_weights(config)
    expected = torch_numbers(config, weights, batch)
    actual = torch_numbers(changed(config, attention="xla"), weights, batch)
    assert_equal_in("float64", actual, expected)


# Decoding from the cache --------------------------------------------------------------------------


def test_decoding_from_the_cache_has_the_logits_of_jax_and_of_reading_all_at_once() -> None:
    config = variant("grouped", tied=False, dtype="float64")
    weights, slots = random_weights(config), 20
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, slots))
    model = torch_model(config, weights)
    with precision(config), torch.no_grad():
        structure, _ = jax_weights.model_structure(config)

        @jax.jit
        def jax_read(weights: Any, tokens: Any, positions: Any, cache: Any) -> Any:
            whole = jax_weights.merge_weights(structure, weights)
            hidden = whole.hidden(tokens, positions, cache=cache)
            return whole.logits(hidden.states), hidden.cache

        jax_slots = jax_cache.empty_cache(config, batch=3, slots=slots, dtype=jnp.dtype("float64"))
        torch_slots = torch_cache.empty_cache(
            config, batch=3, slots=slots, dtype=torch.float64, device=torch.device("cpu")
        )
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        # A prompt of 7, then one token at a time.
        for start, end in [(0, 7), *((place, place + 1) for place in range(7, slots))]:
            positions = np.broadcast_to(np.arange(start, end), (3, end - start))
            read, jax_slots = jax_read(weights, tokens[:, start:end], positions, jax_slots)
            hidden = model.hidden(
                torch.from_numpy(tokens[:, start:end]), torch.tensor(positions), cache=torch_slots
            )
            torch_slots = hidden.cache
            pieces.append((model.logits(hidden.states).numpy(), np.asarray(read)))
        actual, expected = (np.concatenate(side, axis=1) for side in zip(*pieces, strict=True))
        at_once = model(torch.from_numpy(tokens)).numpy()
    assert_equal_in("float64", {"decoded": actual}, {"decoded": expected})
    assert_equal_in("float64", {"decoded": actual}, {"decoded": at_once})


# The Llama of transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_twin_equals_transformers(dtype: str, heads: str, tied: bool) -> None:
    config = variant(heads, tied=tied, dtype=dtype)
    weights = random_weights(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 14))
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((2, 13), bool),
    }
    actual = torch_numbers(config, weights, batch)
    with torch_in_float64() if dtype == "float64" else contextlib.nullcontext():
        llama = transformers_llama(config, weights)
        found = llama(torch.from_numpy(tokens), labels=torch.from_numpy(tokens))
    found.loss.backward()
    gradients = {name: weight.grad.numpy() for name, weight in llama.named_parameters()}
    expected = {
        "loss": found.loss.detach().numpy(),
        "minimised": found.loss.detach().numpy(),
        "logits": found.logits.detach().numpy()[:, :-1],
    }
    expected |= {name.removeprefix("model."): gradient for name, gradient in gradients.items()}
    assert_equal_in(dtype, actual, expected)


def test_the_twins_state_dict_is_that_of_a_hugging_face_llama() -> None:
    config = variant("grouped", tied=False, dtype="float32")
    weights = random_weights(config)
    theirs = transformers_llama(config, weights).state_dict()
    ours = torch_model(config, weights).state_dict()
    assert {torch_name(name) for name in ours} == set(theirs)
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[torch_name(name)]), name


# Names, sizes and initial weights -----------------------------------------------------------------


@pytest.mark.parametrize("experts", [0, 11])
def test_renaming_weights_there_and_back_changes_no_bit(experts: int) -> None:
    config = changed(variant("grouped", tied=False, dtype="float32"), num_experts=experts)
    weights = random_weights(config)
    there = torch_weights.from_jax_weights(weights)
    assert all(array.flags["C_CONTIGUOUS"] for array in there.values())
    np.testing.assert_array_equal(
        there["layers.1.self_attn.k_proj.weight"], weights["layers.1.self_attn.k_proj.kernel"].T
    )
    back = torch_weights.to_jax_weights(there)
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@pytest.mark.parametrize("preset", preset_names())
def test_presets_have_as_many_parameters_and_operations_in_both(preset: str) -> None:
    config = load_config(preset).model
    assert torch_weights.count_parameters(config) == jax_weights.count_parameters(config)
    assert torch_weights.flops_per_token(config, sequence_length=100) == (
        jax_weights.flops_per_token(config, sequence_length=100)
    )
    theirs = {
        name: np.broadcast_to(np.int8(0), shape.shape)
        for name, shape in jax_weights.model_structure(config)[1].items()
    }
    ours = torch_weights.model_structure(config)[1]
    assert {name: tuple(weight.shape) for name, weight in ours.items()} == {
        name: weight.shape for name, weight in torch_weights.from_jax_weights(theirs).items()
    }


def test_initial_weights_have_the_spread_that_jax_draws() -> None:
    config = changed(SMALL, hidden_size=128, intermediate_size=256, vocab_size=512)
    ours = torch_weights.initial_weights(config, seed=0)
    theirs = torch_weights.from_jax_weights(jax_weights.initial_weights(config, seed=0))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_allclose(
            weight.std(), theirs[name].std(), rtol=0.03, atol=0, err_msg=name
        )
    again = torch_weights.initial_weights(config, seed=0)
    other = torch_weights.initial_weights(config, seed=1)
    assert all(torch.equal(weight, again[name]) for name, weight in ours.items())
    assert not torch.equal(ours["embed_tokens.weight"], other["embed_tokens.weight"])


# Dropout, whose bits differ -----------------------------------------------------------------------


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = torch.full((200_000,), 3.0)
    dropped = dropout(x, rate=0.4, generator=torch.Generator().manual_seed(0))
    assert float((dropped == 0).float().mean()) == pytest.approx(0.4, abs=0.005)
    assert float(dropped.mean()) == pytest.approx(3.0, abs=0.03)
    assert float(dropped.max()) == pytest.approx(3.0 / 0.6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rate", ["embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout"]
)
def test_each_dropout_rate_moves_the_logits_as_far_as_in_jax(rate: str) -> None:
    """Over 64 draws, the mean square that dropout adds to the logits is that of JAX."""
    config = changed(SMALL, num_hidden_layers=1, **{rate: 0.3})
    weights = random_weights(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 13))
    structure, _ = jax_weights.model_structure(config)

    def draw(weights: Any, key: Any) -> Any:
        return jax_weights.merge_weights(structure, weights)(jnp.asarray(tokens), dropout_key=key)

    model = torch_model(config, weights)
    with torch.no_grad():
        plain = model(torch.from_numpy(tokens)).numpy()
        ours = np.stack(
            [
                model(torch.from_numpy(tokens), generator=torch.Generator().manual_seed(seed))
                for seed in range(64)
            ]
        )
    theirs = jax.jit(jax.vmap(draw, (None, 0)))(weights, jax.random.split(jax.random.key(0), 64))
    moved, expected = (np.square(side - plain).mean() for side in (ours, np.asarray(theirs)))
    assert expected > 1e-4
    assert moved == pytest.approx(expected, rel=0.2)


def test_documents_in_one_row_do_not_see_each_other() -> None:
    config = changed(SMALL, compute_dtype="float64")
    model = torch_model(config, random_weights(config))
    tokens = torch.randint(0, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0))
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0]])
    with torch.no_grad():
        packed = model(tokens, positions, segment_ids)
        alone = model(tokens[:, 3:7])
    assert relative_error(packed[:, 3:7], alone) < 1e-12


def test_attention_falls_back_to_the_reference_where_it_drops_weights() -> None:
    x = torch.ones(1, 4, 2, 8, dtype=torch.bfloat16)
    value = torch.arange(4.0).to(torch.bfloat16)[None, :, None, None].expand(x.shape)
    mixed = attention(
        x,
        x,
        value,
        mask=None,
        causal=True,
        implementation="auto",
        dropout_rate=0.5,
        generator=torch.Generator().manual_seed(0),
    )
    plain = attention(
        x,
        x,
        value,
        mask=None,
        causal=True,
        implementation="auto",
        dropout_rate=0.5,
        generator=None,
    )
    assert not torch.equal(mixed, plain)
    assert torch.equal(plain[0, :, 0, 0], torch.tensor([0, 0.5, 1, 1.5], dtype=torch.bfloat16))
