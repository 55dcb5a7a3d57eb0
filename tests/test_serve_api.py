"""The server as OpenAI's own client sees it."""

import dataclasses
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import openai
import pytest
from serving import NAME, chat_model, running, settings_of

from tinyllm_jax.config import ServeConfig
from tinyllm_jax.data.asking import as_conversation, as_text
from tinyllm_jax.data.chat import Message
from tinyllm_jax.inference.language_model import LanguageModel, load
from tinyllm_jax.inference.service import Service
from tinyllm_jax.server.app import Api
from tinyllm_jax.server.schemas import ChatRequest, CompletionRequest
from tinyllm_jax.settings import setting_fields

ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell a story."}]


@dataclasses.dataclass
class Served:
    """A server, its model and a client."""

    model: LanguageModel
    service: Service
    url: str

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def chat(self, messages: Any = ASKED, **settings: Any) -> Any:
        with self.client() as client:
            return client.chat.completions.create(model=NAME, messages=messages, **settings)

    def complete(self, prompt: Any = "Once upon a time", **settings: Any) -> Any:
        with self.client() as client:
            return client.completions.create(model=NAME, prompt=prompt, **settings)

    def events(self, kind: str, **settings: Any) -> list[Any]:
        with self.client() as client:
            create = client.completions.create if kind == "text" else client.chat.completions.create
            asked = {"prompt": "Once upon a time"} if kind == "text" else {"messages": ASKED}
            with create(model=NAME, stream=True, **{**asked, **settings}) as stream:
                return [*stream]


def serve(model: LanguageModel, **settings: Any) -> Iterator[Served]:
    config = settings_of(**settings)
    service = Service(model, config.engine)
    service.start()
    with running(service, config) as url:
        yield Served(model, service, url)
    service.stop()


@pytest.fixture(scope="module")
def base(trained_run: Any) -> Iterator[Served]:
    """Serve the small trained run, which has read no conversations."""
    yield from serve(load(trained_run))


@pytest.fixture(scope="module")
def chatty(trained_run: Any) -> Iterator[Served]:
    """Serve a model that knows turns, with random weights."""
    yield from serve(chat_model(load(trained_run), context=256))


# What is answered ---------------------------------------------------------------------------------


def test_a_greedy_completion_is_what_the_model_writes_by_itself(base: Served) -> None:
    for prompt in ("Once upon a time", "", "The dog"):
        found = base.complete(prompt, temperature=0, max_tokens=9)
        assert [prompt + found.choices[0].text] == base.model.generate(
            prompt, greedy=True, max_new_tokens=9
        )
        assert found.object == "text_completion"
        assert found.model == NAME


def test_a_greedy_answer_is_what_the_model_says_by_itself(chatty: Served) -> None:
    found = chatty.chat([ASKED[1]], temperature=0, max_completion_tokens=9)
    assert [found.choices[0].message.content] == chatty.model.generate(
        "Tell a story.", greedy=True, max_new_tokens=9, chat=True
    )
    assert found.choices[0].message.role == "assistant"
    assert found.object == "chat.completion"


def test_usage_counts_every_prompt_once_and_every_new_token(chatty: Served) -> None:
    found = chatty.chat(n=3, max_tokens=5, stop=None)
    messages = [Message(turn["role"], turn["content"]) for turn in ASKED]
    asked = len(as_conversation(messages, chatty.model.tokenizer).ids)
    told = found.usage
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 3
    assert (told.prompt_tokens, told.completion_tokens, told.total_tokens) == (
        asked,
        15,
        asked + 15,
    )
    found = chatty.complete(["Once", "The dog sat"], max_tokens=4, temperature=0)
    asked = sum(len(as_text(text, chatty.model.tokenizer).ids) for text in ("Once", "The dog sat"))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (asked, 8)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_stream_is_the_whole_answer_in_pieces(kind: str, chatty: Served) -> None:
    asked: dict[str, Any] = {"n": 3, "seed": 5, "max_tokens": 11, "temperature": 1.5}
    events = chatty.events(kind, stream_options={"include_usage": True}, **asked)
    whole = chatty.complete(**asked) if kind == "text" else chatty.chat(**asked)
    texts, ends = ["", "", ""], [None, None, None]
    for event in events[:-1]:
        assert event.usage is None
        (choice,) = event.choices
        texts[choice.index] += (choice.text if kind == "text" else choice.delta.content) or ""
        assert ends[choice.index] is None, "something comes behind the end"
        ends[choice.index] = choice.finish_reason
    said = [c.text if kind == "text" else c.message.content for c in whole.choices]
    assert texts == said
    assert len({*said}) == 3
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert events[-1].choices == []
    assert events[-1].usage.model_dump() == whole.usage.model_dump()
    assert len({event.id for event in events}) == 1
    if kind == "chat":
        assert [event.choices[0].delta.role for event in events[:3]] == ["assistant"] * 3


