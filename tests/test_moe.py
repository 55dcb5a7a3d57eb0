"""Mixture of experts: the grouped product, routing, what is dropped (nothing), and the losses."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision
from llama_oracle import SMALL, changed, random_weights
from parity import real_batch

from tinyllm_jax.model.grouped_dot import (
    LARGEST_BLOCK,
    SMALLEST_BLOCK,
    block_size,
    blockwise_dot,
    grouped_dot,
)
from tinyllm_jax.model.moe import Routing, permute, routing
from tinyllm_jax.model.weights import (
    count_active_parameters,
    count_parameters,
    flops_per_token,
    merge_weights,
    model_structure,
)
from tinyllm_jax.objectives.pretrain import next_token_loss

EXPERTS = changed(
    SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, compute_dtype="float64"
)
TOKENS = np.random.default_rng(1).integers(0, SMALL.vocab_size, (3, 14))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# The grouped product ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [(5, 3, 9), (0, 17, 0), (0, 0, 17), (17, 0, 0), (8, 8, 8), (1, 1, 1), (300, 1, 259), (600,)],
)
def test_blocks_give_the_product_and_gradients_of_ragged_dot(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.standard_normal((sum(sizes), 7)))
    kernels = jnp.asarray(rng.standard_normal((len(sizes), 7, 5)))
    factor = jnp.asarray(rng.standard_normal((sum(sizes), 5)))
    group_sizes = jnp.asarray(sizes, jnp.int32)

    def numbers(product: Any) -> Any:
        def summed(rows: Any, kernels: Any) -> Any:
            out = product(rows, kernels, group_sizes)
            return jnp.sum(factor * out**2), out

        return jax.jit(jax.value_and_grad(summed, argnums=(0, 1), has_aux=True))(rows, kernels)

    actual, expected = numbers(blockwise_dot), numbers(jax.lax.ragged_dot)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


def test_the_product_by_blocks_does_not_multiply_every_row_by_every_matrix() -> None:
    """XLA's own grouped product does on the CPU; its compiler counts the operations."""

    def operations(product: Any) -> float:
        shapes = [(512, 64), (8, 64, 64)]
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
        analysis: Any = jax.jit(product).lower(*operands, sizes).compile().cost_analysis()
        return analysis["flops"]

    # The compiler counts the body of a loop once.
    assert operations(blockwise_dot) < operations(jax.lax.ragged_dot) / 8


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 100, 4096])
def test_blocks_are_about_as_long_as_a_group(rows: int) -> None:
    size = block_size(rows, 4)
    assert SMALLEST_BLOCK <= size <= LARGEST_BLOCK
    assert size & (size - 1) == 0


def test_the_cpu_multiplies_by_blocks_and_accelerators_by_ragged_dot(monkeypatch) -> None:
    operands = (jnp.ones((4, 3)), jnp.ones((2, 3, 3)), jnp.asarray([1, 3]))

    def program() -> str:
        return str(
            jax.make_jaxpr(lambda *x: grouped_dot(*x, precision=Precision.HIGHEST))(*operands)
        )

    assert "ragged_dot" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "ragged_dot" in program()
    assert "HIGHEST" in program()


def test_a_permutation_has_the_gradient_of_a_gather() -> None:
    order = jnp.asarray([2, 0, 3, 1])
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))

    def moved(rows: Any) -> Any:
        return jnp.sum(permute(rows, order, jnp.argsort(order)) * jnp.arange(12.0).reshape(4, 3))

    def gathered(rows: Any) -> Any:
        return jnp.sum(rows[order] * jnp.arange(12.0).reshape(4, 3))

    np.testing.assert_array_equal(jax.grad(moved)(rows), jax.grad(gathered)(rows))


# The layer ----------------------------------------------------------------------------------------


def hidden(config: Any, weights: Any, counted: Any = None) -> Any:
    structure, _ = model_structure(config)

    @jax.jit
    def run(weights: Any) -> Any:
        found = merge_weights(structure, weights).hidden(jnp.asarray(TOKENS), counted=counted)
        return found.states, found.routing

    return run(weights)


@pytest.mark.parametrize("renormalise", [True, False])
def test_one_expert_that_every_token_passes_is_the_dense_model(renormalise: bool) -> None:
    one = changed(
        EXPERTS, num_experts=1, num_experts_per_tok=1, norm_topk_prob=renormalise,
        moe_intermediate_size=SMALL.intermediate_size,
    )  # fmt: skip
    weights = random_weights(one)
    dense = {
        name.replace(".experts.", "."): weight[0] if ".experts." in name else weight
        for name, weight in weights.items()
        if ".gate.kernel" not in name
    }
    expected, nothing = hidden(changed(SMALL, compute_dtype="float64"), dense)
    actual, found = hidden(one, weights)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)
    assert nothing is None
    np.testing.assert_allclose(found.balance_loss, 1.0)
    np.testing.assert_allclose(found.load, 1.0)


