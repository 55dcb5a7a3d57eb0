"""Losses on pairs of answers: DPO and its like, and reward models.

Each against a loop written from its paper, against TRL, and in both packages.
"""

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from llama_oracle import random_weights
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
from parity import assert_equal_in, relative_error, torch_model

from tinyllm_jax.config import Config, OptimizerConfig, PreferenceConfig, TrainConfig
from tinyllm_jax.model import weights as jax_weights
from tinyllm_jax.objectives import head_blocks
from tinyllm_jax.objectives import preference as jax_preference
from tinyllm_jax.objectives import reward as jax_reward
from tinyllm_jax.training import step as jax_step
from tinyllm_torch.model import weights as torch_weights
from tinyllm_torch.objectives import preference as torch_preference
from tinyllm_torch.objectives import reward as torch_reward
from tinyllm_torch.training import step as torch_step

PACKAGES = ("jax", "torch")
PREFERENCE: dict[str, Any] = {"jax": jax_preference, "torch": torch_preference}
REWARD: dict[str, Any] = {"jax": jax_reward, "torch": torch_reward}
LOSSES = {
    "sigmoid": PreferenceConfig(),
    "sigmoid of means": PreferenceConfig(beta=0.7, length_normalised=True),
    "smoothed": PreferenceConfig(beta=0.3, label_smoothing=0.2),
    "ipo": PreferenceConfig(loss="ipo", beta=0.4),
    "ipo of means": PreferenceConfig(loss="ipo", beta=0.4, length_normalised=True),
    "simpo": PreferenceConfig(loss="simpo", beta=2.0, simpo_margin=0.6),
    "simpo smoothed": PreferenceConfig(loss="simpo", beta=2.5, label_smoothing=0.1),
}
# The last row fills the batch up; the second chosen answer has a tool's words in its middle.
CHOSEN = [[(2, 6)], [(1, 3), (5, 9)], [(4, 9)], []]
REJECTED = [[(2, 9)], [(1, 5)], [(4, 5)], []]
REAL = 3


def pairs(seed: int = 0) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(seed)
    batch = {}
    for kind, spans in (("chosen", CHOSEN), ("rejected", REJECTED)):
        rows = random_rows(numbers, len(spans))
        batch |= {f"{kind}_{name}": array for name, array in rows.items()}
        batch[f"{kind}_mask"] = answer_mask(spans)
        batch[f"reference_{kind}"] = -5.0 - 10 * numbers.random(len(spans))
    return batch