def test_a_stream_tells_no_usage_unless_asked(base: Served) -> None:
    assert all(event.choices for event in base.events("text"))
    assert all("usage" not in event.model_fields_set for event in base.events("text"))


def test_several_prompts_have_their_answers_in_order(base: Served) -> None:
    prompts = ["Once upon a time", "The dog", "A"]
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    found = base.complete(prompts, **asked)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    alone = [base.complete(prompt, **asked).choices[0].text for prompt in prompts]
    assert [choice.text for choice in found.choices] == alone
    twice = base.complete(prompts[:2], n=2, seed=1, max_tokens=6).choices
    alone = [base.complete(p, n=2, seed=1, max_tokens=6).choices[1].text for p in prompts[:2]]
    assert [twice[1].text, twice[3].text] == alone


def test_a_prompt_may_be_token_ids(base: Served) -> None:
    ids = as_text("The dog", base.model.tokenizer).ids
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    text = base.complete("The dog", **asked).choices[0].text
    assert base.complete(ids, **asked).choices[0].text == text
    assert base.complete([ids, ids], **asked).choices[1].text == text


def test_what_stands_before_an_eos_among_token_ids_is_no_part_of_the_text(base: Served) -> None:
    tokenizer = base.model.tokenizer
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "logprobs": 0}
    for ids in (as_text("The dog", tokenizer).ids, tokenizer.encode("The dog")):
        found = base.complete([*as_text("One day", tokenizer).ids, tokenizer.eos_id, *ids], **asked)
        told = found.choices[0]
        made = [tokenizer.control_id(text) for text in told.logprobs.tokens]
        assert None in made, "nothing was written"
        assert told.text == "".join(told.logprobs.tokens)
    ended = [*as_text("One day", tokenizer).ids, tokenizer.eos_id]
    api: Any = SimpleNamespace(service=base.service)
    assert Api.prompt(api, [*ended, *ids]).text(ids) == tokenizer.decode([*ids, *ids])
    assert Api.prompt(api, ended).lead == []
    told = base.complete(ended, **asked).choices[0]
    assert told.text.strip() == "".join(told.logprobs.tokens).strip() != ""


def test_a_stop_string_ends_the_text_before_it(base: Served) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    text = base.complete(**asked).choices[0].text
    stop = text[6:9]
    found = base.complete(**asked, stop=["zzzz", stop]).choices[0]
    assert found.text == text[: text.find(stop)]
    assert found.finish_reason == "stop"
    assert base.complete(**asked, stop=stop).choices[0].text == found.text
    streamed = base.events("text", **asked, stop=stop)
    assert "".join(event.choices[0].text for event in streamed) == found.text


def test_an_answer_ends_where_the_context_is_full(base: Served) -> None:
    found = base.complete("Once", max_tokens=10_000, temperature=0, extra_body={"top_k": 5})
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage.total_tokens <= base.service.context


def test_log_probabilities_are_those_of_the_model(chatty: Served) -> None:
    found = chatty.chat(logprobs=True, top_logprobs=4, max_tokens=8, temperature=1.3, seed=2)
    told = found.choices[0].logprobs.content
    assert "".join(bytes(each.bytes).decode(errors="replace") for each in told).startswith(
        found.choices[0].message.content[:3]
    )
    messages = [Message(turn["role"], turn["content"]) for turn in ASKED]
    ids = as_conversation(messages, chatty.model.tokenizer).ids
    scores = jax.nn.log_softmax(chatty.model.logits([ids])[0, -1])
    order = np.argsort(-scores)[:4]
    for each, id in zip(told[0].top_logprobs, order, strict=True):
        assert each.token == chatty.model.tokenizer.token_text(int(id))
        assert each.logprob == pytest.approx(float(scores[id]), abs=2e-5)
    assert all(len(each.top_logprobs) == 4 and each.logprob <= 0 for each in told)
    alone = chatty.chat(logprobs=True, max_tokens=8, temperature=1.3, seed=2)
    assert [each.logprob for each in alone.choices[0].logprobs.content] == [
        each.logprob for each in told
    ]
    assert alone.choices[0].logprobs.content[0].top_logprobs == []
    assert chatty.chat().choices[0].logprobs is None


