"""What only some ways to learn read: a setting that somebody names in vain is refused."""

from collections.abc import Iterable, Mapping

from tinyllm_jax.config.run import Config

OF_TEXT = ("pretrain",)
OF_ROWS = ("pretrain", "sft")
OF_PAIRS = ("dpo", "reward")
OF_CONVERSATIONS = ("sft", *OF_PAIRS, "rlhf")
# Settings, or whole sections, by the modes or the algorithm that alone read them. What `problems` of a
# section refuses by its value is not named here.
OF_MODES = {
    ("dpo",): ("dpo",),
    ("rlhf",): ("rlhf",),
    ("ppo",): ("rlhf.discount", "rlhf.trace", "rlhf.value_coef", "rlhf.value_clip"),
    OF_CONVERSATIONS: ("chat",),
    OF_TEXT: (
        # A model that learns conversations keeps its tokenizer.
        *("tokenizer.kind", "tokenizer.character_coverage", "tokenizer.max_sentences"),
        *("tokenizer.min_frequency", "tokenizer.max_sample_bytes"),
        *("data.text_field", "data.document_separator", "data.min_document_characters"),
        *("data.long_documents", "data.toy_documents", "data.toy_seed", "data.download_source"),
        *("data.workers", "data.ray_address"),
    ),
    OF_ROWS: ("data.packing", "train.corpus_on_device"),
    # Where answers are sampled to be learnt from, that is at temperature 1.
    (*OF_ROWS, *OF_PAIRS): (
        *("sampling.temperature", "sampling.top_k", "sampling.top_p", "sampling.greedy"),
        *("sampling.repetition_penalty", "sampling.seed", "sampling.num_samples"),
    ),
}
READ_BY = {key: readers for readers, keys in OF_MODES.items() for key in keys}


def named_in_vain(config: Config, named: Iterable[tuple[str, Mapping[str, object]]]) -> list[str]:
    """List the settings that somebody named for a run, and that its mode never reads.

    Args:
        named: Pairs of (where they stand, settings under dotted keys); a command line stands at "".
            What a preset or a checkpoint holds besides is no mistake, and does not belong here.
    """
    mode, algorithm = config.run.mode, config.rlhf.algorithm
    ways = {mode, algorithm} if mode == "rlhf" else {mode}
    found = []
    for origin, table in named:
        for key in table:
            readers = READ_BY.get(key) or READ_BY.get(key.partition(".")[0]) or (mode,)
            if ways.isdisjoint(readers):
                is_other = mode == "rlhf" and readers == ("ppo",)
                found.append(
                    f"{f'{origin}: ' if origin else ''}{key} says nothing to "
                    f"{f'rlhf.algorithm={algorithm}' if is_other else f'--mode {mode}'}: it is of "
                    f"{as_flags(readers)}. Use {'that' if len(readers) == 1 else 'one of those'}, or "
                    "leave it out."
                )
    return found


def as_flags(readers: tuple[str, ...]) -> str:
    """Write what is to be typed for modes, or for an algorithm."""
    if readers == ("ppo",):
        return "--mode rlhf --rlhf.algorithm ppo"
    *others, last = readers
    return f"--mode {', '.join(others)} or {last}" if others else f"--mode {last}"