def for_tables(batch: dict[str, np.ndarray], *, vocab: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """Make the tokens few, and draw logits and scores of both answers of each pair."""
    numbers = np.random.default_rng(7)
    few = {
        name: array % vocab if name.endswith(("tokens", "targets")) else array
        for name, array in batch.items()
    }
    rows = 2 * len(batch["chosen_mask"])
    return few, numbers.normal(size=(rows, PLACES, vocab)), numbers.normal(size=(rows, PLACES + 1))


# From the papers -----------------------------------------------------------------------------------


def log_probability(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    """Add up log pi(y | x), one token of the answer after another."""
    return sum(
        log_softmax(logits[place])[targets[place]] for place in range(len(mask)) if mask[place]
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def loop(logits: np.ndarray, batch: Any, settings: PreferenceConfig) -> dict[str, float]:
    """Sum over pairs what the papers say of each."""
    beta, wrong = settings.beta, settings.label_smoothing
    sums: dict[str, float] = defaultdict(float)
    for row in range(REAL):
        log_pi, log_ref, length = {}, {}, {}
        for side, kind in enumerate(("chosen", "rejected")):
            targets, mask = batch[f"{kind}_targets"][row], batch[f"{kind}_mask"][row]
            log_pi[kind] = log_probability(logits[2 * row + side], targets, mask)
            log_ref[kind] = float(batch[f"reference_{kind}"][row])
            length[kind] = int(mask.sum())
            sums[f"{kind}_log_prob"] += log_pi[kind]
        if settings.loss == "simpo":
            # Meng et al. 2024, equation 6, whose gamma is the wanted margin.
            reward = {kind: beta / length[kind] * log_pi[kind] for kind in log_pi}
            inside = reward["chosen"] - reward["rejected"] - settings.simpo_margin
        else:
            ratio = {kind: log_pi[kind] - log_ref[kind] for kind in log_pi}
            for kind in ratio:
                sums[f"{kind}_kl"] += ratio[kind]
                ratio[kind] /= length[kind] if settings.length_normalised else 1
            # Rafailov et al. 2023, equation 7, and their implicit reward beta log(pi / pi_ref).
            reward = {kind: beta * ratio[kind] for kind in ratio}
            inside = reward["chosen"] - reward["rejected"]
        if settings.loss == "ipo":
            # Azar et al. 2023, equation 17, whose tau is beta.
            h = ratio["chosen"] - ratio["rejected"]
            sums["loss"] += (h - 1 / (2 * beta)) ** 2
        else:
            # Mitchell 2023: a share of the labels is wrong.
            sums["loss"] += -(1 - wrong) * math.log(sigmoid(inside))
            sums["loss"] += -wrong * math.log(sigmoid(-inside))
        sums["margin"] += reward["chosen"] - reward["rejected"]
        sums["accuracy"] += reward["chosen"] > reward["rejected"]
        for kind, value in reward.items():
            sums[f"{kind}_reward"] += value
    return dict(sums)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_all_it_tells_are_those_of_a_loop_from_its_paper(
    name: str, package: str
) -> None:
    settings = LOSSES[name]
    batch, logits, scores = for_tables(pairs(), vocab=5)
    loss_sums = PREFERENCE[package].make_preference_loss(settings)
    actual = of_tables(package, loss_sums, logits, scores, batch)
    by_logits = actual.pop("by_logits")
    assert not actual.pop("by_scores").any()
    expected = loop(logits, batch, settings)
    assert 0 < expected["accuracy"] < REAL, "pairs of one kind show less"
    assert_equal_in("float64", actual, expected | {"minimised": expected["loss"]})
    slopes = slopes_of(lambda at: loop(at, batch, settings)["loss"], logits[: 2 * REAL])
    assert relative_error(by_logits[: 2 * REAL], slopes) < SLOPE_TOLERANCE
    assert not by_logits[2 * REAL :].any()


@pytest.mark.parametrize("package", PACKAGES)
def test_the_loss_of_a_reward_model_is_that_of_a_loop_from_its_paper(package: str) -> None:
    batch, logits, scores = for_tables(pairs(), vocab=5)

    def loop_of_rewards(scores: np.ndarray) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for row in range(REAL):
            score = {}
            for side, (kind, spans) in enumerate((("chosen", CHOSEN), ("rejected", REJECTED))):
                # Targets stand one place further than the tokens before them.
                score[kind] = float(scores[2 * row + side, spans[row][-1][1]])
                sums[f"{kind}_score"] += score[kind]
            # Ouyang et al. 2022, equation 1, with one pair to a prompt.
            sums["loss"] += -math.log(sigmoid(score["chosen"] - score["rejected"]))
            sums["margin"] += score["chosen"] - score["rejected"]
            sums["accuracy"] += score["chosen"] > score["rejected"]
        return dict(sums)

    actual = of_tables(package, REWARD[package].make_reward_loss(), logits, scores, batch)
    slopes, _ = actual.pop("by_scores"), actual.pop("by_logits")
    expected = loop_of_rewards(scores)
    assert_equal_in("float64", actual, expected | {"minimised": expected["loss"]})
    measured = slopes_of(lambda at: loop_of_rewards(at)["loss"], scores)
    assert relative_error(slopes, measured) < SLOPE_TOLERANCE


@pytest.mark.parametrize("package", PACKAGES)
def test_margins_too_large_for_an_exponential_have_a_loss(package: str) -> None:
    chosen, rejected = np.array([2000.0, -2000.0]), np.zeros(2)
    settings = PreferenceConfig()
    module = PREFERENCE[package]
    losses = of_function(package, module.preference_losses, chosen, rejected, settings=settings)
    assert losses.tolist() == [0.0, 2000.0]
    assert of_function(package, REWARD[package].reward_losses, chosen, rejected).tolist() == [
        0,
        2000,
    ]


# Both packages --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, WIDE) for name in [*LOSSES, "reward"]),
        # What routers add does not depend on the loss.
        *((name, WIDE_EXPERTS) for name in ("sigmoid", "reward")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.num_experts} experts",
)
@pytest.mark.parametrize("block", [512, 16])  # tokens whose logits are made at once: all, and few
def test_both_packages_tell_the_same_and_have_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, config: Any, block: int
) -> None:
    monkeypatch.setattr(head_blocks, "CPU_BLOCK_TOKENS", block)
    losses = {
        package: REWARD[package].make_reward_loss()
        if name == "reward"
        else PREFERENCE[package].make_preference_loss(LOSSES[name])
        for package in PACKAGES
    }
    actual, expected = (of_models(p, losses[p], config, pairs()) for p in ("torch", "jax"))
    assert_equal_in("float64", actual, expected)
    routed = config is WIDE_EXPERTS
    assert ("router_balance_loss" in expected) == routed
    assert (expected["minimised"] != expected["loss"]) == routed
    if routed:  # each told number is a mean when it is divided by the pairs
        np.testing.assert_allclose(expected["expert_load"].sum(-1), REAL)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["sigmoid", "simpo", "reward"])
