"""Losses on answers that the model sampled: advantages, PPO and GRPO.

Each against a loop written from its paper, in both packages, and GRPO's against TRL's.
"""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from objective_cases import (
    PLACES,
    SLOPE_TOLERANCE,
    VOCAB,
    WIDE,
    WIDE_EXPERTS,
    answer_mask,
    log_softmax,
    of_function,
    of_models,
    of_tables,
    random_rows,
    slopes_of,
)
from parity import assert_equal_in, relative_error

from tinyllm_jax.config import RlhfConfig
from tinyllm_jax.objectives import advantages as jax_advantages
from tinyllm_jax.objectives import head_blocks
from tinyllm_jax.objectives import log_probs as jax_log_probs
from tinyllm_jax.objectives import policy as jax_policy
from tinyllm_jax.objectives.policy_objective import describe_values
from tinyllm_torch.objectives import advantages as torch_advantages
from tinyllm_torch.objectives import log_probs as torch_log_probs
from tinyllm_torch.objectives import policy as torch_policy

PACKAGES = ("jax", "torch")
ADVANTAGES: dict[str, Any] = {"jax": jax_advantages, "torch": torch_advantages}
POLICY: dict[str, Any] = {"jax": jax_policy, "torch": torch_policy}
LOG_PROBS: dict[str, Any] = {"jax": jax_log_probs, "torch": torch_log_probs}
CASES = {
    "grpo": RlhfConfig(kl_coef=0.3, clip_high=0.28),
    "grpo of answers": RlhfConfig(kl_coef=0.3, clip_low=0.1, loss_level="sequence"),
    "ppo": RlhfConfig(algorithm="ppo", value_coef=0.7, clip_high=0.3),
    "ppo of answers": RlhfConfig(algorithm="ppo", value_clip=0.0, loss_level="sequence"),
}
# The third answer has a tool's words in its middle; the last row fills the batch up.
SPANS = [[(2, 6)], [(4, 9)], [(1, 3), (5, 8)], [(3, 4)], []]
MASK = answer_mask(SPANS)
REAL = 4


def sampled(seed: int = 4, *, vocab: int = VOCAB) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    rows = {name: array % vocab for name, array in random_rows(numbers, len(SPANS)).items()}
    usual = -math.log(vocab)
    return {
        **rows,
        "loss_mask": MASK,
        "old_log_probs": usual + 0.5 * numbers.normal(size=MASK.shape),
        "reference_log_probs": usual + 0.5 * numbers.normal(size=MASK.shape),
        "advantages": numbers.normal(size=MASK.shape),
        "returns": numbers.normal(size=MASK.shape),
        "old_values": numbers.normal(size=MASK.shape),
    }


def tables(vocab: int = 5) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(11)
    return 0.5 * numbers.normal(size=(*MASK.shape, vocab)), numbers.normal(size=MASK.shape)


# Advantages -----------------------------------------------------------------------------------------


def sampled_places(row: int) -> list[int]:
    return [place for place in range(PLACES) if MASK[row, place]]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (0.9, 1.0)])
