"""The engine gives each request what it would get alone, whoever else is there."""

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_oracle import SMALL, changed, random_weights

from tinyllm_jax.config import EngineConfig, SamplingConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference import engine as engine_module
from tinyllm_jax.inference.engine import CHUNKS_AT_ONCE, Engine, Job, News, NewToken, Request
from tinyllm_jax.inference.generate import Generator
from tinyllm_jax.inference.stored_weights import store
from tinyllm_jax.model.layers import compute_dtype
from tinyllm_jax.model.weights import merge_weights, model_structure

CONFIG = changed(SMALL, max_position_embeddings=100)
# Chunks are shorter than some prompts, slots are fewer than the requests, and lengths of the cache are
# more than one.
SETTINGS = EngineConfig(slots=4, prefill_tokens=4, tokens_per_dispatch=3)
NO_END = -1
PROMPTS = [
    [1],
    [1, 5, 9, 33],
    [1, 40, 2, 60, 7, 8, 12, 13, 14, 15, 16],
    [1, 3],
    [1, *range(3, 60)],
    [1, 7, 7, 7, 9],
    [1, 11],
]
SAMPLINGS = [
    SamplingConfig(greedy=True, max_new_tokens=40),
    SamplingConfig(temperature=1.0, top_p=0.9, seed=3, max_new_tokens=30),
    SamplingConfig(temperature=0.7, top_k=5, seed=4, max_new_tokens=30),
    SamplingConfig(greedy=True, repetition_penalty=1.7, max_new_tokens=30),
    SamplingConfig(temperature=1.3, top_p=1.0, seed=5, max_new_tokens=100),
    SamplingConfig(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=6, max_new_tokens=20),
    SamplingConfig(temperature=1.0, seed=7, max_new_tokens=2),
]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(CONFIG, std=0.5)


@pytest.fixture(scope="module")
def engine(weights: dict[str, np.ndarray]) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "SHORTEST_REACH", 30)
        engine = Engine(CONFIG, weights, tokens=CONFIG.vocab_size, settings=SETTINGS)
        engine.compile()
        yield engine


class Answer:
    """Collects what the engine tells of one request."""

    def __init__(self, engine: Engine, request: Request):
        self.tokens: list[NewToken] = []
        self.ended = ""
        self.news = 0
        self.job: Job = engine.job(request, self.take)
        engine.admit(self.job)

    def take(self, news: News) -> None:
        assert not self.ended, "told after the end"
        self.tokens += news.tokens
        self.ended = news.ended
        self.news += 1

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def request(number: int, **fields: Any) -> Request:
    base = Request(PROMPTS[number], NO_END, SAMPLINGS[number], 0, None)
    return dataclasses.replace(base, **fields)


