"""What lm-evaluation-harness asks of a model; importing this makes `tinyllm` known to it."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from tinyllm_jax.config import EvaluateConfig, SamplingConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.evaluation.run import window_of
from tinyllm_jax.evaluation.scorer import TokenScorer
from tinyllm_jax.evaluation.tasks import answer_text
from tinyllm_jax.evaluation.windows import Reader, Text, keep_end
from tinyllm_jax.inference.language_model import LanguageModel, load
from tinyllm_jax.settings import build

# Tokens that an answer may have where a task says nothing; the harness's own number.
LONGEST_ANSWER = 256


@register_model("tinyllm")
class HarnessModel(LM):
    """What the harness asks of a model.

    Texts begin with bos, as documents do in training. As in the harness's own models, a long text is
    cut into windows that do not overlap, and of a long prompt the beginning is left out.

    Args:
        checkpoint: Run folder or whatever else `load` takes.
        batch_size: Rows that are computed together, and answers that are written together.
        context: Tokens that are read at once; 0 is the model's whole context.
        compute_dtype: float32, or "model" for what the model's settings say.
    """

    def __init__(
        self,
        checkpoint: str | LanguageModel,
        *,
        batch_size: int | str | None = None,
        context: int = 0,
        compute_dtype: str = EvaluateConfig().evaluate.compute_dtype,
        **others: Any,  # device and the like, which the harness hands to every model
    ):
        super().__init__()
        unknown = sorted(others.keys() - {"device", "max_batch_size"})
        if unknown:
            raise InputError(
                f"--model_args {unknown[0]}: no such setting. Use checkpoint, batch_size, context or "
                "compute_dtype."
            )
        settings = {
            "evaluate.stories": 1,  # what makes settings without data whole
            "evaluate.context": context,
            "evaluate.overlap": 0,
            "evaluate.compute_dtype": compute_dtype,
        }
        if batch_size is not None and batch_size != "auto":
            settings["evaluate.batch_size"] = batch_size
        evaluate = build(EvaluateConfig, [("--model_args", settings)])
        self.model = checkpoint if isinstance(checkpoint, LanguageModel) else load(checkpoint)
        self._batch_size = evaluate.evaluate.batch_size
        length, overlap = window_of(evaluate, self.model.config)
        scorer = TokenScorer(self.model, compute_dtype=compute_dtype)
        self._reader = Reader(scorer, context=length, overlap=overlap, batch_size=self._batch_size)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches."""
        return self.model.tokenizer.hash

    def loglikelihood(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts, and say whether each is the likeliest."""
        texts = (
            keep_end(self._encoded(*request.args), context=self._reader.context)
            for request in requests
        )
        found = [(scored.total, scored.is_greedy) for scored in self._reader.score(texts)]
        self._remember("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[float]:
        """Score whole texts, without their end."""
        encode = self.model.tokenizer.encode
        texts = (Text(encode(request.args[0], bos=True), 1) for request in requests)
        found = [scored.total for scored in self._reader.score(texts)]
        self._remember("loglikelihood_rolling", requests, found)
        return found

    def generate_until(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,  # noqa: ARG002
    ) -> list[str]:
        """Continue contexts up to the first of the stop strings."""
        found: list[str] = []
        for settings, group in itertools.groupby(requests, key=lambda request: request.args[1]):
            sampling, stops = as_sampling(settings)
            prompts = (request.args[0] for request in group)
            while batch := list(itertools.islice(prompts, self._batch_size)):
                written = self.model.continue_texts(batch, sampling=sampling, chat=False)
                found += [
                    up_to(text[len(prompt) :], stops)
                    for prompt, (text, _) in zip(batch, written, strict=True)
                ]
        self._remember("generate_until", requests, found)
        return found

    def _encoded(self, context: str, continuation: str) -> Text:
        tokenizer = self.model.tokenizer
        if not context:
            return Text(tokenizer.encode(continuation, bos=True), 1)
        return answer_text(context, continuation, tokenizer)

    def _remember(self, name: str, requests: Sequence[Any], found: Sequence[Any]) -> None:
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial(name, request.args, result)


def as_sampling(settings: Mapping[str, Any]) -> tuple[SamplingConfig, list[str]]:
    """Read what a task says about writing as (settings, stop strings); unless it says, greedily."""
    until = settings.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens")
    longest = next((settings[n] for n in names if settings.get(n)), LONGEST_ANSWER)
    samples = bool(settings.get("do_sample", False))
    sampling = dataclasses.replace(
        SamplingConfig(),
        max_new_tokens=int(longest),
        greedy=not samples,
        temperature=float(settings.get("temperature") or 1.0),
        top_p=float(settings.get("top_p") or 1.0),
        top_k=int(settings.get("top_k") or 0),
        # A prompt that fills the context is cut, rather than refused.
        slide=True,
    )
    return sampling, [until] if isinstance(until, str) else list(until)


def up_to(text: str, stops: Sequence[str]) -> str:
    """Cut a text before the first of these strings."""
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
