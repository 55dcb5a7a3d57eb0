"""Sampled answers and the batches made of them, against computations of their own in NumPy."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllm_jax.config import Config, ModelConfig, RlhfConfig, TokenizerConfig
from tinyllm_jax.data.chat import Message
from tinyllm_jax.data.chat_template import CONTROL_TOKENS, ChatTemplate
from tinyllm_jax.data.prepare_prompts import Prompt, PromptData, PromptSplit
from tinyllm_jax.data.tokenizer import extend_tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.generate import SMALLEST_BUCKET
from tinyllm_jax.model.weights import initial_weights, merge_weights, model_structure
from tinyllm_jax.objectives import head_blocks
from tinyllm_jax.objectives.rewards import Answers, load_reward_function, words_used
from tinyllm_jax.objectives.rollouts import Rollouts

GROUP, PROMPTS, SEQ, NEW = 4, 6, 48, 14


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    stories = generate_stories(seed=3, start=0, stop=60)
    tokenizer = train_tokenizer(stories, config=TokenizerConfig(), vocab_size=320)
    return ChatTemplate(extend_tokenizer(tokenizer, CONTROL_TOKENS))


def prompts_of(template: ChatTemplate, texts: list[str]) -> PromptSplit:
    made = []
    for number, text in enumerate(texts):
        messages = (Message("user", text),)
        made.append(Prompt(template.encode_prompt(messages), messages, "", {"n": number}))
    return PromptSplit(tuple(made))


@pytest.fixture(scope="module")
def data(template: ChatTemplate) -> PromptData:
    texts = [f"{'Who is ' * (n % 3)}{chr(97 + n)}?" for n in range(8)]
    held_out = [f"What is {n}?" for n in range(7)]
    splits = (prompts_of(template, texts), prompts_of(template, held_out))
    assert len({len(prompt.ids) for split in splits for prompt in split.prompts}) > 2
    return PromptData(*splits, dataset_hash="", stats={})


def config_of(**settings: Any) -> Config:
    """Make settings of 24 answers a step; the embedding has rows that no token has."""
    rlhf = RlhfConfig(**({"reward": "m:f", "group_size": GROUP} | settings))
    model = ModelConfig(
        vocab_size=330,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=SEQ,
        compute_dtype="float32",
        score_head=rlhf.algorithm == "ppo",
        initializer_range=0.4,
    )
    config = Config(model=model, rlhf=rlhf)
    train = dataclasses.replace(config.train, batch_size=GROUP * PROMPTS, eval_batches=0, seed=5)
    sampling = dataclasses.replace(config.sampling, max_new_tokens=NEW, top_k=3, temperature=0.1)
    rows = dataclasses.replace(config.data, sequence_length=SEQ)
    return dataclasses.replace(config, train=train, sampling=sampling, data=rows)


def weights_of(config: Config, template: ChatTemplate, *, seed: int = 0) -> dict[str, jax.Array]:
    """Draw weights with which about one answer in two ends by itself."""
    weights = initial_weights(config.model, seed=seed)
    if config.model.score_head:
        numbers = np.random.default_rng(seed)
        weights["score.kernel"] = jnp.asarray(numbers.standard_normal((24, 1)), jnp.float32)
    return weights


def rewards_by_length(answers: Answers) -> np.ndarray:
    return np.array([len(text) % 7 / 3 for text in answers.texts], np.float32)


def rollouts_of(
    config: Config,
    data: PromptData,
    template: ChatTemplate,
    *,
    reward: Callable[[Answers], np.ndarray] = rewards_by_length,
    reference: Any = None,
    past: Any = (),
) -> Rollouts:
    return Rollouts(config, data, template=template, reward=reward, reference=reference, past=past)


@functools.cache
def reader(model_config: ModelConfig) -> Callable[..., Any]:
    """Give what computes logits, and scores where there are some, of rows of tokens."""
    structure, _ = model_structure(model_config)

    @jax.jit
    def read(weights: Any, tokens: Any) -> Any:
        model: Any = merge_weights(structure, weights)
        states = model.hidden(tokens).states
        return model.logits(states), model.scores(states) if model_config.score_head else 0

    return read


def log_probs_by_hand(config: Config, weights: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Normalise the logits of each token of an answer in NumPy."""
    logits = np.asarray(reader(config.model)(weights, batch["tokens"])[0], np.float64)
    found = np.zeros(batch["tokens"].shape)
    for row, place in np.argwhere(batch["loss_mask"]):
        column = logits[row, place]
        total = np.log(np.exp(column - column.max()).sum()) + column.max()
        found[row, place] = column[batch["targets"][row, place]] - total
    return found


