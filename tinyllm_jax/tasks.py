"""What each `--mode` learns from: its data, its objective, and what it writes when it is looked at."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tinyllm_jax.cli import say
from tinyllm_jax.config import Config
from tinyllm_jax.data.asking import Asked, as_question, as_text
from tinyllm_jax.errors import InputError

if TYPE_CHECKING:
    from tinyllm_jax.data.prepare import PreparedData
    from tinyllm_jax.data.tokenizer import Tokenizer
    from tinyllm_jax.training.loop import Objective
    from tinyllm_jax.training.start import Start


@dataclass(frozen=True)
class Task:
    """The data of a run, ready to be read, and how its objective is made."""

    tokenizer: "Tokenizer"
    dataset_hash: str
    stats: dict[str, Any]  # the content of dataset_stats.json
    description: str  # of the data, for people
    rows_to_learn: float  # of `data.sequence_length` tokens, or pairs, or prompts; once through all
    make_objective: "Callable[[], Objective]"
    asked: Asked  # what the model goes on with whenever the run looks at it
    prepared: "PreparedData | None" = None  # as token shards; prompts are in memory alone


def open_task(config: Config, start: "Start") -> Task:
    """Read or prepare the data of a run.

    Raises:
        InputError: data or settings do not fit; the message says what to do.
    """
    opened = {
        "pretrain": open_pretraining,
        "sft": open_fine_tuning,
        "dpo": open_preferences,
        "reward": open_rewards,
        "rlhf": open_reinforcement,
    }
    if config.run.mode != "pretrain":
        check_own_tokenizer(config, start)
    return opened[config.run.mode](config, start)


def open_pretraining(config: Config, start: "Start") -> Task:
    """Learn every token of a corpus."""
    from tinyllm_jax.data.prepare import prepare
    from tinyllm_jax.objectives.pretrain import make_pretraining

    prepared = prepare(config, progress=sys.stderr.isatty(), tokenizer=tokenizer_of(start))
    tokenizer = prepared.tokenizer
    return Task(
        tokenizer=tokenizer,
        dataset_hash=prepared.dataset_hash,
        stats=prepared.stats,
        description=describe_corpus(prepared),
        rows_to_learn=prepared.train.tokens / config.data.sequence_length,
        make_objective=lambda: make_pretraining(config, prepared),
        asked=as_text(config.sampling.prompt, tokenizer),
        prepared=prepared,
    )


def open_fine_tuning(config: Config, start: "Start") -> Task:
    """Learn the answers of conversations."""
    from tinyllm_jax.data.prepare_chat import prepare_conversations
    from tinyllm_jax.objectives.conversations import make_fine_tuning

    prepared = prepare_conversations(
        config, tokenizer=chat_tokenizer(start), progress=sys.stderr.isatty()
    )
    rows = prepared.stats["splits"]["train"]["rows"]
    return conversation_task(
        config,
        start,
        dataset_hash=prepared.dataset_hash,
        stats=prepared.stats,
        description=f"{prepared.train.documents:,} conversations to learn from, "
        f"{prepared.train.learnt_tokens:,} of {prepared.train.tokens:,} tokens in answers; "
        f"{prepared.validation.documents:,} to validate",
        rows_to_learn=rows,
        make_objective=lambda: make_fine_tuning(config, prepared),
        prepared=prepared,
    )


def open_preferences(config: Config, start: "Start") -> Task:
    """Learn to prefer the chosen answers of pairs."""
    import jax.numpy as jnp

    from tinyllm_jax.data.prepare_chat import prepare_preferences
    from tinyllm_jax.model.layers import parameter_dtype
    from tinyllm_jax.objectives.pairs import make_preference_objective, reference_log_probs

    progress = sys.stderr.isatty()
    data = prepare_preferences(config, tokenizer=chat_tokenizer(start), progress=progress)

    def make_objective() -> "Objective":
        if config.dpo.loss == "simpo":
            return make_preference_objective(config, data, None)
        dtype = parameter_dtype(config.model)
        weights = {name: jnp.asarray(w, dtype) for name, w in reference_of(start).items()}
        references = reference_log_probs(config, data, weights, progress=progress)
        return make_preference_objective(config, data, references)

    return conversation_task(
        config,
        start,
        dataset_hash=data.dataset_hash,
        stats=data.stats,
        description=f"{data.train.pairs:,} pairs of answers to learn from, "
        f"{data.validation.pairs:,} to validate",
        rows_to_learn=data.train.pairs,
        make_objective=make_objective,
        prepared=data.prepared,
    )


def open_rewards(config: Config, start: "Start") -> Task:
    """Learn to score answers as the pairs compare them."""
    from tinyllm_jax.data.prepare_chat import prepare_preferences
    from tinyllm_jax.objectives.pairs import make_reward_objective

    data = prepare_preferences(
        config, tokenizer=chat_tokenizer(start), progress=sys.stderr.isatty()
    )
    return conversation_task(
        config,
        start,
        dataset_hash=data.dataset_hash,
        stats=data.stats,
        description=f"{data.train.pairs:,} pairs of answers to learn from, "
        f"{data.validation.pairs:,} to validate",
        rows_to_learn=data.train.pairs,
        make_objective=lambda: make_reward_objective(config, data),
        prepared=data.prepared,
    )


def open_reinforcement(config: Config, start: "Start") -> Task:
    """Learn from rewards of answers that the model samples."""
    import jax.numpy as jnp

    from tinyllm_jax.data.chat_template import ChatTemplate
    from tinyllm_jax.data.prepare_prompts import prepare_prompts
    from tinyllm_jax.model.layers import parameter_dtype
    from tinyllm_jax.objectives.policy_objective import make_policy_objective, open_reward
    from tinyllm_jax.training.distributed import hosts
    from tinyllm_jax.training.metrics import read_metrics

    if hosts().count > 1:
        raise InputError(
            f"run.mode=rlhf learns from what it writes in one process, and there are {hosts().count}. "
            "Leave --distributed.coordinator out."
        )
    tokenizer = chat_tokenizer(start)
    data = prepare_prompts(config, tokenizer=tokenizer, progress=sys.stderr.isatty())
    template = ChatTemplate(tokenizer)
    reward = open_reward(config, tokenizer, say=say)

    def make_objective() -> "Objective":
        reference = None
        if config.rlhf.kl_coef > 0:
            dtype = parameter_dtype(config.model)
            reference = {name: jnp.asarray(w, dtype) for name, w in reference_of(start).items()}
        past = []
        if start.resumed:
            metrics = start.resumed.folder.parents[1] / "metrics.jsonl"
            rows = read_metrics(metrics) if metrics.is_file() else []
            past = [r for r in rows if r["kind"] == "rollout" and r["step"] <= start.resumed.step]
            if not past and config.rlhf.kl_target > 0 and start.resumed.step > 0:
                raise InputError(
                    f"{metrics}: tells of no rollout, and the adapted rlhf.kl_coef comes from them. Put "
                    "the file back, or start a new run with --init-from."
                )
        return make_policy_objective(
            config, data, template=template, reward=reward, reference=reference, past=past
        )

    return conversation_task(
        config,
        start,
        dataset_hash=data.dataset_hash,
        stats=data.stats,
        description=f"{data.train.count:,} prompts to answer, {data.validation.count:,} to validate",
        rows_to_learn=data.train.count * config.rlhf.group_size * config.rlhf.updates_per_rollout,
        make_objective=make_objective,
    )


def conversation_task(config: Config, start: "Start", **facts: Any) -> Task:
    """Fill in what all that is learnt from conversations has in common."""
    tokenizer, prompt = chat_tokenizer(start), config.sampling.prompt
    asked = as_question(prompt, tokenizer, system=config.chat.system)

    def both(found: list[int]) -> str:
        return f"{prompt}\n-> {asked.text(found)}"

    return Task(tokenizer=tokenizer, asked=dataclasses.replace(asked, text=both), **facts)


def chat_tokenizer(start: "Start") -> "Tokenizer":
    """Give the tokenizer of the model that conversations are learnt with."""
    assert start.source is not None, "find_start asks for --init-from"
    return start.source.tokenizer


def check_own_tokenizer(config: Config, start: "Start") -> None:
    """Refuse to learn conversations with any tokenizer but that of the model.

    Raises:
        InputError: the settings name another, or ask for a new one.
    """
    from tinyllm_jax.data.tokenizer import check_tokenizer_hash, load_tokenizer

    expected = chat_tokenizer(start).hash
    if config.tokenizer.retrain:
        raise InputError(
            f"--retrain-tokenizer: run.mode={config.run.mode} keeps the tokenizer of its model. Leave it "
            "out."
        )
    if config.tokenizer.path:
        named = load_tokenizer(config.tokenizer.path)
        check_tokenizer_hash(named, expected=expected, origin=f"run.mode={config.run.mode}")


def reference_of(start: "Start") -> dict[str, Any]:
    """Give the weights that a run began with.

    Raises:
        InputError: the run folder has lost them.
    """
    if start.reference is None:
        assert start.resumed is not None, "a new run is held to what it begins with"
        raise InputError(
            f"{start.resumed.folder.parents[1]}: reference/ is gone, the model that this run is held to. Put it back, or "
            "start a new run with --init-from."
        )
    return start.reference.weights


def tokenizer_of(start: "Start") -> "Tokenizer | None":
    """Give the tokenizer of the checkpoint that the run starts from, unless another is asked for."""
    source, path = start.source, start.config.tokenizer.path
    if source is None or path not in ("", source.config.tokenizer.path):
        return None
    return source.tokenizer


def describe_corpus(prepared: "PreparedData") -> str:
    """Say how much text there is."""
    train, validation = prepared.train, prepared.validation
    return (
        f"{train.tokens:,} tokens of {train.documents:,} documents to train on, "
        f"{validation.tokens:,} of {validation.documents:,} to validate "
        f"({train.text_bytes / train.tokens:.2f} bytes per token)"
    )