def layer_by_loops(config: Any, weights: Any, x: np.ndarray) -> np.ndarray:
    """Compute one MoE layer token by token, from the formulas, with nothing sorted or grouped."""

    def mlp(token: np.ndarray, gate: Any, up: Any, down: Any) -> np.ndarray:
        inner = token @ gate
        return (inner / (1 + np.exp(-inner)) * (token @ up)) @ down

    def part(name: str) -> Any:
        return weights[f"layers.0.mlp.{name}.kernel"]

    parts = [part(f"experts.{name}_proj") for name in ("gate", "up", "down")]
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        scores = np.exp(x[place] @ part("gate"))
        scores /= scores.sum()
        chosen = np.argsort(-scores)[: config.num_experts_per_tok]
        total = scores[chosen].sum() if config.norm_topk_prob else 1.0
        for expert in chosen:
            own = [stacked[expert] for stacked in parts]
            out[place] += scores[expert] / total * mlp(x[place], *own)
        if config.num_shared_experts > 0:
            shared = [part(f"shared_experts.{name}_proj") for name in ("gate", "up", "down")]
            out[place] += mlp(x[place], *shared)
    return out


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("per_token", [1, 3])
def test_the_layer_is_what_loops_over_tokens_and_experts_give(
    per_token: int, renormalise: bool, shared: int
) -> None:
    config = changed(
        EXPERTS, num_experts_per_tok=per_token, norm_topk_prob=renormalise,
        num_shared_experts=shared, num_hidden_layers=1,
    )  # fmt: skip
    weights, structure = random_weights(config), model_structure(config)[0]
    x = np.random.default_rng(0).standard_normal((2, 9, config.hidden_size))

    @jax.jit
    def run(weights: Any) -> Any:
        moe: Any = merge_weights(structure, weights).layers[0].mlp
        return moe(jnp.asarray(x), jnp.ones((2, 9), bool), dropout_key=None)[0]

    np.testing.assert_allclose(run(weights), layer_by_loops(config, weights, x), rtol=0, atol=1e-12)


def test_no_token_is_dropped_where_all_choose_the_same_experts() -> None:
    weights = random_weights(EXPERTS)
    structure = model_structure(EXPERTS)[0]
    x = np.abs(np.random.default_rng(0).standard_normal((2, 30, EXPERTS.hidden_size)))
    # Positive inputs and these columns: every token prefers expert 2, then 0.
    router = np.zeros((EXPERTS.hidden_size, 4))
    router[:, 2], router[:, 0] = 1.0, 0.5
    weights["layers.0.mlp.gate.kernel"] = router

    @jax.jit
    def run(weights: Any) -> Any:
        moe: Any = merge_weights(structure, weights).layers[0].mlp
        return moe(jnp.asarray(x), jnp.ones((2, 30), bool), dropout_key=None)

    mixed, found = run(weights)
    np.testing.assert_array_equal(found.load, [0.5, 0, 0.5, 0])
    expected = layer_by_loops(EXPERTS, weights, x)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-12)
    assert (np.abs(expected).max(axis=-1) > 1e-3).all()


def test_dropout_reaches_the_inside_of_the_experts() -> None:
    config = changed(EXPERTS, mlp_dropout=0.5)
    structure, _ = model_structure(config)

    @jax.jit
    def run(weights: Any, key: Any) -> Any:
        return merge_weights(structure, weights)(jnp.asarray(TOKENS), dropout_key=key)

    weights = random_weights(config)
    assert not np.allclose(run(weights, None), run(weights, jax.random.key(0)))


# Routing ------------------------------------------------------------------------------------------