def test_log_probabilities_of_a_completion_name_the_place_of_each_token(base: Served) -> None:
    asked: dict[str, Any] = {"logprobs": 3, "max_tokens": 12, "seed": 4}
    found = base.complete(**asked).choices[0]
    told = found.logprobs
    ends = [*told.text_offset[1:], len(found.text)]
    shown = [found.text[a:b] for a, b in zip(told.text_offset, ends, strict=True)]
    pairs = [(a, b) for a, b in zip(shown, told.tokens, strict=True) if not b.startswith("<0x")]
    assert len(pairs) > 3
    assert all(text == token for text, token in pairs)
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs)
    assert all(1 <= len(each) <= 3 for each in told.top_logprobs)
    streamed = [event.choices[0].logprobs for event in base.events("text", **asked)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [x for each in streamed for x in getattr(each, name)] == getattr(told, name)


def test_the_space_that_a_first_word_loses_has_no_place(base: Served) -> None:
    moved = 0
    for seed in range(8):
        asked: dict[str, Any] = {"logprobs": 0, "max_tokens": 12, "seed": seed, "temperature": 0.5}
        found = base.complete("", **asked).choices[0]
        told = found.logprobs
        assert told.text_offset[0] == 0
        if "\N{REPLACEMENT CHARACTER}" in found.text:
            continue  # which tokens made it cannot be told
        for token, start in zip(told.tokens, told.text_offset, strict=True):
            if not token.startswith("<"):
                moved += start == 0 and token.startswith(" ")
                token = token if start else token.removeprefix(" ")
                assert found.text[start:].startswith(token)
        streamed = [event.choices[0].logprobs for event in base.events("text", prompt="", **asked)]
        assert [x for each in streamed for x in each.text_offset] == told.text_offset
    assert moved


# Each parameter, its other value, and what must be asked besides for it to show.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "messages": ([ASKED[1]], {}),
    "prompt": ("The dog", {}),
    "max_tokens": (3, {}),
    "max_completion_tokens": (3, {}),
    "temperature": (2, {}),
    "top_p": (0.0, {}),
    "top_k": (1, {}),
    "repetition_penalty": (50.0, {"temperature": 0}),
    "n": (2, {}),
    "stop": ("e", {}),
    "seed": (1, {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "logprobs": (True, {}),
    "top_logprobs": (2, {"logprobs": True}),
}


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_every_parameter_changes_the_answer(path: str, chatty: Served) -> None:
    kind = ChatRequest if path.startswith("chat") else CompletionRequest
    assert {*kind.model_fields} - {"model"} <= {*CHANGES}
    plain: dict[str, Any] = {"seed": 0, "max_tokens": 8}
    plain |= {"messages": ASKED} if kind is ChatRequest else {"prompt": "Once"}

    def answer(asked: dict[str, Any]) -> str:
        with chatty.client() as client:
            found = client.post(f"/{path}", cast_to=str, body=asked)
        return hide(found)

    assert answer(plain) == answer(plain)
    for name in {*kind.model_fields} - {"model"}:
        changed, beside = CHANGES[name]
        changed = 2 if (name, path) == ("logprobs", "completions") else changed
        before = {**plain, **beside}
        if name == "max_completion_tokens":
            before.pop("max_tokens")
        assert answer({**before, name: changed}) != answer(before), name


def hide(found: str) -> str:
    """Leave out what differs each time."""
    return re.sub(r'"(id|created)":("[^"]*"|\d+)', "", found)


def test_requests_without_a_seed_differ_from_each_other(chatty: Served) -> None:
    texts = {chatty.complete(max_tokens=8).choices[0].text for _ in range(4)}
    assert len(texts) > 1


# What is not answered -------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
    ({"echo": True}, "echo", "not supported"),
    ({"best_of": True}, "best_of", "not supported"),
    ({"frequency_penalty": False}, "frequency_penalty", "not supported"),
    ({"min_p": 0.1}, "min_p", "no parameter"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"n": 17}, "n", "gives 16"),
    ({"stop": ""}, "stop", "1 to 256 characters"),
    ({"stop": ["a"] * 17}, "stop", "up to 16 texts"),
    ({"stop": [1]}, "stop", "list of texts"),
    ({"seed": 2**64}, "seed", "less than or equal"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
    ({"prompt": []}, "prompt", "a text, a list"),
    ({"prompt": [1, "a"]}, "prompt", "a text, a list"),
    ({"prompt": [True]}, "prompt", "a text, a list"),
    ({"prompt": [[]]}, "prompt", "there must be one"),
    ({"prompt": [10**30]}, "prompt", "go from 0 to"),
    ({"prompt": [-1]}, "prompt", "go from 0 to"),
    ({"prompt": 5}, "prompt", "a text, a list"),
    ({str(n): 1 for n in range(101)}, None, "102 parameters"),
]


@pytest.mark.parametrize(("changed", "param", "words"), BAD)
def test_a_bad_parameter_is_refused_by_name(
    changed: dict[str, Any], param: str | None, words: str, base: Served
) -> None:
    with base.client() as client, pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", cast_to=str, body={"prompt": "Once", **changed})
    assert caught.value.param == param
    assert words in caught.value.body["message"]  # type: ignore[index]
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least 1"),
        ([{"role": "user"}], "missing"),
        ([{"role": "king", "content": "Hi"}], "'system'"),
        ([{"role": "user", "content": None}], "list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'text'"),
        ([{"role": "assistant", "content": "Hi"}], "turn 1"),
        ([ASKED[1], {"role": "assistant", "content": "Hi"}], "question"),
        ([ASKED[1], ASKED[1]], "turn 2"),
        ([{**ASKED[1], "tool_calls": []}], "tool_calls"),
        ([{"role": "system", "content": "Be kind."}], "user turn"),
    ],
)
def test_turns_that_are_no_conversation_are_refused(
    messages: Any, words: str, chatty: Served
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chatty.chat(messages)
    assert words in caught.value.body["message"]  # type: ignore[index]
    assert caught.value.param == "messages"


def test_all_problems_of_a_request_stand_in_one_answer(base: Served) -> None:
    with base.client() as client, pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", cast_to=str, body={"temperature": -1, "n": 0})
    for name in ("prompt", "temperature", "n"):
        assert f"'{name}'" in caught.value.body["message"]  # type: ignore[index]


@pytest.mark.parametrize(
    "given",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None},
        {"best_of": 1, "echo": False, "tools": None, "response_format": {"type": "text"}},
        {"stop": None, "temperature": None, "stream_options": None, "n": None, "seed": None},
    ],
)
def test_what_asks_for_nothing_is_no_error(given: dict[str, Any], base: Served) -> None:
    with base.client() as client:
        assert client.post("/completions", cast_to=str, body={"prompt": "Once", **given})