def test_generalised_advantages_are_the_sum_in_the_paper(
    discount: float, trace: float, package: str
) -> None:
    numbers = np.random.default_rng(1)
    rewards, values = numbers.normal(size=(2, *MASK.shape))
    expected = np.zeros(MASK.shape)
    for row in range(len(MASK)):
        places = sampled_places(row)
        r = [rewards[row, place] for place in places]
        v = [*(values[row, place] for place in places), 0.0]
        for t in range(len(places)):
            # Schulman et al. 2016, equation 16, with the residuals of equation 10.
            for later in range(len(places) - t):
                delta = r[t + later] + discount * v[t + later + 1] - v[t + later]
                expected[row, places[t]] += (discount * trace) ** later * delta
            if trace == 1.0:  # equation 18: what came, less what was expected
                came = sum(discount**i * reward for i, reward in enumerate(r[t:]))
                assert expected[row, places[t]] == pytest.approx(came - v[t])
    function = ADVANTAGES[package].generalised_advantages
    settings = {"discount": discount, "trace": trace}
    actual = of_function(package, function, rewards, values, MASK, **settings)
    assert relative_error(actual, expected) < 1e-10
    strange = np.where(MASK, rewards, np.nan), np.where(MASK, values, np.nan)
    np.testing.assert_array_equal(
        of_function(package, function, *strange, MASK, **settings), actual
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_each_token_pays_for_its_divergence_and_the_last_one_has_the_reward(package: str) -> None:
    numbers = np.random.default_rng(2)
    log_probs, reference = numbers.normal(size=(2, *MASK.shape))
    scores = numbers.normal(size=len(MASK))
    expected = np.zeros(MASK.shape)
    for row in range(len(MASK)):
        places = sampled_places(row)
        for place in places:
            # Shao et al. 2024, equation 2.
            expected[row, place] -= 0.3 * (log_probs[row, place] - reference[row, place])
        if places:
            expected[row, places[-1]] += scores[row]
    function = ADVANTAGES[package].token_rewards
    actual = of_function(package, function, scores, log_probs, reference, MASK, kl_coef=0.3)
    assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("normalised", [True, False])
def test_answers_are_compared_with_those_to_the_same_prompt(normalised: bool, package: str) -> None:
    rewards = np.array([1.0, 0.0, 0.5, 3.0, -2.0, 7.5, 0.1, 0.1, 0.1])
    expected = np.zeros(9)
    for group in range(3):
        own = [rewards[3 * group + i] for i in range(3)]
        mean = sum(own) / 3
        deviation = math.sqrt(sum((r - mean) ** 2 for r in own) / 2)
        for i in range(3):
            # Shao et al. 2024, section 4.1.2; plain: Liu et al. 2025.
            expected[3 * group + i] = own[i] - mean
            if normalised:
                expected[3 * group + i] /= deviation + 1e-4
    function = ADVANTAGES[package].group_advantages
    actual = of_function(package, function, rewards, group_size=3, normalised=normalised)
    assert relative_error(actual, expected) < 1e-10
    assert np.abs(actual[6:]).max() < 1e-10, "equal rewards say nothing"


@pytest.mark.parametrize("package", PACKAGES)
def test_normalised_advantages_are_those_of_all_sampled_tokens_together(package: str) -> None:
    given = np.where(MASK, np.random.default_rng(3).normal(2.0, 5.0, MASK.shape), np.nan)
    actual = of_function(package, ADVANTAGES[package].normalised_advantages, given, MASK)
    own = given[MASK]
    assert relative_error(actual[MASK], (own - np.mean(own)) / np.std(own)) < 1e-7
    assert not actual[~MASK].any()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kl", [0.0, 5.0, 6.3, 6.0, 60.0])
def test_the_weight_of_the_divergence_follows_its_target(kl: float, package: str) -> None:
    # Ziegler et al. 2019, section 2.2.
    error = (kl - 6.0) / 6.0
    error = min(max(error, -0.2), 0.2)
    expected = 0.15 * (1 + 0.1 * error)
    function = ADVANTAGES[package].adapted_kl_coef
    actual = of_function(package, function, np.array(0.15), np.array(kl), target=6.0)
    assert actual == pytest.approx(expected, rel=1e-12)
    assert (actual > 0.15) == (kl > 6.0)


# Losses ---------------------------------------------------------------------------------------------


def loop(
    logits: np.ndarray, values: np.ndarray, batch: Any, settings: RlhfConfig
) -> dict[str, float]:
    """Sum what the papers say of each token, or of each answer's mean."""
    sums: dict[str, float] = defaultdict(float)
    for row in range(REAL):
        places = sampled_places(row)
        share = 1.0 if settings.loss_level == "token" else 1.0 / len(places)
        for place in places:
            log_pi = log_softmax(logits[row, place])
            log_p = log_pi[batch["targets"][row, place]]
            old, reference, advantage, expected, old_value = (
                float(batch[name][row, place])
                for name in (
                    "old_log_probs",
                    "reference_log_probs",
                    "advantages",
                    "returns",
                    "old_values",
                )
            )
            value = float(values[row, place])
            # Schulman et al. 2017, equation 7; Yu et al. 2025, equation 8, for its two ends.
            ratio = math.exp(log_p - old)
            clipped = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            policy = -min(ratio * advantage, clipped * advantage)
            # Shao et al. 2024, equation 4.
            kl = math.exp(reference - log_p) - (reference - log_p) - 1
            told = {
                "policy_loss": policy,
                "kl": kl,
                "old_kl": math.exp(old - log_p) - (old - log_p) - 1,
                "ratio": ratio,
                "clip_fraction": float(policy != -ratio * advantage),
                "entropy": -sum(math.exp(each) * each for each in log_pi),
            }
            if settings.algorithm == "grpo":
                told["loss"] = policy + settings.kl_coef * kl  # equation 3
            else:
                near = min(
                    max(value, old_value - settings.value_clip), old_value + settings.value_clip
                )
                near = near if settings.value_clip else value
                # Schulman et al. 2017, equation 9, with the larger of two errors.
                told["value_loss"] = max((value - expected) ** 2, (near - expected) ** 2) / 2
                told["loss"] = policy + settings.value_coef * told["value_loss"]
                told["return"], told["return_square"] = expected, expected**2
                told["value_error"] = expected - value
                told["value_error_square"] = (expected - value) ** 2
            for name, number in told.items():
                sums[name] += share * number
    return dict(sums)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", CASES)
def test_a_loss_and_all_it_tells_are_those_of_a_loop_from_its_papers(
    name: str, package: str
) -> None:
    settings, batch, (logits, values) = CASES[name], sampled(vocab=5), tables()
    loss_sums = POLICY[package].make_policy_loss(settings)
    actual = of_tables(package, loss_sums, logits, values, batch)
    by_logits, by_values = actual.pop("by_logits"), actual.pop("by_scores")
    expected = loop(logits, values, batch, settings)
    assert_equal_in("float64", actual, expected | {"minimised": expected["loss"]})
    slopes = slopes_of(lambda at: loop(at, values, batch, settings)["loss"], logits)
    assert relative_error(by_logits, slopes) < SLOPE_TOLERANCE
    slopes = slopes_of(lambda at: loop(logits, at, batch, settings)["loss"], values)
    assert relative_error(by_values, slopes) < SLOPE_TOLERANCE
    assert by_values.any() == (settings.algorithm == "ppo")


def test_the_cases_go_beyond_every_end_of_the_clip_ranges() -> None:
    """Or else a wrong end would show nowhere."""
    batch, (logits, values) = sampled(vocab=5), tables()
    ratios, signs = [], []
    for row, place in zip(*np.nonzero(MASK), strict=True):
        log_p = log_softmax(logits[row, place])[batch["targets"][row, place]]
        ratios.append(math.exp(log_p - batch["old_log_probs"][row, place]))
        signs.append(batch["advantages"][row, place] > 0)
    high, low = np.array(ratios) > 1.3, np.array(ratios) < 0.8
    for outside in (high, low):
        assert {sign for sign, out in zip(signs, outside, strict=True) if out} == {True, False}
    moved = (values - batch["old_values"])[MASK]
    assert (moved > 0.2).any()
    assert (moved < -0.2).any()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_sums_are_divided_by_tokens_or_by_answers(level: str, package: str) -> None:
    weight = POLICY[package].make_policy_weight(RlhfConfig(loss_level=level))
    actual = of_function(package, lambda mask: weight({"loss_mask": mask}), MASK)
    assert actual == (MASK.sum() if level == "token" else REAL)
    passes = np.stack([MASK, MASK])  # as a mesh has them
    assert of_function(package, lambda mask: weight({"loss_mask": mask}), passes) == 2 * actual


def test_a_policy_that_has_not_moved_follows_the_plain_gradient() -> None:
    """With a ratio of 1 the slope of a token's loss is that of -advantage log p."""
    batch, (logits, values) = sampled(vocab=5), tables()
    log_probs = of_function(
        "jax", jax_log_probs.target_log_probs, logits, batch["targets"].astype(np.int32)
    )
    batch |= {"old_log_probs": log_probs, "reference_log_probs": log_probs}
    loss_sums = jax_policy.make_policy_loss(RlhfConfig(kl_coef=0.3))
    actual = of_tables("jax", loss_sums, logits, values, batch)

    def plain(at: np.ndarray) -> float:
        return -sum(
            float(batch["advantages"][row, place])
            * log_softmax(at[row, place])[batch["targets"][row, place]]
            for row, place in zip(*np.nonzero(MASK), strict=True)
        )

    assert relative_error(actual["by_logits"], slopes_of(plain, logits)) < SLOPE_TOLERANCE
    assert abs(actual["kl"]) < 1e-12
    assert actual["ratio"] == pytest.approx(MASK.sum())


@pytest.mark.parametrize("package", PACKAGES)
def test_what_no_one_sampled_counts_nowhere_whatever_stands_there(package: str) -> None:
    batch, (logits, values) = sampled(vocab=5), tables()
    loss_sums = POLICY[package].make_policy_loss(CASES["ppo"])
    expected = of_tables(package, loss_sums, logits, values, batch)
    names = ("old_log_probs", "reference_log_probs", "advantages", "returns", "old_values")
    for strange in (np.nan, np.inf, -1e30):
        batch |= {name: np.where(MASK, batch[name], strange) for name in names}
        actual = of_tables(package, loss_sums, logits, values, batch)
        for name, number in expected.items():
            np.testing.assert_array_equal(actual[name], number, err_msg=f"{name} {strange}")


@pytest.mark.parametrize("package", PACKAGES)
def test_explained_variance_is_that_of_the_returns(package: str) -> None:
    batch, (logits, values) = sampled(vocab=5), tables()
    told = of_tables(package, POLICY[package].make_policy_loss(CASES["ppo"]), logits, values, batch)
    means = {name: number / MASK.sum() for name, number in told.items()}
    returns, left = batch["returns"][MASK], (batch["returns"] - values)[MASK]
    expected = 1 - np.var(left) / np.var(returns)
    assert POLICY[package].explained_variance(means) == pytest.approx(expected, rel=1e-10)
    if package == "jax":
        names = ("return", "return_square", "value_error", "value_error_square")
        plain = {name: float(means[name]) for name in names}
        assert describe_values(plain) == {"explained_variance": pytest.approx(expected, rel=1e-10)}
        for reward in np.arange(1, 10, dtype=np.float32) / 10:  # the same for every answer
            squares = np.mean(np.full(1000, reward) ** 2, dtype=np.float32)
            alike = {"return": float(reward), "return_square": float(squares)}
            assert describe_values(plain | alike) == {}
        del plain["value_error"]  # as of GRPO
        assert describe_values(plain) == {}


@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, WIDE) for name in CASES), ("ppo of answers", WIDE_EXPERTS)],
    ids=lambda value: value if isinstance(value, str) else f"{value.num_experts} experts",
)
@pytest.mark.parametrize("block", [512, 16])  # tokens whose logits are made at once: all, and few
def test_both_packages_tell_the_same_and_have_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, config: Any, block: int
) -> None:
    monkeypatch.setattr(head_blocks, "CPU_BLOCK_TOKENS", block)
    numbers = {
        package: of_models(
            package, POLICY[package].make_policy_loss(CASES[name]), config, sampled()
        )
        for package in PACKAGES
    }
    assert_equal_in("float64", numbers["torch"], numbers["jax"])
    routed = config is WIDE_EXPERTS
    assert (numbers["jax"]["minimised"] != numbers["jax"]["loss"]) == routed
    if routed:
        np.testing.assert_allclose(numbers["jax"]["expert_load"].sum(-1), REAL)
    halves = [
        of_models("torch", torch_policy.make_policy_loss(CASES[name]), config, part)
        for part in ({key: rows[:2] for key, rows in sampled().items()},
                     {key: rows[2:] for key, rows in sampled().items()})
    ]  # fmt: skip
    if not routed:  # a balance over a pass is the pass's own
        whole = {key: halves[0][key] + halves[1][key] for key in halves[0]}
        assert_equal_in("float64", whole, numbers["jax"])