def test_rows_of_padding_count_nowhere_whatever_stands_in_them(name: str, package: str) -> None:
    batch = pairs()
    batch["chosen_mask"][REAL, 2:5] = True  # one answer is no pair
    if name == "simpo":  # it has no reference
        batch = {key: rows for key, rows in batch.items() if "reference" not in key}
    else:
        batch |= {
            key: np.where(np.arange(REAL + 1) < REAL, rows, np.nan)
            for key, rows in batch.items()
            if "reference" in key
        }
    module = PREFERENCE[package]
    loss_sums = (
        REWARD[package].make_reward_loss()
        if name == "reward"
        else module.make_preference_loss(LOSSES[name])
    )
    filled = of_models(package, loss_sums, WIDE, batch)
    alone = of_models(package, loss_sums, WIDE, {key: rows[:REAL] for key, rows in batch.items()})
    assert_equal_in("float64", filled, alone)
    # On a mesh the rows of a step are cut into passes before they are counted.
    masks = {key: rows[None] for key, rows in batch.items() if key.endswith("mask")}
    assert float(of_function(package, lambda *rows: module.count_pairs(
        dict(zip(masks, rows, strict=True))), *masks.values())) == REAL  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_a_score_is_read_after_the_last_token_of_the_answer_and_before_any_other(
    package: str,
) -> None:
    numbers = np.random.default_rng(3)
    rows = random_rows(numbers, 2)
    mask = answer_mask([[(2, 9)], [(2, 5)]])

    def scores(tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        weights = random_weights(WIDE)
        if package == "jax":
            with jax.enable_x64(True):
                structure, _ = jax_weights.model_structure(WIDE)
                model: Any = jax_weights.merge_weights(structure, weights)
                arrays = map(jnp.asarray, (tokens, targets, mask))
                return np.asarray(jax_reward.answer_scores(model, *arrays, dropout_key=None)[0])
        arrays = map(torch.tensor, (tokens, targets, mask))
        model = torch_model(WIDE, weights)
        found, _ = torch_reward.answer_scores(model, *arrays, generator=None)
        return found.detach().numpy()

    before = scores(**rows)
    whole = np.concatenate([rows["tokens"], rows["targets"][:, -1:]], axis=1)
    for place in range(PLACES + 1):
        other = whole.copy()
        other[:, place] = (other[:, place] + 1) % VOCAB
        after = scores(other[:, :-1], other[:, 1:])
        assert (after != before).tolist() == [True, place <= 5], place


# Training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "passes"), [("sigmoid", 2), ("simpo", 1), ("reward", 1)])
def test_both_packages_learn_to_tell_the_answers_apart_alike(name: str, passes: int) -> None:
    """The head over the vocabulary has no part in a reward, nor the score head in a preference."""
    model = dataclasses.replace(WIDE, tie_word_embeddings=False)
    config = Config(
        model=model,
        train=TrainConfig(max_steps=8, batch_size=4 // passes, gradient_accumulation_steps=passes),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    )
    weights, batch, numbers = random_weights(model), pairs(), {}
    arrays = {}
    for package, step in (("jax", jax_step), ("torch", torch_step)):
        loss_sums = (
            REWARD[package].make_reward_loss()
            if name == "reward"
            else PREFERENCE[package].make_preference_loss(LOSSES[name])
        )
        count = PREFERENCE[package].count_pairs
        with jax.enable_x64(True):
            if package == "jax":
                structure: Any = jax_weights.model_structure(model)[0]
                start: Any = {key: jnp.asarray(value) for key, value in weights.items()}
                take = jax.jit(jax_step.make_train_step(config, structure, loss_sums, count))
            else:
                structure = torch_weights.model_structure(model)[0]
                start = torch_weights.from_jax_weights(weights)
                start = torch_weights.as_tensors(start, model, device="cpu")
                take = torch_step.make_train_step(config, structure, loss_sums, count)
            state: Any = step.new_state(config, start)
            rows = []
            for _ in range(config.train.max_steps):
                state, told = take(state, batch)
                rows.append({key: float(value) for key, value in told.items()})
        numbers[package] = {key: [row[key] for row in rows] for key in rows[0]}
        arrays[package] = state.weights
    assert_equal_in("float64", numbers["torch"], numbers["jax"])
    named = torch_weights.from_jax_weights(arrays["jax"])
    assert_equal_in("float64", arrays["torch"], named)
    margins = numbers["jax"]["margin"]
    assert margins[-1] > margins[0] + 0.1
    assert numbers["jax"]["accuracy"][-1] == 1.0
    assert set(numbers["jax"]["targets"]) == {REAL}


# Settings ---------------------------------------------------------------------------------------------

CHANGED = {
    "loss": ("ipo", {}),
    "beta": (0.2, {}),
    "label_smoothing": (0.1, {}),
    "length_normalised": (True, {}),
    "simpo_margin": (0.5, {"loss": "simpo"}),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PreferenceConfig)])
def test_every_setting_changes_the_loss(field: str) -> None:
    value, beside = CHANGED[field]
    batch, logits, scores = for_tables(pairs(), vocab=5)
    settings = [PreferenceConfig(**beside), PreferenceConfig(**{**beside, field: value})]
    assert not any(each.problems() for each in settings)
    losses = [
        of_tables("torch", torch_preference.make_preference_loss(each), logits, scores, batch)
        for each in settings
    ]
    assert losses[0]["loss"] != losses[1]["loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "says nothing to dpo.loss=ipo"),
        ({"loss": "simpo", "length_normalised": True}, "which always is"),
        ({"simpo_margin": 0.5}, "Use dpo.loss=simpo"),
    ],
)
def test_settings_that_say_nothing_are_named(settings: dict[str, Any], message: str) -> None:
    (problem,) = PreferenceConfig(**settings).problems()
    assert message in problem


