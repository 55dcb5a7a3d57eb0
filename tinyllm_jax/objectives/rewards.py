"""What a sampled answer is worth: a Python function's word, or a reward model's.

Functions to begin with are here, too: `--rlhf.reward tinyllm_jax.objectives.rewards:words_used`.
"""

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int32

from tinyllm_jax.data.prepare_prompts import Prompt
from tinyllm_jax.errors import InputError
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.weights import merge_weights, model_structure
from tinyllm_jax.objectives.reward import answer_scores
from tinyllm_jax.training.checkpoint import Checkpoint

LARGEST = float(np.finfo(np.float32).max)
Messages = list[dict[str, str]]
# The longest answer that `brief` finds brief.
BRIEF_WORDS = 60
# (prompt, answer, metadata of the prompt's record) -> reward
RewardFunction = Callable[[Messages, str, Mapping[str, Any]], float]


@dataclass(frozen=True)
class Answers:
    """Sampled answers, as text and as rows of tokens."""

    prompts: Sequence[Prompt]  # one for each answer
    texts: Sequence[str]
    ended: Bool[np.ndarray, " answers"]  # by the model's own `<|im_end|>`
    tokens: Int32[np.ndarray, "answers seq"]
    targets: Int32[np.ndarray, "answers seq"]
    loss_mask: Bool[np.ndarray, "answers seq"]

    def first(self, count: int) -> "Answers":
        """Take so many of the answers."""
        return Answers(**{name: value[:count] for name, value in vars(self).items()})


Reward = Callable[[Answers], np.ndarray]


def load_reward_function(name: str) -> Reward:
    """Find `module:function`, in the current folder too, and make it judge answers.

    The function gets the prompt as a list of `{"role", "content"}`, the answer as text, and the
    record's other fields, with the record's own answer as `answer` and whether the model ended its
    answer by itself as `ended`.

    Raises:
        InputError: there is no such function. What judges raises one, too, when the function fails
            or gives what is no number.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(
            f"rlhf.reward={name}: no such folder, and no function. Write module:function, or name the "
            "folder of a reward model."
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        named = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # a module may fail in any way while it is imported
        raise InputError(
            f"rlhf.reward={name}: {said_by(error)}. Name a module that Python finds from here, and a "
            "function in it."
        ) from error
    if not callable(named):
        raise InputError(f"rlhf.reward={name}: no function, but {named!r:.80}. Name a function.")
    function: Any = named

    def judge(answers: Answers) -> np.ndarray:
        found = []
        for prompt, text, ended in zip(
            answers.prompts, answers.texts, answers.ended.tolist(), strict=True
        ):
            messages = [{"role": each.role, "content": each.content} for each in prompt.messages]
            metadata = {**prompt.metadata, "answer": prompt.answer, "ended": ended}
            where = f"rlhf.reward={name}: for the prompt {messages[-1]['content'][:80]!r}"
            advice = "Mend the function and give the same command again, with --auto-resume."
            try:
                reward = float(function(messages, text, metadata))
            except (Exception, SystemExit) as error:
                raise InputError(f"{where} it failed: {said_by(error)}. {advice}") from error
            if not abs(reward) <= LARGEST:  # nor where it is no number
                raise InputError(f"{where} it gave {reward}, which is no reward. {advice}")
            found.append(reward)
        return np.array(found, np.float32)

    return judge


def said_by(error: BaseException) -> str:
    """Write an exception in one line."""
    try:
        text = str(error)
    except Exception:  # a person's own class may fail at that, too
        text = ""
    return " ".join(f"{type(error).__name__}{text and ': '}{text}".split())


def make_reward_model(checkpoint: Checkpoint) -> Reward:
    """Let a reward model judge answers, by its score of each one's last token.

    Raises:
        InputError: the checkpoint is of no reward model.
    """
    if not checkpoint.config.model.score_head:
        raise InputError(
            f"{checkpoint.folder}: no reward model. Train one with --mode reward, or name a function "
            "as module:function."
        )
    if checkpoint.config.run.mode == "rlhf":
        raise InputError(
            f"{checkpoint.folder}: a policy that PPO trained, whose scores are the values of positions "
            "and judge no answer. Name a model of --mode reward, or a function as module:function."
        )
    structure, _ = model_structure(checkpoint.config.model)
    weights = {name: jax.numpy.asarray(array) for name, array in checkpoint.weights.items()}

    @compiled
    def scores(weights: Any, tokens: Any, targets: Any, loss_mask: Any) -> Any:
        model = merge_weights(structure, weights)
        return answer_scores(model, tokens, targets, loss_mask, dropout_key=None)[0]

    def judge(answers: Answers) -> np.ndarray:
        found = scores(weights, answers.tokens, answers.targets, answers.loss_mask)
        return np.asarray(found, np.float32)

    return judge


def words_used(prompt: Messages, answer: str, metadata: Mapping[str, Any]) -> float:
    """Reward the share of the record's `words` that the answer uses, if the answer ends.

    Raises:
        KeyError: the record has no `words`.
    """
    del prompt
    if not metadata["ended"]:
        return 0.0
    used = set(re.findall(r"\w+", answer.lower()))
    words = metadata["words"]
    return sum(word.lower() in used for word in words) / len(words)


def brief(prompt: Messages, answer: str, metadata: Mapping[str, Any]) -> float:
    """Reward an answer that ends: with 1 up to 60 words, and with 60 / words beyond."""
    del prompt
    words = len(answer.split())
    return min(1.0, BRIEF_WORDS / max(words, 1)) if metadata["ended"] and words else 0.0