def finish(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to rest")


def alone(engine: Engine, number: int) -> list[int]:
    answer = Answer(engine, request(number))
    finish(engine)
    return answer.ids


def test_answers_are_those_of_the_generator(engine: Engine, weights: Any) -> None:
    generator = Generator(CONFIG)
    answers = [Answer(engine, request(number)) for number in range(len(PROMPTS))]
    finish(engine)
    for number, answer in enumerate(answers):
        [[expected]] = generator.generate(
            weights, [PROMPTS[number]], sampling=SAMPLINGS[number], eos_id=NO_END
        )
        assert answer.ids == expected.token_ids.tolist(), number
        assert answer.ended == expected.ended, number
    assert {answer.ended for answer in answers} == {"length", "context"}


def test_an_answer_does_not_depend_on_who_else_is_there(engine: Engine) -> None:
    expected = [alone(engine, number) for number in range(len(PROMPTS))]
    rng = np.random.default_rng(0)
    for _ in range(3):
        answers = {}
        for number in rng.permutation(len(PROMPTS)).tolist():
            answers[number] = Answer(engine, request(number))
            for _ in range(int(rng.integers(4))):
                engine.step()
        finish(engine)
        for number, answer in answers.items():
            assert answer.ids == expected[number], number


def test_the_sample_number_gives_another_answer(engine: Engine) -> None:
    first, second = Answer(engine, request(4)), Answer(engine, request(4, sample_number=1))
    finish(engine)
    assert first.ids != second.ids


def test_an_answer_ends_at_its_end_token(engine: Engine) -> None:
    ids = alone(engine, 1)
    place = next(n for n in range(5, len(ids)) if ids[n] not in ids[:n])
    answer = Answer(engine, request(1, end_id=ids[place]))
    finish(engine)
    assert (answer.ids, answer.ended) == (ids[: place + 1], "eos")


def test_a_long_prompt_does_not_stall_the_others(engine: Engine) -> None:
    short = Answer(engine, request(0))
    while not short.tokens:
        engine.step()
    long = Answer(engine, request(4))
    chunks = -(-len(PROMPTS[4]) // SETTINGS.prefill_tokens)
    before = short.news
    for step in range(1, 9):
        engine.step()
        assert short.news == before + step
    assert not long.tokens
    assert not long.job.is_read
    assert chunks > 8
    finish(engine)


def test_prompts_are_read_in_turns(engine: Engine) -> None:
    long = Answer(engine, request(4))
    engine.step()
    short = Answer(engine, request(1))
    for _ in range(4):
        engine.step()
    assert short.tokens
    assert not long.job.is_read
    finish(engine)


@pytest.mark.slow
def test_no_more_chunks_are_read_than_requests_wait_meanwhile(
    weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SETTINGS, slots=12)
    engine = Engine(CONFIG, weights, tokens=CONFIG.vocab_size, settings=settings)
    engine.compile()
    chunks: list[Any] = []
    read = engine._read_one_chunk
    monkeypatch.setattr(engine, "_read_one_chunk", lambda job: (chunks.append(job), read(job))[1])

    def read_in_a_step() -> int:
        before = len(chunks)
        engine.step()
        assert len(set(chunks[before:])) == len(chunks) - before
        return len(chunks) - before

    lasting = dataclasses.replace(SAMPLINGS[1], max_new_tokens=90)

    def begin(running: int) -> None:
        for number in range(running):
            Answer(engine, request(1, sampling=lasting, sample_number=number))
        while engine.waiting or any(job and not job.is_read for job in engine._slots):
            engine.step()

    begin(2)
    for number in range(5):
        Answer(engine, request(4, sample_number=number))
    assert [read_in_a_step() for _ in range(3)] == [2, 2, 2]
    finish(engine)
    begin(6)
    for number in range(6):
        Answer(engine, request(4, sample_number=number))
    assert [read_in_a_step() for _ in range(3)] == [CHUNKS_AT_ONCE] * 3
    finish(engine)


def test_a_prompt_of_several_chunks_is_read_at_once_where_many_wait(engine: Engine) -> None:
    lasting = dataclasses.replace(SAMPLINGS[1], max_new_tokens=60)
    for number in range(3):
        Answer(engine, request(1, sampling=lasting, sample_number=number))
    for _ in range(4):
        engine.step()
    new = Answer(engine, request(2))
    chunks = -(-len(PROMPTS[2]) // SETTINGS.prefill_tokens)
    assert chunks == 3
    engine.step()
    assert new.job.is_read
    finish(engine)


def test_a_slot_is_given_on_with_the_dispatch_that_makes_its_last_token(engine: Engine) -> None:
    expected, of_next = alone(engine, 6), alone(engine, 1)
    assert len(expected) <= SETTINGS.tokens_per_dispatch
    lasting = dataclasses.replace(SAMPLINGS[1], max_new_tokens=60)
    for is_cancelled in (False, True):
        others = [
            Answer(engine, request(1, sampling=lasting, sample_number=number))
            for number in range(1, 4)
        ]
        for _ in range(4):
            engine.step()
        first, second = Answer(engine, request(6)), Answer(engine, request(1))
        engine.step()
        assert (first.tokens, first.ended) == ([], "")
        assert engine.in_work == SETTINGS.slots
        if is_cancelled:
            first.job.cancel()
        engine.step()
        assert second.job.slot == first.job.slot
        assert (first.ids, first.ended) == (
            ([], "cancelled") if is_cancelled else (expected, "length")
        )
        finish(engine)
        assert second.ids == of_next
        assert {other.ended for other in others} == {"length"}


def test_an_answer_counts_as_work_until_it_has_ended(engine: Engine) -> None:
    counted: list[int] = []
    two_dispatches = dataclasses.replace(SAMPLINGS[1], max_new_tokens=5)
    answer = Answer(engine, request(1, sampling=two_dispatches))
    tell = answer.job.tell
    answer.job.tell = lambda news: (counted.append(engine.in_work), tell(news))[1]
    assert engine.in_work == 0
    finish(engine)
    assert counted == [1, 0]
    assert answer.ended == "length"


def test_programs_that_nobody_wants_any_more_are_not_compiled(weights: Any) -> None:
    engine = Engine(CONFIG, weights, tokens=CONFIG.vocab_size, settings=SETTINGS)
    assert not engine.compile(is_wanted=lambda: False)
    assert not engine.compile(only_enough=True, is_wanted=lambda: False)
    assert engine._read_program is None
    assert engine._programs == {}


def test_log_probabilities_are_those_of_the_model(engine: Engine, weights: Any) -> None:
    answer = Answer(engine, request(5, alternatives=4))
    unasked = Answer(engine, request(1))
    finish(engine)
    structure, _ = model_structure(CONFIG)
    text = [*PROMPTS[5], *answer.ids]
    logits = merge_weights(structure, weights)(jnp.array([text]))[0]
    expected = np.asarray(jax.nn.log_softmax(logits))
    for number, token in enumerate(answer.tokens):
        row = expected[len(PROMPTS[5]) + number - 1]
        assert token.log_prob == pytest.approx(row[token.id], abs=2e-4)
        ids, values = zip(*token.alternatives, strict=True)
        assert [*values] == pytest.approx(np.sort(row)[::-1][:4].tolist(), abs=2e-4)
        assert row[[*ids]].tolist() == pytest.approx([*values], abs=2e-4)
    assert not any(token.alternatives for token in unasked.tokens)


def test_a_cancelled_request_leaves_its_slot_or_the_queue(engine: Engine) -> None:
    answers = [Answer(engine, request(4, sample_number=n)) for n in range(SETTINGS.slots + 2)]
    for _ in range(5):
        engine.step()
    assert engine.in_work == SETTINGS.slots
    in_slot, in_queue = answers[0], answers[-1]
    in_slot.job.cancel()
    in_queue.job.cancel()
    engine.step()
    assert (in_slot.ended, in_queue.ended) == ("cancelled", "cancelled")
    told = len(in_slot.tokens)
    finish(engine)
    assert len(in_slot.tokens) == told
    assert not in_queue.tokens
    assert {answer.ended for answer in answers[1:-1]} == {"context"}


def test_who_is_cancelled_while_others_are_told_hears_of_it_once(engine: Engine) -> None:
    first, second = Answer(engine, request(4)), Answer(engine, request(4, sample_number=1))
    while not second.tokens:
        engine.step()
    tell = first.job.tell

    def cancel_the_other(news: News) -> None:
        second.job.cancel()
        tell(news)

    first.job.tell = cancel_the_other
    finish(engine)
    assert (first.ended, second.ended) == ("context", "cancelled")


def test_a_slot_that_was_cancelled_does_not_disturb_the_next(engine: Engine) -> None:
    expected = alone(engine, 1)
    for steps in range(1, 8):
        first = Answer(engine, request(4))
        for _ in range(steps):
            engine.step()
        first.job.cancel()
        second = Answer(engine, request(1))
        finish(engine)
        assert second.ids == expected, steps


def test_what_is_no_number_in_a_slot_does_not_reach_its_next_owner(engine: Engine) -> None:
    """A masked position has the weight 0, and 0 times NaN is NaN."""
    expected = [alone(engine, number) for number in range(len(PROMPTS))]
    for value in (np.nan, np.inf):
        spoilt = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), engine._rows.cache)
        engine._rows = engine._rows._replace(cache=spoilt)
        answers = [Answer(engine, request(number)) for number in range(len(PROMPTS))]
        finish(engine)
        assert [answer.ids for answer in answers] == expected


def test_in_bfloat16_all_rows_are_always_computed() -> None:
    """A product of another number of rows rounds otherwise, and bfloat16 shows it in the text."""
    config = changed(CONFIG, compute_dtype="bfloat16")
    weights = random_weights(config, std=0.5)
    engine = Engine(config, weights, tokens=CONFIG.vocab_size, settings=SETTINGS)
    assert engine._row_counts() == [4]
    assert Engine(CONFIG, weights, tokens=CONFIG.vocab_size, settings=SETTINGS)._row_counts() == [
        1,
        4,
    ]
    engine.compile()
    expected = [alone(engine, number) for number in range(len(PROMPTS))]
    answers = [Answer(engine, request(number)) for number in range(len(PROMPTS))]
    finish(engine)
    assert [answer.ids for answer in answers] == expected


def test_no_request_compiles_anything(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def answer_all() -> list[list[int]]:
        before = len(compiled)
        answers = [
            Answer(engine, request(number, alternatives=number % 3 or None))
            for number in range(len(PROMPTS))
        ]
        finish(engine)
        assert len(compiled) == before
        return [answer.ids for answer in answers]

    def listen(event: str, seconds: float, **rest: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    monkeypatch.setattr(engine_module, "SHORTEST_REACH", 30)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        engine = Engine(CONFIG, weights, tokens=CONFIG.vocab_size, settings=SETTINGS)
        assert engine.missing_programs == 5
        assert engine.compile(only_enough=True)
        assert len(compiled) >= 2
        assert engine.missing_programs == 3
        slowly = answer_all()
        at_start = len(compiled)
        assert engine.compile()
        assert len(compiled) == at_start + 3
        assert engine.missing_programs == 0
        # The programs that were missing are used, and those that stood in for them said the same.
        used: list[Any] = []
        for shape, program in engine._programs.items():
            engine._programs[shape] = lambda *a, p=program, s=shape: (used.append(s), p(*a))[1]
        assert answer_all() == slowly
        assert {*used} == {*engine._programs}
        assert len(used) > 20
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "no tokens"),
        ([1] * 100, "The prompt has 100 tokens, and there is room for 100"),
        ([1, 67], "model.vocab_size=67"),
        ([-1], "from -1"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(
    engine: Engine, prompt: list[int], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        Answer(engine, request(0, prompt_ids=prompt))


def test_more_room_than_positions_is_refused(weights: Any) -> None:
    with pytest.raises(InputError, match="engine.context=101"):
        Engine(CONFIG, weights, tokens=CONFIG.vocab_size, settings=EngineConfig(context=101))


def test_less_room_ends_answers_earlier(weights: Any) -> None:
    engine = Engine(
        CONFIG, weights, tokens=CONFIG.vocab_size, settings=EngineConfig(slots=1, context=30)
    )
    engine.compile()
    answer = Answer(engine, request(4, prompt_ids=[1, 2, 3]))
    finish(engine)
    assert (len(answer.ids), answer.ended) == (27, "context")


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_picked(
    engine: Engine, weights: Any
) -> None:
    of_all = Answer(engine, request(4, alternatives=20))
    finish(engine)
    few = Engine(CONFIG, weights, tokens=40, settings=EngineConfig(slots=1))
    few.compile()
    of_few = Answer(few, request(4, alternatives=20))
    finish(few)
    for answer, limit_holds in ((of_all, False), (of_few, True)):
        told = {id for token in answer.tokens for id, _ in token.alternatives}
        assert (max(told) < 40) == (max(answer.ids) < 40) == limit_holds


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"compute_dtype": "bfloat16"},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {"tie_word_embeddings": False, "qk_norm": True},
    ],
)
def test_every_kind_of_model_is_served(fields: dict[str, Any]) -> None:
    config = changed(CONFIG, **fields)
    weights = random_weights(config, std=0.5)
    engine = Engine(config, weights, tokens=CONFIG.vocab_size, settings=EngineConfig(slots=1))
    engine.compile()
    answer = Answer(engine, request(4))
    finish(engine)
    [[expected]] = Generator(config).generate(
        weights, [PROMPTS[4]], sampling=SAMPLINGS[4], eos_id=NO_END
    )
    assert answer.ids == expected.token_ids.tolist()


@pytest.mark.slow
def test_settings_change_what_they_name(weights: Any) -> None:
    def make(**fields: Any) -> Engine:
        settings = EngineConfig(slots=1, **fields)
        kept = store(weights, kind=settings.weights, dtype=compute_dtype(CONFIG))
        return Engine(CONFIG, kept, tokens=CONFIG.vocab_size, settings=settings)

    def look(engine: Engine) -> tuple[int, int]:
        engine.compile()
        answer = Answer(engine, request(4))
        steps = 1
        while engine.step():
            steps += 1
        return steps - answer.news, answer.news

    chunks, news = look(make(prefill_tokens=8, tokens_per_dispatch=4))
    other_chunks, other_news = look(make(prefill_tokens=32, tokens_per_dispatch=8))
    assert (other_chunks, other_news) < (chunks, news)
    assert other_news < news

    def held(engine: Engine) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(engine._weights))

    assert held(make(weights="int8")) < held(make(weights="auto")) / 2
    assert held(make(weights="bfloat16")) == held(make(weights="float32")) / 2


@pytest.mark.slow
def test_the_engine_holds_one_cache(weights: Any) -> None:
    """A dispatch that copied the cache would need twice the memory and most of the time."""
    engine = Engine(CONFIG, weights, tokens=CONFIG.vocab_size, settings=EngineConfig(slots=2))
    engine.compile()
    before = engine._rows
    Answer(engine, request(1))
    engine.step()
    gc.collect()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.cache))
    finish(engine)
