"""Learning from rewards where the best is known: answers with one word in them, and not too long."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from mode_runs import flags_of, rows_of

from tinyllm_jax import train

pytestmark = pytest.mark.slow  # the file as a whole

ANIMALS = ("cat", "dog", "cow", "hen", "pig", "fox", "owl", "bee")
PLACES = ("barn", "tree", "house", "field", "pond")
QUESTIONS = ("What do you see?", "Who is there?", "Tell me something.", "What is outside?")
JUDGE = '''
def cat(prompt, answer, metadata):
    """1 for an answer with the word, ended by the model within the tokens that it has; else 0."""
    return float("cat" in answer.split() and metadata["ended"])
'''
SMALL = {
    "model.vocab_size": 360,
    "model.hidden_size": 48,
    "model.intermediate_size": 96,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.max_position_embeddings": 64,
    "data.sequence_length": 64,
    "sampling.max_new_tokens": 12,
}
LEARNING = {
    "data.paths": "chat.jsonl",
    "data.validation_fraction": 0.1,
    "train.batch_size": 64,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 2,
    "rlhf.reward": "rl_control_judge:cat",
    "rlhf.group_size": 8,
    "train.max_steps": 40,
    "train.eval_interval_steps": 40,
    "train.eval_batches": 8,
    "checkpoint.interval_steps": 40,
    "sampling.max_new_tokens": 12,
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {"rlhf.algorithm": "grpo"},
    "ppo": {"rlhf.algorithm": "ppo"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a model that answers with one of eight animals, all alike."""
    folder = tmp_path_factory.mktemp("control")
    numbers = random.Random(0)
    chats, texts = [], []
    for n in range(400):
        animal, place = numbers.choice(ANIMALS), numbers.choice(PLACES)
        asked, answer = numbers.choice(QUESTIONS), f"A {animal} in the {place} ."
        turns = [("user", f"{asked} {n}"), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in turns]
        chats.append(json.dumps({"messages": messages, "n": n}) + "\n")
        texts.append(f"user\n{asked} {n}\nassistant\n{answer}")
    (folder / "chat.jsonl").write_text("".join(chats))
    (folder / "text.txt").write_text("<|endoftext|>".join(texts * 3))
    (folder / "rl_control_judge.py").write_text(JUDGE)
    first = {"data.paths": "text.txt", "run.out": "pretrained", "train.max_steps": 40}
    then = {"data.paths": "chat.jsonl", "run.out": "base", "train.max_steps": 120}
    then |= {"run.mode": "sft", "run.init_from": "pretrained", "data.validation_fraction": 0.1}
    both = {"train.eval_interval_steps": 40, "train.eval_batches": 2, "train.batch_size": 16}
    both |= {"optimizer.learning_rate": 3e-3, "sampling.max_new_tokens": 12}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYLLM_DATA_DIR", str(folder / "data"))
        patch.chdir(folder)
        assert train.main(flags_of({**SMALL, **both, **first})) == 0
        assert train.main(flags_of({**both, **then})) == 0
    return folder


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rewards_rise_from_a_fifth_of_the_best_to_nine_tenths(
    algorithm: str, seed: int, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("TINYLLM_DATA_DIR", str(base / "data"))
    monkeypatch.chdir(base)
    out = f"{algorithm}_{seed}"
    settings = {**LEARNING, **ALGORITHMS[algorithm], "run.mode": "rlhf", "run.init_from": "base"}
    assert train.main(flags_of({**settings, "train.seed": seed, "run.out": out})) == 0
    rewards = [row["reward"] for row in rows_of(Path(out), "rollout")]
    first, *_, last = rows_of(Path(out), "eval")
    with capsys.disabled():
        shown = " ".join(f"{reward:.2f}" for reward in rewards[::8])
        held_out = f"held out {first['reward']:.3f} -> {last['reward']:.3f}"
        print(f"\n{algorithm}, seed {seed}: {held_out}; every 8th rollout {shown}")
    assert first["reward"] < 0.2
    assert rewards[0] < 0.2
    assert last["reward"] >= 0.9