# TRL ----------------------------------------------------------------------------------------------------


class Accelerator:
    """One process."""

    device = torch.device("cpu")

    @staticmethod
    def gather(values: Any) -> Any:
        return values

    gather_for_metrics = gather


def metrics() -> Any:
    return defaultdict(lambda: defaultdict(list))


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is in the extra test")


def trl_dpo(trl: Any, settings: PreferenceConfig, batch: Any, log_probs: torch.Tensor) -> Any:
    """Let TRL's own trainer compute the loss and what it logs, from log-probabilities of tokens."""
    mask = torch.tensor(np.concatenate([batch["chosen_mask"], batch["rejected_mask"]]))
    first = torch.zeros(len(mask), 1, dtype=torch.bool)
    zeros = torch.zeros_like(log_probs)
    words = {"log_probs": log_probs * mask, "entropy": zeros, "mean_logits": zeros}
    names = {"sigmoid": "sigmoid", "ipo": "ipo"}
    kind = names[settings.loss]
    if settings.loss == "sigmoid" and settings.length_normalised:
        kind = "sigmoid_norm"
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=settings.beta,
        use_weighting=False,
        _metrics=metrics(),
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros(len(mask), PLACES + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(mask), PLACES + 1, dtype=torch.long),
        "completion_mask": torch.cat([first, mask], dim=1).long(),
        "ref_chosen_logps": torch.tensor(batch["reference_chosen"]),
        "ref_rejected_logps": torch.tensor(batch["reference_rejected"]),
    }

    def model(**_: Any) -> Any:
        return SimpleNamespace(**words, is_top1=torch.zeros_like(mask))

    loss = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items()}


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid of means", "ipo of means"])
def test_dpo_is_that_of_trl(name: str, trl: Any) -> None:
    settings, batch = LOSSES[name], {key: rows[:REAL] for key, rows in pairs().items()}
    few, logits, scores = for_tables(batch, vocab=5)
    given = torch.tensor(logits, requires_grad=True)
    targets = torch_preference.both_answers(
        {key: torch.tensor(rows) for key, rows in few.items()}, "targets"
    )
    by_token = torch.log_softmax(given, dim=-1).gather(-1, targets[..., None].long())[..., 0]
    loss, logged = trl_dpo(trl, settings, batch, torch.cat([by_token[0::2], by_token[1::2]]))
    (slopes,) = torch.autograd.grad(loss, [given])
    actual = of_tables("jax", jax_preference.make_preference_loss(settings), logits, scores, few)
    assert relative_error(actual["by_logits"] / REAL, slopes.numpy()) < 1e-10
    means = {key: actual[key] / REAL for key in ("loss", "accuracy", "chosen_log_prob")}
    theirs = {
        "loss": float(loss.detach()),
        "accuracy": logged["rewards/accuracies"],
        "chosen_log_prob": logged["logps/chosen"],
    }
    if not settings.length_normalised:  # TRL logs rewards of sums with every loss
        names = {"margin": "margins", "chosen_reward": "chosen", "rejected_reward": "rejected"}
        means |= {key: actual[key] / REAL for key in names}
        theirs |= {key: logged[f"rewards/{word}"] for key, word in names.items()}
    for key, value in theirs.items():
        # TRL counts in float32.
        assert means[key] == pytest.approx(value, rel=1e-6 if key == "accuracy" else 1e-10), key