def test_a_batch_is_prompts_and_answers_with_a_mask_exact_to_the_token(
    data: PromptData, template: ChatTemplate
) -> None:
    config = config_of()
    rollouts, weights = rollouts_of(config, data, template), weights_of(config, template)
    answers = rollouts.sample(weights, data.train.read(range(6)), samples=GROUP, seed=1, first=0)
    kinds = set()
    for row, prompt in enumerate(answers.prompts):
        assert prompt is data.train.prompts[row // GROUP]
        whole = np.append(answers.tokens[row], answers.targets[row, -1])
        np.testing.assert_array_equal(answers.targets[row, :-1], answers.tokens[row, 1:])
        size = len(prompt.ids)
        np.testing.assert_array_equal(whole[:size], prompt.ids)
        learnt = np.flatnonzero(answers.loss_mask[row])
        # Targets stand one place before their tokens.
        np.testing.assert_array_equal(learnt, np.arange(size - 1, size - 1 + len(learnt)))
        answer = answers.targets[row, learnt]
        assert 1 <= len(answer) <= NEW
        assert (whole[size + len(answer) :] == template.tokenizer.pad_id).all()
        assert template.end_id not in answer[:-1]
        assert answers.ended[row] == (answer[-1] == template.end_id)
        assert answers.ended[row] or len(answer) == min(NEW, SEQ - size)
        kinds |= {"ended"} if answers.ended[row] else {"cut"}
        assert answers.texts[row] == template.decode_answer(answer)
        assert (whole < template.tokenizer.vocab_size).all()
    assert kinds == {"ended", "cut"}


def test_answers_end_where_the_row_is_full(template: ChatTemplate) -> None:
    texts = ["a b c d e"] * 7
    data = PromptData(prompts_of(template, texts), prompts_of(template, texts), "", {})
    size = len(data.train.prompts[0].ids)
    config = config_of()
    short = dataclasses.replace(config.data, sequence_length=size + 3)
    config = dataclasses.replace(config, data=short)
    answers = rollouts_of(config, data, template).sample(
        weights_of(config, template), data.train.read(range(6)), samples=4, seed=0, first=0
    )
    assert answers.tokens.shape == (24, size + 3)
    assert answers.loss_mask.sum(axis=1).max() == 4
    assert answers.loss_mask[~answers.ended][:, -1].all()


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_old_log_probabilities_are_those_that_answers_were_drawn_with(
    algorithm: str, data: PromptData, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(algorithm=algorithm)
    weights, reference = (weights_of(config, template, seed=seed) for seed in (0, 1))
    rollouts = rollouts_of(config, data, template, reference=reference)
    batch, _ = rollouts.batch(weights, 0)
    for name, given in (("old_log_probs", weights), ("reference_log_probs", reference)):
        expected = log_probs_by_hand(config, given, batch)
        np.testing.assert_allclose(batch[name], expected, atol=2e-5)
    assert not batch["old_log_probs"][~batch["loss_mask"]].any()


def test_answers_are_drawn_from_the_model_as_it_is_and_not_as_samples_for_people_are(
    template: ChatTemplate,
) -> None:
    """The settings of sampling say top 3 at temperature 0.1; 600 first tokens say otherwise."""
    split = prompts_of(template, ["Go."])
    data = PromptData(split, split, "", {})
    config = config_of()
    one = dataclasses.replace(config.sampling, max_new_tokens=1)
    config = dataclasses.replace(config, sampling=one)
    weights, prompt = weights_of(config, template), split.prompts[0]
    rollouts = rollouts_of(config, data, template)
    answers = rollouts.sample(weights, [prompt] * 4, samples=150, seed=0, first=0)
    drawn = answers.targets[answers.loss_mask]
    logits = np.asarray(reader(config.model)(weights, prompt.ids[None])[0], np.float64)
    logits = logits[0, -1, : template.tokenizer.vocab_size]
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    counts = np.bincount(drawn, minlength=len(chances))
    likely = chances * 600 > 5
    assert likely.sum() > 10
    pearson = (np.square(counts - 600 * chances) / (600 * chances))[likely].sum()
    assert pearson < 2 * likely.sum()
    np.testing.assert_allclose(counts[likely].sum() / 600, chances[likely].sum(), atol=0.06)


@pytest.mark.parametrize("normalised", [True, False])
def test_advantages_of_a_group_by_hand(
    normalised: bool, data: PromptData, template: ChatTemplate
) -> None:
    config = config_of(normalised_advantages=normalised)
    seen: list[np.ndarray] = []

    def reward(answers: Answers) -> np.ndarray:
        seen.append(rewards_by_length(answers))
        return seen[-1]

    rollouts = rollouts_of(config, data, template, reward=reward)
    batch, told = rollouts.batch(weights_of(config, template), 0)
    assert told["reward"] == pytest.approx(np.mean(seen[0]))
    for row in range(GROUP * PROMPTS):
        group = [float(seen[0][n]) for n in range(row // GROUP * GROUP, (row // GROUP + 1) * GROUP)]
        mean = sum(group) / GROUP
        expected = float(seen[0][row]) - mean
        if normalised:
            deviation = (sum((each - mean) ** 2 for each in group) / (GROUP - 1)) ** 0.5
            expected /= deviation + 1e-4
        mask = batch["loss_mask"][row]
        np.testing.assert_allclose(batch["advantages"][row, mask], expected, atol=1e-4)
        assert not batch["advantages"][row, ~mask].any()


def test_returns_of_ppo_by_loops(data: PromptData, template: ChatTemplate) -> None:
    config = config_of(
        algorithm="ppo", kl_coef=0.3, discount=0.9, trace=0.7, normalised_advantages=False
    )
    weights, reference = (weights_of(config, template, seed=seed) for seed in (0, 1))
    seen: list[np.ndarray] = []

    def reward(answers: Answers) -> np.ndarray:
        seen.append(rewards_by_length(answers))
        return seen[-1]

    batch, told = rollouts_of(config, data, template, reference=reference, reward=reward).batch(
        weights, 0
    )
    values = np.asarray(reader(config.model)(weights, batch["tokens"])[1], np.float64)
    divergences = []
    for row, mask in enumerate(batch["loss_mask"]):
        places = [int(place) for place in np.flatnonzero(mask)]
        old, held_to = batch["old_log_probs"][row], batch["reference_log_probs"][row]
        later_value, later_advantage = 0.0, 0.0
        for place in reversed(places):
            paid = -0.3 * (float(old[place]) - float(held_to[place]))
            paid += float(seen[0][row]) if place == places[-1] else 0.0
            error = paid + 0.9 * later_value - values[row, place]
            later_advantage = error + 0.9 * 0.7 * later_advantage
            later_value = values[row, place]
            np.testing.assert_allclose(batch["advantages"][row, place], later_advantage, atol=1e-4)
            np.testing.assert_allclose(
                batch["returns"][row, place], later_advantage + later_value, atol=1e-4
            )
            np.testing.assert_allclose(batch["old_values"][row, place], later_value, atol=1e-4)
        moved = held_to[places].astype(np.float64) - old[places]
        divergences.append((np.exp(moved) - moved - 1).sum())
        assert not batch["advantages"][row, ~mask].any()
    assert told["answer_kl"] == pytest.approx(np.mean(divergences), rel=1e-4)


def test_advantages_of_ppo_are_normalised_over_all_answers(
    data: PromptData, template: ChatTemplate
) -> None:
    found = []
    for normalised in (True, False):
        config = config_of(algorithm="ppo", normalised_advantages=normalised)
        weights = weights_of(config, template)
        found.append(rollouts_of(config, data, template).batch(weights, 0)[0])
    mask = found[0]["loss_mask"]
    plain = found[1]["advantages"][mask].astype(np.float64)
    expected = (plain - plain.mean()) / plain.std()
    np.testing.assert_allclose(found[0]["advantages"][mask], expected, atol=1e-4)
    np.testing.assert_array_equal(found[0]["returns"], found[1]["returns"])


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_rows_are_judged_in_the_passes_of_the_train_step_in_less_memory(
    algorithm: str, data: PromptData, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(algorithm=algorithm)
    weights, reference = (weights_of(config, template, seed=seed) for seed in (0, 1))
    batches, held = [], []
    for passes, block in ((1, 10_000), (6, 16)):  # the passes make their logits in blocks, too
        monkeypatch.setattr(head_blocks, "CPU_BLOCK_TOKENS", block)
        train = dataclasses.replace(
            config.train,
            batch_size=config.rows_per_step // passes,
            gradient_accumulation_steps=passes,
        )
        in_passes = dataclasses.replace(config, train=train)
        assert in_passes.rows_per_step == config.rows_per_step
        rollouts = rollouts_of(in_passes, data, template, reference=reference)
        batches.append(rollouts.batch(weights, 0)[0])
        rows = {name: batches[0][name] for name in ("tokens", "targets", "loss_mask")}
        rewards = np.zeros(config.rows_per_step, np.float32)
        program = rollouts._judge.lower(weights, reference, rows, rewards, np.float32(0)).compile()
        held.append(program.memory_analysis().temp_size_in_bytes)
    for name, expected in batches[0].items():
        np.testing.assert_allclose(batches[1][name], expected, atol=2e-5, err_msg=name)
    assert held[1] < held[0] / 2


# What depends on what ------------------------------------------------------------------------------------


def asked(batch: dict[str, np.ndarray]) -> list[bytes]:
    """Give the prompt of each row."""
    first = [int(np.flatnonzero(mask)[0]) + 1 for mask in batch["loss_mask"]]
    return [row[:end].tobytes() for row, end in zip(batch["tokens"], first, strict=True)]


def test_prompts_and_answers_are_a_function_of_seed_and_step(
    data: PromptData, template: ChatTemplate
) -> None:
    config = config_of(updates_per_rollout=2)
    weights, other = (weights_of(config, template, seed=seed) for seed in (0, 1))
    rollouts = rollouts_of(config, data, template)
    made = [rollouts.batch(weights, number)[0] for number in (0, 2, 4, 6)]
    again, _ = rollouts_of(config, data, template).batch(weights, 4)
    for name, array in again.items():
        np.testing.assert_array_equal(array, made[2][name])
    # Prompts do not depend on weights, and each comes three times in four batches of six.
    assert asked(rollouts.batch(other, 4)[0]) == asked(again)
    every = [prompt for batch in made for prompt in asked(batch)[::GROUP]]
    assert sorted(every.count(prompt) for prompt in set(every)) == [3] * 8
    assert asked(made[0]) != asked(made[1])
    reseeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=6))
    elsewhere, _ = rollouts_of(reseeded, data, template).batch(weights, 0)
    assert asked(elsewhere) != asked(made[0])
    # The same prompts later are answered otherwise.
    split = PromptSplit(data.train.prompts[:1])
    few = PromptData(split, split, "", {})
    one, later = (rollouts_of(config, few, template).batch(weights, n)[0] for n in (0, 2))
    assert asked(one) == asked(later)
    assert (one["tokens"] != later["tokens"]).any()


def test_copies_of_a_prompt_and_prompts_that_are_alike_get_answers_of_their_own(
    data: PromptData, template: ChatTemplate
) -> None:
    config = config_of()
    rollouts, weights = rollouts_of(config, data, template), weights_of(config, template)
    prompt = data.train.prompts[0]
    answers = rollouts.sample(weights, [prompt] * PROMPTS, samples=GROUP, seed=0, first=0)
    assert len({row.tobytes() for row in answers.tokens}) > 20
    # Alike, but for one letter: the same noise would mostly give the same text.
    alike = prompts_of(template, [f"Say {letter}." for letter in "abcdef"]).prompts
    still = {name: array * 0 for name, array in weights.items()}  # every token as likely
    answers = rollouts.sample(still, alike, samples=1, seed=0, first=0)
    assert len(set(answers.texts)) == PROMPTS
    # The batches of an evaluation are one set, too.
    seen: list[str] = []

    def reward(answers: Answers) -> np.ndarray:
        seen.extend(answers.texts)
        return rewards_by_length(answers)

    copies = PromptData(data.train, PromptSplit((prompt,) * 2 * PROMPTS), "", {})
    rollouts_of(config, copies, template, reward=reward).evaluate(still)
    assert len(set(seen)) == 2 * PROMPTS


def test_an_evaluation_is_always_the_same_and_of_every_prompt_once(
    data: PromptData, template: ChatTemplate
) -> None:
    config = config_of()
    weights = weights_of(config, template)
    judged: list[Answers] = []

    def reward(answers: Answers) -> np.ndarray:
        judged.append(answers)
        return np.array([prompt.metadata["n"] for prompt in answers.prompts], np.float32)

    rollouts = rollouts_of(config, data, template, reward=reward)
    first = rollouts.evaluate(weights)
    rollouts.batch(weights, 0)
    assert rollouts.evaluate(weights) == first
    assert rollouts_of(config, data, template, reward=reward).evaluate(weights) == first
    told, text = first
    # Seven prompts in two batches of six, of which the second is filled up.
    assert told["reward"] == np.mean(np.arange(7)) == -told["loss"]
    assert told["reward_deviation"] == pytest.approx(np.std(np.arange(7)))
    lengths = np.concatenate([judged[0].loss_mask, judged[1].loss_mask[:1]]).sum(axis=1)
    assert told["answer_tokens"] == pytest.approx(lengths.mean())
    ended = np.concatenate([judged[0].ended, judged[1].ended[:1]])
    assert told["ended_share"] == pytest.approx(ended.mean())
    assert text.startswith("What is 0?\n-> ")
    few = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_batches=1))
    told, _ = rollouts_of(few, data, template, reward=reward).evaluate(weights)
    assert told["reward"] == np.mean(np.arange(6))


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_nothing_is_compiled_after_the_first_rollout_and_evaluation(
    algorithm: str, template: ChatTemplate
) -> None:
    """One prompt is much longer than others, and some come twice in a batch where an epoch ends."""
    texts = [*("a" * length for length in range(1, 13)), "z " * 8]
    data = PromptData(prompts_of(template, texts), prompts_of(template, texts[:7]), "", {})
    config = config_of(algorithm=algorithm, kl_target=0.1 if algorithm == "ppo" else 0.0)
    weights = weights_of(config, template)
    rollouts = rollouts_of(config, data, template, reference=weights)
    rollouts.batch(weights, 0)
    rollouts.evaluate(weights)
    compiled: list[str] = []

    def count(name: str, _seconds: float, **_: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x + len(texts))(jnp.zeros(3))
        assert compiled, "the listener hears nothing"
        compiled.clear()
        longest, copies = [], []
        for number in range(1, 9):
            prompts = asked(rollouts.batch(weights, number)[0])[::GROUP]
            copies.append(len(prompts) - len(set(prompts)))
            longest.append(max(len(prompt) // 4 for prompt in prompts))
        rollouts.evaluate(weights)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert min(longest) <= SMALLEST_BUCKET < max(longest)
    assert max(copies) > 0
    assert not compiled


# The adapted weight of the divergence ------------------------------------------------------------------


def test_the_weight_of_the_divergence_comes_back_from_what_was_told(
    data: PromptData, template: ChatTemplate
) -> None:
    config = config_of(algorithm="ppo", kl_target=3.0, kl_coef=0.2)
    weights, reference = (weights_of(config, template, seed=seed) for seed in (0, 1))
    rollouts = rollouts_of(config, data, template, reference=reference)
    told = [rollouts.batch(weights, number)[1] for number in range(4)]
    coef = np.float32(0.2)
    for row in told:
        assert row["kl_coef"] == pytest.approx(coef, rel=1e-6)
        coef *= 1 + 0.1 * np.clip(row["answer_kl"] / 3.0 - 1, -0.2, 0.2)
    assert told[0]["kl_coef"] != told[3]["kl_coef"]
    resumed = rollouts_of(config, data, template, reference=reference, past=told[:3])
    _, again = resumed.batch(weights, 3)
    assert again == told[3]
    # JSON has no infinity, so the file has its name.
    rollouts_of(
        config, data, template, reference=reference, past=[{"answer_kl": "inf", "kl_coef": 0.2}]
    )


# Functions that judge -------------------------------------------------------------------------------------


def test_a_function_is_given_the_prompt_the_answer_and_what_the_record_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: ChatTemplate
) -> None:
    source = "seen = []\ndef judge(*given):\n    seen.append(given)\n    return len(seen)\n"
    (tmp_path / "judge_of_test.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    judge = load_reward_function("judge_of_test:judge")
    messages = (Message("system", "Be kind."), Message("user", "Hm?"))
    prompt = Prompt(np.zeros(2, np.int32), messages, "Yes.", {"level": 3})
    rows = np.zeros((2, 3), np.int32)
    answers = Answers(
        [prompt] * 2, ["No.", "Oh."], np.array([True, False]), rows, rows, rows.astype(bool)
    )
    np.testing.assert_array_equal(judge(answers), np.array([1, 2], np.float32))
    import judge_of_test  # type: ignore[import-not-found]

    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hm?"}]
    about = {"level": 3, "answer": "Yes.", "ended": True}
    expected = [(turns, "No.", about), (turns, "Oh.", about | {"ended": False})]
    assert judge_of_test.seen == expected


@pytest.mark.parametrize("reward", ["nan", "inf", "-1e39", "1e39"])
def test_what_is_no_number_of_float32_is_no_reward(
    reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"judge_{abs(hash(reward))}"
    (tmp_path / f"{module}.py").write_text(f"def judge(*_): return float('{reward}')\n")
    monkeypatch.chdir(tmp_path)
    judge = load_reward_function(f"{module}:judge")
    prompt = Prompt(np.zeros(2, np.int32), (Message("user", "Hm?"),), "", {})
    rows = np.zeros((1, 3), np.int32)
    answers = Answers([prompt], ["No."], np.array([True]), rows, rows, rows.astype(bool))
    with pytest.raises(InputError, match=r"for the prompt 'Hm\?' it gave .* no reward. Mend"):
        judge(answers)


def test_words_used_counts_whole_words_of_answers_that_end() -> None:
    about = {"words": ["Cat", "dog", "sun"], "ended": True}
    assert words_used([], "The cat saw a DOG.", about) == pytest.approx(2 / 3)
    assert words_used([], "Cats and dogs", about) == 0.0
    assert words_used([], "The cat saw a dog.", about | {"ended": False}) == 0.0
    with pytest.raises(KeyError):
        words_used([], "The cat", {"ended": True})