# Settings -------------------------------------------------------------------------------------------

OF_THE_LOSS = {
    "algorithm": ("ppo", {}),
    "loss_level": ("sequence", {}),
    "clip_low": (0.1, {}),
    "clip_high": (0.3, {}),
    "kl_coef": (0.1, {}),
    "value_coef": (0.6, {"algorithm": "ppo"}),
    "value_clip": (0.3, {"algorithm": "ppo"}),
}


def test_every_setting_of_the_loss_changes_it() -> None:
    batch, (logits, values) = sampled(vocab=5), tables()
    for field, (value, beside) in OF_THE_LOSS.items():
        losses = []
        for settings in (RlhfConfig(**beside), RlhfConfig(**{**beside, field: value})):
            loss_sums = torch_policy.make_policy_loss(settings)
            told = of_tables("torch", loss_sums, logits, values, batch)
            losses.append(float(told["loss"]))
        assert losses[0] != losses[1], field


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "Use 2 or more"),
        ({"kl_target": 6.0}, "says nothing to rlhf.algorithm=grpo"),
        ({"algorithm": "ppo", "kl_target": 6.0, "kl_coef": 0.0}, "it is 0"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings: dict[str, Any], message: str) -> None:
    (problem,) = RlhfConfig(reward="words:count", **settings).problems()
    assert message in problem