@pytest.mark.parametrize("name", ["smoothed", "simpo", "simpo smoothed", "ipo"])
def test_smoothing_simpo_and_ipo_of_sums_are_those_of_trls_cpo(name: str, trl: Any) -> None:
    """Without a reference of its own, it is given ratios where ours takes them from one."""
    del trl
    from trl.experimental.cpo import CPOTrainer

    settings, numbers = LOSSES[name], np.random.default_rng(5)
    chosen, rejected = (torch.tensor(3 * numbers.normal(size=6)) for _ in range(2))
    trainer: Any = SimpleNamespace(
        accelerator=Accelerator(),
        alpha=0.0,
        loss_type=settings.loss,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        simpo_gamma=settings.simpo_margin,
    )
    expected, *rewards = CPOTrainer.cpo_loss(trainer, chosen, rejected)  # type: ignore[arg-type]
    for package in PACKAGES:
        ours = [reward.numpy() for reward in rewards]
        losses = of_function(
            package, PREFERENCE[package].preference_losses, *ours, settings=settings
        )
        assert relative_error(losses, expected) < 1e-10


def test_the_loss_of_a_reward_model_is_that_of_trl(trl: Any) -> None:
    batch = {key: rows[:REAL] for key, rows in pairs().items()}
    few, logits, scores = for_tables(batch, vocab=5)
    actual = of_tables("jax", jax_reward.make_reward_loss(), logits, scores, few)
    given = torch.tensor(scores, requires_grad=True)
    ends = [spans[row][-1][1] for row in range(REAL) for spans in (CHOSEN, REJECTED)]
    last = given[torch.arange(2 * REAL), torch.tensor(ends)]
    rewards = torch.cat([last[0::2], last[1::2]])[:, None]
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=Accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=None),
        _metrics=metrics(),
        _total_train_tokens=0,
    )
    inputs: Any = {"attention_mask": torch.ones(1)}
    loss: Any = trl.RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=rewards), inputs
    )
    (slopes,) = torch.autograd.grad(loss, [given])
    assert actual["loss"] / REAL == pytest.approx(float(loss.detach()), rel=1e-10)
    assert relative_error(actual["by_scores"] / REAL, slopes.numpy()) < 1e-10
    logged = trainer._metrics["eval"]
    for key in ("accuracy", "margin"):
        assert actual[key] / REAL == pytest.approx(logged[key][0], rel=1e-6), key
