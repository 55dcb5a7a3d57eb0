"""The model equals transformers' Llama, sees no future, and every setting reaches the maths."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from llama_oracle import (
    SMALL,
    changed,
    random_weights,
    torch_in_float64,
    torch_name,
    transformers_llama,
    transformers_rope,
)

from tinyllm_jax.config import ModelConfig, load_config, preset_names
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.generate import Generator
from tinyllm_jax.model import Transformer
from tinyllm_jax.model.dropout import dropout
from tinyllm_jax.model.layers import RMSNorm, _gated
from tinyllm_jax.model.rope import (
    rope_attention_factor,
    rope_frequencies,
    rope_tables,
    rotate,
)
from tinyllm_jax.model.weights import (
    count_parameters,
    flops_per_token,
    initial_weights,
    merge_weights,
    model_structure,
    split_weights,
)
from tinyllm_jax.objectives.pretrain import next_token_loss

TOKENS = np.random.default_rng(1).integers(0, SMALL.vocab_size, (2, 13))


@functools.cache
def forward_of(config: ModelConfig) -> Any:
    structure, _ = model_structure(config)
    return jax.jit(
        lambda weights, inputs, key: merge_weights(structure, weights)(*inputs, dropout_key=key)
    )


def logits_of(config: ModelConfig, weights: Any, *inputs: Any, key: Any = None) -> jax.Array:
    return forward_of(config)(weights, inputs, key)


# The Llama of transformers ------------------------------------------------------------------------

SHAPES = {
    "multi_head_tied": {"num_key_value_heads": 4},
    "grouped_untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "multi_query_wide_heads": {"num_key_value_heads": 1, "head_dim": 10},
    "grouped_narrow_heads_untied": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 2,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape: str) -> None:
    config = changed(SMALL, compute_dtype="float64", **SHAPES[shape])
    with jax.enable_x64(True):
        weights = random_weights(config)
        structure, _ = model_structure(config)

        def loss(weights: Any) -> tuple[jax.Array, jax.Array]:
            logits = merge_weights(structure, weights)(jnp.asarray(TOKENS))
            log_probs = jax.nn.log_softmax(logits[:, :-1])
            picked = jnp.take_along_axis(log_probs, TOKENS[:, 1:, None], axis=-1)
            return -picked.mean(), logits

        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(weights)
        assert logits.dtype == np.float64

    with torch_in_float64():
        llama = transformers_llama(config, weights)
        expected = llama(torch.from_numpy(TOKENS), labels=torch.from_numpy(TOKENS))
    expected.loss.backward()
    np.testing.assert_allclose(logits, expected.logits.detach().numpy(), rtol=0, atol=1e-10)
    assert np.abs(logits).max() > 0.1, "logits this small could hide an error"
    parameters = dict(llama.named_parameters())
    for name, gradient in gradients.items():
        reference = parameters[torch_name(name)].grad.numpy()
        reference = reference.T if name.endswith("kernel") else reference
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-10, err_msg=name)


# What a token sees --------------------------------------------------------------------------------


def gradient_by_token(config: ModelConfig, *inputs: np.ndarray) -> np.ndarray:
    """Give |d sum(logits[t]) / d embedding of token s| as [t, s] for one row of distinct tokens."""
    config = changed(config, tie_word_embeddings=False)
    structure, _ = model_structure(config)
    weights = random_weights(config)
    table = "embed_tokens.weight"

    def summed(embedding: jax.Array) -> jax.Array:
        model = merge_weights(structure, {**weights, table: embedding})
        return model(*map(jnp.asarray, inputs))[0].sum(axis=-1)

    rows = jax.jit(jax.jacrev(summed))(weights[table])[:, inputs[0][0]]
    return np.abs(np.asarray(rows)).max(axis=-1)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_no_logit_depends_on_a_later_token(implementation: str) -> None:
    tokens = np.random.default_rng(2).permutation(SMALL.vocab_size)[None, :9]
    influence = gradient_by_token(changed(SMALL, attention=implementation), tokens)
    np.testing.assert_array_equal(influence > 0, np.tril(np.ones((9, 9), bool)))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_documents_in_one_row_do_not_see_each_other(implementation: str) -> None:
    tokens = np.random.default_rng(2).permutation(SMALL.vocab_size)[None, :9]
    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0]])
    config = changed(SMALL, attention=implementation)
    influence = gradient_by_token(config, tokens, positions, segment_ids)
    same = segment_ids[0][:, None] == segment_ids[0][None]
    np.testing.assert_array_equal(influence > 0, same & np.tril(np.ones((9, 9), bool)))


def test_a_packed_document_has_the_logits_it_has_alone() -> None:
    config = changed(SMALL, compute_dtype="float64")
    segment_ids = np.array([[1] * 5 + [2] * 6 + [0] * 2])
    positions = np.array([[*range(5), *range(6), 0, 0]])
    with jax.enable_x64(True):
        weights = random_weights(config)
        packed = logits_of(config, weights, TOKENS[:1], positions, segment_ids)
        for start, end in [(0, 5), (5, 11)]:
            alone = logits_of(config, weights, TOKENS[:1, start:end])
            np.testing.assert_allclose(packed[:, start:end], alone, rtol=0, atol=1e-10)


def test_positions_are_relative() -> None:
    config = changed(SMALL, compute_dtype="float64")
    with jax.enable_x64(True):
        weights = random_weights(config)
        there = logits_of(config, weights, TOKENS, np.broadcast_to(np.arange(7, 20), (2, 13)))
        here = logits_of(config, weights, TOKENS)
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-10)


# Parts against the papers -------------------------------------------------------------------------


def test_rms_norm_is_the_papers_formula() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3, 8)), rng.standard_normal(8)
    with jax.enable_x64(True):
        norm = RMSNorm(8, eps=3e-3, dtype=jnp.dtype("float64"))
        norm.weight[...] = jnp.asarray(weight)
        actual = norm(jnp.asarray(x))
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 3e-3) * weight
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13)


def test_rotary_positions_turn_each_pair_by_its_angle() -> None:
    """Pair (i, i + d/2) as a complex number is multiplied by exp(1j * position * theta^(-2i/d))."""
    head_dim, theta = 6, 12345.6
    x = np.random.default_rng(0).standard_normal((1, 4, 2, head_dim))
    positions = np.array([[0, 1, 7, 500]])
    angles = positions[0][:, None] * theta ** (-2 * np.arange(3) / head_dim)
    pairs = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[None, :, None]
    with jax.enable_x64(True):
        config = changed(SMALL, head_dim=head_dim, rope_theta=theta)
        tables = rope_tables(jnp.asarray(positions), config, dtype=jnp.dtype("float64"))
        actual = rotate(jnp.asarray(x), *tables)
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


# An original context that turns no pair, and a theta so small that all turn alike.
EXTREME = [
    {"rope_type": "yarn", "rope_factor": 4.0, "rope_original_max_position_embeddings": 4},
    {"rope_type": "yarn", "rope_factor": 4.0, "rope_theta": 1.5,
     "rope_original_max_position_embeddings": 8192},
]  # fmt: skip


@pytest.mark.parametrize("head_dim", [2, 6])
@pytest.mark.parametrize("fields", EXTREME, ids=str)
def test_extreme_yarn_is_that_of_transformers(fields: dict[str, Any], head_dim: int) -> None:
    config = changed(SMALL, head_dim=head_dim, **fields)
    with torch_in_float64():
        theirs, _ = transformers_rope(config)
    np.testing.assert_allclose(rope_frequencies(config), theirs.numpy(), rtol=1e-12)


STRETCHED = [
    {"rope_type": "linear", "rope_factor": 4.0},
    {"rope_type": "llama3", "rope_factor": 8.0},
    {"rope_type": "llama3", "rope_factor": 3.0, "rope_low_freq_factor": 2.0,
     "rope_high_freq_factor": 9.0, "rope_original_max_position_embeddings": 100},
    {"rope_type": "yarn", "rope_factor": 4.0},
    {"rope_type": "yarn", "rope_factor": 2.5, "rope_beta_fast": 20.0, "rope_beta_slow": 2.0,
     "rope_original_max_position_embeddings": 700, "rope_attention_factor": 1.7},
]  # fmt: skip


@pytest.mark.parametrize("context", [256, 8192])
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("fields", STRETCHED, ids=str)
def test_stretched_frequencies_are_those_of_transformers(
    fields: dict[str, Any], head_dim: int, context: int
) -> None:
    config = changed(SMALL, head_dim=head_dim, max_position_embeddings=context, **fields)
    with torch_in_float64():
        theirs, factor = transformers_rope(config)
    np.testing.assert_allclose(rope_frequencies(config), theirs.numpy(), rtol=1e-12)
    assert rope_attention_factor(config) == pytest.approx(factor, rel=1e-12)
    if fields["rope_type"] != "linear":
        plain = rope_frequencies(changed(config, head_dim=head_dim, rope_type="default"))
        kept = rope_frequencies(config) / plain
        assert kept.max() == pytest.approx(1.0, rel=1e-9), "the fastest pair stays"


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("fields", STRETCHED, ids=str)
def test_a_model_with_stretched_positions_is_transformers_llama(fields: dict[str, Any]) -> None:
    config = changed(SMALL, compute_dtype="float64", **fields)
    weights, tokens = random_weights(config), TOKENS
    with torch_in_float64(), torch.no_grad():
        llama = transformers_llama(config, weights)
        expected = llama(torch.from_numpy(tokens).long()).logits.numpy()
    with jax.enable_x64(True):
        actual = logits_of(config, weights, tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10)


def test_rotary_tables_are_float32_when_activations_are_bfloat16() -> None:
    cosine, _ = rope_tables(jnp.array([[256, 257]]), SMALL, dtype=jnp.dtype("bfloat16"))
    assert cosine.dtype == jnp.float32
    assert cosine[0, 0, 0, 0] != cosine[0, 1, 0, 0]


# Precision ----------------------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32_and_its_logits_are_float32() -> None:
    weights = random_weights(SMALL)
    exact = logits_of(SMALL, weights, TOKENS)
    rounded = logits_of(changed(SMALL, compute_dtype="bfloat16"), weights, TOKENS)
    assert rounded.dtype == jnp.float32
    # bfloat16 keeps 8 bits; measured 0.6 to 0.8 % of the spread of the logits.
    error = np.sqrt(np.square(rounded - exact).mean()) / exact.std()
    assert 1e-4 < error < 0.015


def test_weights_stay_float32_when_activations_are_bfloat16() -> None:
    weights = initial_weights(changed(SMALL, compute_dtype="bfloat16"), seed=0)
    assert {value.dtype.name for value in weights.values()} == {"float32"}


# Dropout ------------------------------------------------------------------------------------------

RATES = ["embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout"]


def test_dropout_keeps_the_mean() -> None:
    x = jnp.full(200_000, 3.0)
    dropped = dropout(x, rate=0.4, key=jax.random.key(0))
    np.testing.assert_allclose((dropped == 0).mean(), 0.4, atol=0.005)
    np.testing.assert_allclose(dropped.mean(), 3.0, atol=0.03)


@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_rate_acts_with_a_key_and_only_then(rate: str) -> None:
    weights = random_weights(SMALL)
    plain = logits_of(SMALL, weights, TOKENS)
    config = changed(SMALL, **{rate: 0.3})
    np.testing.assert_array_equal(logits_of(config, weights, TOKENS), plain)
    first = logits_of(config, weights, TOKENS, key=jax.random.key(0))
    again = logits_of(config, weights, TOKENS, key=jax.random.key(0))
    other = logits_of(config, weights, TOKENS, key=jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 0.01
    assert np.abs(first - other).max() > 0.01


def test_a_key_changes_nothing_when_all_rates_are_zero() -> None:
    weights = random_weights(SMALL)
    plain = logits_of(SMALL, weights, TOKENS)
    np.testing.assert_array_equal(logits_of(SMALL, weights, TOKENS, key=jax.random.key(0)), plain)


# Sizes and initial weights ------------------------------------------------------------------------

PARAMETERS = {
    "medium": None,
    "minimind_26m": (25_829_888, 22_553_088),
    "minimind_moe": (95_052_288, 91_775_488),
    "stories_110m": (109_529_856, 84_953_856),
    "stories_15m": (15_191_712, 5_975_712),
    "stories_260k": (260_032, 227_264),
    "stories_2m": None,
    "stories_42m": (41_689_600, 25_305_600),
    "tiny": None,
    "tiny_k": None,
    "tiny_k_215m": (215_127_040, 208_835_584),
    "tinystories_7m": (8_482_464, 7_302_816),
}


@pytest.mark.parametrize("preset", preset_names())
def test_presets_have_exactly_the_parameters_of_the_systems_they_reproduce(preset: str) -> None:
    config = load_config(preset).model
    _, shapes = model_structure(config)
    total = sum(int(np.prod(shape.shape)) for shape in shapes.values())
    embedding = int(np.prod(shapes["embed_tokens.weight"].shape))
    assert count_parameters(config) == (total, total - embedding)
    expected = PARAMETERS[preset]
    if expected is not None:
        assert (total, total - embedding) == expected


def test_initial_weights_have_the_standard_deviation_of_their_place() -> None:
    config = ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3
    )
    config = dataclasses.replace(config, initializer_range=0.05, tie_word_embeddings=False)
    for name, weight in initial_weights(config, seed=0).items():
        if "norm" in name:
            np.testing.assert_array_equal(weight, 1.0)
            continue
        into_residual = name.endswith(("o_proj.kernel", "down_proj.kernel"))
        expected = 0.05 / np.sqrt(2 * 3) if into_residual else 0.05
        np.testing.assert_allclose(weight.std(), expected, rtol=0.03, err_msg=name)
        assert abs(weight.mean()) < 4 * expected / weight.size**0.5


def test_seeds_give_reproducible_and_different_weights() -> None:
    first, again, other = (initial_weights(SMALL, seed=seed) for seed in (0, 0, 1))
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, again[name])
        assert "norm" in name or not np.array_equal(weight, other[name])


# The first, the second and the last number of some weights.
DRAWN = {
    "embed_tokens.weight": [0.0200802851, -0.0181267429, -0.0126837399],
    "layers.0.self_attn.q_proj.kernel": [-0.0488491133, -0.0407136120, 0.0024915061],
    "layers.1.mlp.down_proj.kernel": [-0.0093742087, -0.0190245956, -0.0062068412],
}


def test_a_seed_gives_the_weights_that_it_always_gave() -> None:
    weights = initial_weights(SMALL, seed=0)
    for name, expected in DRAWN.items():
        actual = np.asarray(weights[name]).ravel()[[0, 1, -1]]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, err_msg=name)


def test_weights_drawn_one_by_one_are_those_of_a_program_that_draws_them_all() -> None:
    one_by_one = initial_weights(SMALL, seed=0)
    together = jax.jit(lambda: initial_weights(SMALL, seed=0))()
    assert together.keys() == one_by_one.keys()
    for name, weight in one_by_one.items():
        np.testing.assert_array_equal(together[name], weight, err_msg=name)


def test_weights_taken_apart_and_put_together_are_the_same_model() -> None:
    model = Transformer(SMALL, rngs=nnx.Rngs(params=0))
    structure, weights = split_weights(model)
    assert set(weights) == set(model_structure(SMALL)[1])
    again = merge_weights(structure, weights)
    np.testing.assert_array_equal(nnx.jit(again)(TOKENS), nnx.jit(model)(TOKENS))


def test_flops_per_token_agree_with_the_compilers_count() -> None:
    config = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        compute_dtype="float32",
    )
    seq = 128
    structure, shapes = model_structure(config)
    forward = jax.jit(lambda weights, tokens: merge_weights(structure, weights)(tokens))
    # One row, since the compiler counts a loop over rows in its own way.
    tokens = jax.ShapeDtypeStruct((1, seq), jnp.int32)
    counted = forward.lower(shapes, tokens).compile().cost_analysis()["flops"] / seq
    # A forward pass is a third of training; XLA computes the masked half of the scores too.
    query = config.num_attention_heads * config.head_dim
    masked_half = 2 * config.num_hidden_layers * query * seq
    expected = flops_per_token(config, sequence_length=seq) / 3 + masked_half
    np.testing.assert_allclose(counted, expected, rtol=0.05)


# Every setting reaches the maths ------------------------------------------------------------------

CASES: dict[str, Any] = {
    "vocab_size": 68,
    "hidden_size": 32,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 5,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "rope_type": "linear",
    "rope_factor": 5.0,
    "rope_original_max_position_embeddings": 20,
    "rope_low_freq_factor": 0.5,
    "rope_high_freq_factor": 3.0,
    "rope_beta_fast": 4.0,
    "rope_beta_slow": 0.5,
    "rope_attention_factor": 1.3,
    "qk_norm": True,
    "num_experts": 4,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "moe_intermediate_size": 24,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.02,
    "router_aux_loss_level": "sequence",
    "router_z_loss_coef": 0.01,
    "activation_checkpointing": "full",
    "scan_layers": True,
    "tie_word_embeddings": False,
    "score_head": True,
    "initializer_range": 0.03,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "mlp_dropout": 0.1,
    "compute_dtype": "bfloat16",
    "attention": "xla",
}


def forward_with_dropout(config: ModelConfig) -> Any:
    structure, _ = model_structure(config)

    def forward(weights: Any) -> jax.Array:
        return merge_weights(structure, weights)(jnp.asarray(TOKENS), dropout_key=jax.random.key(0))

    return forward


@functools.cache
def output(config: ModelConfig) -> Any:
    """Compute names and shapes of the weights, and the logits with dropout on."""
    _, shapes = model_structure(config)
    logits = jax.jit(forward_with_dropout(config))(random_weights(config))
    return {name: shape.shape for name, shape in shapes.items()}, np.asarray(logits).tobytes()


def program(config: ModelConfig) -> Any:
    """Trace the model: attention implementations differ in the program, in rounding at most."""
    return str(jax.make_jaxpr(forward_with_dropout(config))(model_structure(config)[1]))


def first_weights(config: ModelConfig) -> Any:
    return [np.asarray(weight).tobytes() for weight in initial_weights(config, seed=0).values()]


def longest_prompt(config: ModelConfig) -> Any:
    """Find how many tokens a prompt may have."""
    for length in range(1, 100):
        try:
            Generator(config).check([[0] * length], slide=False)
        except InputError:
            return length - 1
    return None


def minimised(config: ModelConfig) -> Any:
    """Compute what training makes small."""
    structure, _ = model_structure(config)
    batch = {"tokens": jnp.asarray(TOKENS), "targets": jnp.asarray(TOKENS)}
    batch["loss_mask"] = jnp.ones(TOKENS.shape, bool)

    @jax.jit
    def run(weights: Any) -> jax.Array:
        return next_token_loss(merge_weights(structure, weights), batch, None)[0]

    return float(run(random_weights(config)))


LONG = {"head_dim": 32, "max_position_embeddings": 4096, "rope_factor": 4.0}
# Settings that do something only beside others.
BESIDE: dict[str, dict[str, Any]] = {
    "rope_type": {"rope_factor": 4.0},
    "rope_factor": {"rope_type": "linear"},
    "rope_original_max_position_embeddings": {**LONG, "rope_type": "yarn"},
    "rope_low_freq_factor": {**LONG, "rope_type": "llama3"},
    "rope_high_freq_factor": {**LONG, "rope_type": "llama3"},
    "rope_beta_fast": {**LONG, "rope_type": "yarn"},
    "rope_beta_slow": {**LONG, "rope_type": "yarn"},
    "rope_attention_factor": {**LONG, "rope_type": "yarn"},
    "num_experts_per_tok": {"num_experts": 4},
    "num_shared_experts": {"num_experts": 4},
    "moe_intermediate_size": {"num_experts": 4},
    "norm_topk_prob": {"num_experts": 4},
    "router_aux_loss_coef": {"num_experts": 4},
    "router_aux_loss_level": {"num_experts": 4},
    "router_z_loss_coef": {"num_experts": 4},
}
SEEN_IN = {
    "attention": program,
    "activation_checkpointing": program,
    "scan_layers": program,
    "router_aux_loss_coef": minimised,
    "router_aux_loss_level": minimised,
    "router_z_loss_coef": minimised,
    "initializer_range": first_weights,
    "max_position_embeddings": longest_prompt,
}
ONE_LAYER = changed(SMALL, num_hidden_layers=1)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# How the blocks are executed ----------------------------------------------------------------------


@functools.cache
def loss_and_gradients(experts: int, checkpointing: str, scan_layers: bool) -> Any:
    """Compute with all dropouts on."""
    rates = dict.fromkeys(
        ("embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout"), 0.3
    )
    plain = changed(
        SMALL, num_hidden_layers=3, num_experts=experts, compute_dtype="float64", **rates
    )
    config = changed(plain, activation_checkpointing=checkpointing, scan_layers=scan_layers)
    structure, _ = model_structure(config)
    batch = {"tokens": TOKENS, "targets": TOKENS, "loss_mask": np.ones(TOKENS.shape, bool)}

    def loss(weights: Any) -> Any:
        arrays, key = jax.tree.map(jnp.asarray, batch), jax.random.key(3)
        return next_token_loss(merge_weights(structure, weights), arrays, key)[0]

    return jax.jit(jax.value_and_grad(loss))(random_weights(plain))


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("checkpointing", "scan_layers"),
    [("none", True), ("dots", False), ("full", False), ("full", True)],
)
@pytest.mark.parametrize("experts", [0, 4])
def test_scanning_and_recomputing_change_not_one_number(
    experts: int, checkpointing: str, scan_layers: bool
) -> None:
    """Loss and gradients in float64 with all dropouts on, to the last few bits that the order of
    additions leaves open."""
    expected = loss_and_gradients(experts, "none", False)
    actual = loss_and_gradients(experts, checkpointing, scan_layers)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-14)


@pytest.mark.slow
def test_scanning_compiles_one_block_and_recomputing_keeps_less() -> None:
    deep = changed(SMALL, num_hidden_layers=8, hidden_size=64, intermediate_size=256)
    tokens = jnp.zeros((8, 64), jnp.int32)

    def compiled(config: ModelConfig) -> Any:
        structure, shapes = model_structure(config)

        def loss(weights: Any) -> Any:
            return jnp.sum(merge_weights(structure, weights)(tokens) ** 2)

        return jax.jit(jax.grad(loss)).lower(shapes).compile()

    plain = compiled(deep)
    scanned = compiled(changed(deep, scan_layers=True))
    assert len(scanned.as_text()) < 0.7 * len(plain.as_text())
    # XLA's CPU compiler finds the same product twice in straight code and keeps the first, so what
    # is computed again shows across the bounds of a loop only.
    full, dots = (
        compiled(changed(deep, scan_layers=True, activation_checkpointing=policy))
        for policy in ("full", "dots")
    )
    held = [program.memory_analysis().temp_size_in_bytes for program in (full, dots, scanned)]
    assert held[0] < 0.7 * held[1]
    assert held[1] < 0.7 * held[2]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_every_model_setting_changes_shapes_or_numbers(field: str) -> None:
    assert field in CASES, f"add a case for the new setting {field}"
    effect, beside = SEEN_IN.get(field, output), BESIDE.get(field, {})
    before = changed(ONE_LAYER, **beside)
    after = changed(ONE_LAYER, **{**beside, field: CASES[field]})
    assert not after.problems()
    assert effect(before) != effect(after)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_gradient_of_swiglu_is_right_for_every_gate(dtype: str, bound: float) -> None:
    """Of strongly negative gates, too, where a sigmoid made of tanh would be nothing but rounding."""
    rng = np.random.default_rng(0)
    for low in range(-20, 20, 2):
        gate, up, change = (
            jnp.asarray(rng.uniform(start, start + 2, 1000), dtype) for start in (low, 1, 1)
        )
        found = jax.jit(lambda *x: jax.vjp(_gated, *x[:2])[1](x[2]))(gate, up, change)
        gate, up, change = (np.asarray(each, np.float64) for each in (gate, up, change))
        sigmoid = 1 / (1 + np.exp(-gate))
        of_gate = change * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        for mine, right in zip(found, (of_gate, change * gate * sigmoid), strict=True):
            error = np.linalg.norm(np.asarray(mine, np.float64) - right)
            assert error <= bound * np.linalg.norm(right), low


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_swiglu_is_flat_beyond_what_exponentials_can_hold(dtype: str) -> None:
    gate, ones = jnp.asarray([-1e30, -1e4, -200.0, 200.0, 1e4], dtype), jnp.ones(5, dtype)
    of_gate, of_up = jax.vjp(_gated, gate, ones)[1](ones)
    np.testing.assert_array_equal(np.asarray(of_gate, np.float32), [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(of_up, jnp.where(gate > 0, gate, 0))