# TRL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "theirs"), [("grpo", "bnpo"), ("grpo of answers", "grpo")])
def test_grpo_is_that_of_trl(name: str, theirs: str) -> None:
    trl = pytest.importorskip("trl", reason="TRL is in the extra test")
    settings = CASES[name]
    batch = {key: rows[:REAL] for key, rows in sampled(vocab=5).items()}
    logits, values = (table[:REAL] for table in tables())
    given = torch.tensor(logits, requires_grad=True)
    targets = torch.tensor(batch["targets"])[..., None].long()
    by_token = torch.log_softmax(given, dim=-1).gather(-1, targets)[..., 0]
    entropies = torch.distributions.Categorical(logits=given).entropy()
    accelerator: Any = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, **_: x, sync_gradients=True
    )
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (by_token, entropies, None),
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=settings.kl_coef,
        loss_type=theirs,
        epsilon_low=settings.clip_low,
        epsilon_high=settings.clip_high,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    nothing = torch.zeros(REAL, 0, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": targets[..., 0],
        "completion_mask": torch.tensor(batch["loss_mask"]).long(),
        "advantages": torch.tensor(batch["advantages"]),
        "old_per_token_logps": torch.tensor(batch["old_log_probs"]),
        "ref_per_token_logps": torch.tensor(batch["reference_log_probs"]),
    }
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    (slopes,) = torch.autograd.grad(loss, [given])
    actual = of_tables("jax", jax_policy.make_policy_loss(settings), logits, values, batch)
    loss_weight = jax_policy.make_policy_weight(settings)
    weight = of_function("jax", lambda mask: loss_weight({"loss_mask": mask}), MASK)
    assert actual["loss"] / weight == pytest.approx(float(loss.detach()), rel=1e-10)
    assert relative_error(actual["by_logits"] / weight, slopes.numpy()) < 1e-10
    if settings.loss_level == "token":
        logged = trainer._metrics["eval"]
        for key, word in (
            ("kl", "kl"),
            ("entropy", "entropy"),
            ("clip_fraction", "clip_ratio/region_mean"),
        ):
            assert actual[key] / weight == pytest.approx(logged[word][0], rel=1e-6), key