def routing_by_loops(
    config: Any, logits: np.ndarray, probabilities: Any, choices: Any, counted: Any
) -> Routing:
    """Compute the three numbers from the papers' formulas, token by token."""
    experts, per_token = config.num_experts, config.num_experts_per_tok

    def shares(places: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        load, mean = np.zeros(experts), np.zeros(experts)
        for place in places:
            for expert in choices[place]:
                load[expert] += 1 / (len(places) * per_token)
            mean += probabilities[place] / len(places)
        return load, mean

    rows, length = counted.shape
    inside = [[(r, t) for t in range(length) if counted[r, t]] for r in range(rows)]
    everywhere = [place for row in inside for place in row]
    groups = [everywhere] if config.router_aux_loss_level == "batch" else [g for g in inside if g]
    balances = [experts * np.dot(*shares(group)) for group in groups]
    tokens = [len(group) for group in groups]
    z = [np.log(np.exp(logits[place]).sum()) ** 2 for place in everywhere]
    balance = np.average(balances, weights=tokens)
    return Routing(*map(np.asarray, (balance, np.mean(z), shares(everywhere)[0])))


@pytest.mark.parametrize("level", ["batch", "sequence"])
def test_the_router_losses_are_the_papers_and_leave_padding_out(level: str) -> None:
    config = changed(EXPERTS, router_aux_loss_level=level)
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 6, 4)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    choices = np.argsort(-logits, axis=-1)[..., :2]
    counted = np.ones((4, 6), bool)
    counted[1, 3:] = counted[2] = False  # a row half and a row all padding
    arrays = (logits, probabilities, choices, counted)
    actual = routing(*map(jnp.asarray, arrays), config)
    for one, other in zip(actual, routing_by_loops(config, *arrays), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", ["batch", "sequence"])
def test_experts_that_are_loaded_alike_have_a_balance_loss_of_one(level: str) -> None:
    config = changed(EXPERTS, num_experts_per_tok=1, router_aux_loss_level=level)
    choices = jnp.tile(jnp.arange(4), (3, 2))[..., None]
    logits = jnp.zeros((3, 8, 4))
    found = routing(logits, logits + 0.25, choices, jnp.ones((3, 8), bool), config)
    np.testing.assert_allclose(found.balance_loss, 1.0)
    np.testing.assert_allclose(found.z_loss, np.log(4) ** 2)
    np.testing.assert_allclose(found.load, 0.25)


def test_padding_says_nothing_of_the_load_and_changes_no_other_token() -> None:
    weights = random_weights(EXPERTS)
    counted = np.ones(TOKENS.shape, bool)
    counted[:, 10:] = False
    states, found = hidden(EXPERTS, weights, jnp.asarray(counted))
    whole, everything = hidden(EXPERTS, weights)
    np.testing.assert_allclose(states, whole, rtol=0, atol=1e-12)
    assert found.load.shape == (2, 4)
    np.testing.assert_allclose(np.sum(found.load, axis=-1), 1.0)
    # Shares of 30 tokens with two choices each, in both layers.
    np.testing.assert_allclose(found.load * 60, np.round(found.load * 60), atol=1e-9)
    assert not np.allclose(found.load, everything.load)


@pytest.mark.parametrize("level", ["batch", "sequence"])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_what_stands_in_padding_moves_no_router(
    packing: str, level: str, prepared_folder: Path
) -> None:
    config = changed(EXPERTS, vocab_size=512, router_aux_loss_level=level, router_z_loss_coef=0.1)
    batch = real_batch(packing, prepared_folder)
    structure, weights = model_structure(config)[0], random_weights(config)
    # Behind the last target of a row, nothing but padding comes.
    behind = np.cumsum(batch["loss_mask"][:, ::-1], axis=1)[:, ::-1] == 0
    assert behind.any()

    @jax.jit
    def told(weights: Any, batch: Any) -> Any:
        return next_token_loss(merge_weights(structure, weights), batch, None)

    other = batch | {"tokens": np.where(behind, 7, batch["tokens"])}
    for one, two in zip(*(jax.tree.leaves(told(weights, b)) for b in (batch, other)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)


def test_router_losses_add_up_over_unevenly_filled_passes(prepared_folder: Path) -> None:
    config = changed(
        EXPERTS, vocab_size=512, router_aux_loss_level="sequence", router_z_loss_coef=0.1
    )
    batch = real_batch("padded", prepared_folder)
    structure, weights = model_structure(config)[0], random_weights(config)

    @jax.jit
    def sums(weights: Any, batch: Any) -> Any:
        return next_token_loss(merge_weights(structure, weights), batch, None)

    halves = [sums(weights, {n: rows[part] for n, rows in batch.items()}) for part in np.s_[:2, 2:]]
    assert batch["loss_mask"][:2].sum() != batch["loss_mask"][2:].sum()
    added = jax.tree.map(lambda one, two: one + two, *halves)
    for one, two in zip(jax.tree.leaves(added), jax.tree.leaves(sums(weights, batch)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


def test_a_gradient_in_bfloat16_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    rows, change = (jnp.asarray(rng.standard_normal((8192, 4)), jnp.bfloat16) for _ in range(2))
    kernels, sizes = jnp.ones((1, 4, 4), jnp.bfloat16), jnp.asarray([8192])
    _, pull = jax.vjp(lambda kernels: blockwise_dot(rows, kernels, sizes), kernels)
    exact = np.asarray(rows, np.float64).T @ np.asarray(change, np.float64)
    error = np.abs(np.asarray(pull(change)[0][0], np.float64) - exact).max() / np.abs(exact).max()
    assert error < 2**-8


# Counting -----------------------------------------------------------------------------------------


def test_parameters_and_operations_of_experts_are_counted() -> None:
    config = changed(EXPERTS, num_shared_experts=1)
    total, _ = count_parameters(config)
    assert total == sum(weight.size for weight in random_weights(config).values())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert total - count_active_parameters(config) == config.num_hidden_layers * 2 * expert
    # A token costs what it costs in a dense model as wide as its experts together, and the router.
    wide = dataclasses.replace(
        changed(SMALL, compute_dtype="float64"), intermediate_size=3 * config.moe_intermediate_size
    )
    router = config.num_hidden_layers * config.hidden_size * config.num_experts
    assert flops_per_token(config, sequence_length=9) == (
        flops_per_token(wide, sequence_length=9) + 6 * router
    )