def test_content_may_be_parts_and_a_developer_may_speak(chatty: Served) -> None:
    parts = [{"type": "text", "text": "Tell a "}, {"type": "text", "text": "story."}]
    same = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    answers = [
        chatty.chat(messages, temperature=0).choices[0].message.content
        for messages in (ASKED, same)
    ]
    assert answers[0] == answers[1]


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers(base: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="room for 64") as caught:
        base.complete("Once upon a time " * 40)
    assert caught.value.code == "context_length_exceeded"


def test_a_model_without_turns_sends_chatters_to_completions(base: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/completions"):
        base.chat()


def test_another_model_is_not_here(base: Served) -> None:
    with base.client() as client:
        with pytest.raises(openai.NotFoundError, match=f"Use '{NAME}'") as caught:
            client.completions.create(model="gpt-9", prompt="Once")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-9")
        assert [model.id for model in client.models.list()] == [NAME]
        assert client.models.retrieve(NAME).owned_by == "tinyllm"


# The settings of the server ---------------------------------------------------------------------------


def test_settings_of_sampling_hold_where_a_request_says_nothing(trained_run: Any) -> None:
    """Each setting of `sampling` that `serve` takes changes the answer to the same request."""
    changes: dict[str, tuple[Any, dict[str, Any]]] = {
        "max_new_tokens": (5, {}),
        "temperature": (3.0, {}),
        "top_k": (1, {}),
        "top_p": (0.01, {}),
        "repetition_penalty": (50.0, {"sampling__greedy": True}),
        "greedy": (True, {}),
        "seed": (9, {}),
        "num_samples": (2, {}),
    }
    names = {key.split(".")[1] for key in setting_fields(ServeConfig) if "sampling" in key}
    assert {*changes} == names - {"prompt", "slide"}  # those two are refused
    model = load(trained_run)
    service = Service(model, settings_of().engine)
    service.start()

    def answer(settings: dict[str, Any]) -> list[str]:
        with running(service, settings_of(**settings)) as url:
            return [choice.text for choice in Served(model, service, url).complete().choices]

    plain = answer({})
    for name, (value, beside) in changes.items():
        before = answer(beside) if beside else plain
        assert answer({**beside, f"sampling__{name}": value}) != before, name
    service.stop()
