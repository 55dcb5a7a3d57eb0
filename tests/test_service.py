"""The service answers many askers at once and loses none of them, whatever they do."""

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import run_python
from llama_oracle import SMALL, changed, random_weights

from tinyllm_jax.config import EngineConfig, SamplingConfig, TokenizerConfig
from tinyllm_jax.data.asking import as_text
from tinyllm_jax.data.chat_template import CONTROL_TOKENS
from tinyllm_jax.data.tokenizer import extend_tokenizer, train_tokenizer
from tinyllm_jax.data.toy_stories import generate_stories
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.language_model import LanguageModel
from tinyllm_jax.inference.service import DrainingError, Piece, QueueFullError, Service, Ticket
from tinyllm_jax.model.weights import EMBEDDING, HEAD

STORIES = [*generate_stories(seed=3, start=0, stop=60)]
LONG = SamplingConfig(temperature=1.0, max_new_tokens=90)
WAIT_SECONDS = 60.0


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tokenizer = train_tokenizer(STORIES, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)
    config = changed(SMALL, max_position_embeddings=100, vocab_size=300)
    return LanguageModel(config, random_weights(config, std=0.5), tokenizer)


def start(model: LanguageModel, **fields: Any) -> Service:
    service = Service(model, EngineConfig(**{"slots": 2, "queue": 3, **fields}))
    service.start()
    return service


@pytest.fixture(scope="module")
def service(model: LanguageModel) -> Iterator[Service]:
    service = start(model)
    yield service
    service.stop()


class Asker:
    """Somebody who waits for an answer."""

    def __init__(self, service: Service, prompt: str = "One day", **fields: Any):
        self.pieces: list[Piece] = []
        self.done = threading.Event()
        self.begun = threading.Event()
        settings: dict[str, Any] = {
            "sampling": LONG,
            "sample_number": 0,
            "stop": [],
            "alternatives": None,
            **fields,
        }
        self.ticket: Ticket = service.ask(
            as_text(prompt, service.tokenizer), on_piece=self.take, **settings
        )

    def take(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.begun.set()
        if piece.ended:
            self.done.set()

    def wait(self) -> str:
        assert self.done.wait(WAIT_SECONDS)
        return "".join(piece.text for piece in self.pieces)

    @property
    def ended(self) -> str:
        return self.pieces[-1].ended


def test_answers_are_those_of_generate(service: Service, model: LanguageModel) -> None:
    askers = [Asker(service, prompt) for prompt in ("One day", "", "Tim", "The dog and")]
    for asker, prompt in zip(askers, ("One day", "", "Tim", "The dog and"), strict=True):
        [expected] = model.generate(prompt, max_new_tokens=90, temperature=1.0)
        assert prompt + asker.wait() == expected


def test_what_is_counted_adds_up(service: Service) -> None:
    before = service.stats()
    askers = [Asker(service, sample_number=number) for number in range(4)]
    for asker in askers:
        asker.wait()
    after = service.stats()
    made = sum(piece.new_tokens for asker in askers for piece in asker.pieces)
    assert after.new_tokens_total - before.new_tokens_total == made
    assert after.requests_total - before.requests_total == 4
    prompts = sum(asker.ticket.prompt_tokens for asker in askers)
    assert after.prompt_tokens_total - before.prompt_tokens_total == prompts
    assert (after.slots, after.busy_slots, after.waiting) == (2, 0, 0)


def test_a_stop_string_ends_the_answer_and_frees_the_slot(service: Service) -> None:
    whole = Asker(service).wait()
    stop = whole[len(whole) // 2 :][:3]
    asker = Asker(service, stop=[stop, "never"], alternatives=0)
    assert asker.wait() == whole[: whole.index(stop)]
    assert asker.ended == "stop"
    # What is told of tokens ends with the one that completed the stop string.
    tokens = [told.token for piece in asker.pieces for told in piece.tokens]
    assert len(tokens) == sum(piece.new_tokens for piece in asker.pieces)
    assert stop in b"".join(token.bytes for token in tokens).decode(errors="replace")
    Asker(service).wait()
    assert service.stats().busy_slots == 0


def test_tokens_are_told_with_text_and_alternatives(service: Service) -> None:
    asker = Asker(service, alternatives=3)
    text = asker.wait()
    told = [token for piece in asker.pieces for token in piece.tokens]
    assert b"".join(each.token.bytes for each in told).decode(errors="replace") == text
    assert all(len(each.alternatives) == 3 for each in told)
    for each in told:
        log_probs = [alternative.log_prob for alternative in each.alternatives]
        assert log_probs == sorted(log_probs, reverse=True)
        assert each.token.log_prob <= log_probs[0] + 1e-6 <= 1e-6
    assert not any(piece.tokens for piece in _pieces(service))


def _pieces(service: Service) -> list[Piece]:
    asker = Asker(service)
    asker.wait()
    return asker.pieces


def test_more_than_may_wait_are_turned_away(service: Service) -> None:
    askers, refused, message = [], 0, ""
    for number in range(9):
        try:
            askers.append(Asker(service, sample_number=number))
        except QueueFullError as error:
            refused += 1
            message = str(error)
    assert refused >= 1
    assert "Ask again later" in message
    assert len(askers) >= 5
    for asker in askers:
        asker.wait()
    assert Asker(service).wait()


def test_cancelling_frees_slots_and_places_in_the_queue(service: Service) -> None:
    for _ in range(20):
        askers = [Asker(service, sample_number=number) for number in range(5)]
        askers[0].begun.wait(WAIT_SECONDS)
        for asker in askers:
            asker.ticket.cancel()
        for asker in askers:
            asker.wait()
    assert Asker(service).wait()
    stats = service.stats()
    assert (stats.busy_slots, stats.waiting) == (0, 0)
    assert stats.cancelled_total > 20


def test_an_asker_who_fails_harms_nobody_else(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(piece: Piece) -> None:
        raise RuntimeError("this asker is gone")

    good = Asker(service)
    service.ask(
        as_text("Tim", service.tokenizer),
        sampling=LONG,
        sample_number=0,
        stop=[],
        alternatives=None,
        on_piece=fail,
    )
    assert good.wait() == Asker(service).wait()
    assert "this asker is gone" in capsys.readouterr().err
    assert service.stats().busy_slots == 0


def test_prompts_without_room_are_refused_at_once(service: Service) -> None:
    with pytest.raises(InputError, match="there is room for 100"):
        Asker(service, "word " * 200)


def test_draining_ends_what_is_in_work_and_takes_nothing_new(model: LanguageModel) -> None:
    service = start(model)
    askers = [Asker(service, sample_number=number) for number in range(4)]
    assert service.drain(seconds=WAIT_SECONDS)
    assert all(
        asker.done.is_set() and asker.ended in ("eos", "length", "context") for asker in askers
    )
    with pytest.raises(DrainingError):
        Asker(service)
    assert not service.is_well
    service.stop()


def test_stopping_cancels_what_is_in_work(model: LanguageModel) -> None:
    service = start(model)
    asker = Asker(service)
    asker.begun.wait(WAIT_SECONDS)
    service.stop()
    assert asker.done.is_set()
    assert asker.ended in ("cancelled", "eos", "length", "context")


def test_a_defect_of_the_engine_is_told_to_everybody(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = start(model)
    monkeypatch.setattr(service._replicas[0].engine, "_tell", lambda *_: 1 / 0)
    asker = Asker(service)
    asker.wait()
    assert asker.ended == "failed"
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert service.stats().failed_total == 1
    with pytest.raises(DrainingError):
        Asker(service)
    assert not service.drain(seconds=WAIT_SECONDS)
    service.stop()


def test_without_programs_that_cannot_be_compiled_others_answer(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(model, EngineConfig(slots=2))
    engine = service._replicas[0].engine
    compile_some = engine.compile

    def compile_or_fail(*, only_enough: bool = False, **rest: Any) -> bool:
        if only_enough:
            return compile_some(only_enough=True, **rest)
        raise MemoryError

    monkeypatch.setattr(engine, "compile", compile_or_fail)
    service.start()
    service._compiler.join()
    assert "MemoryError" in capsys.readouterr().err
    asker = Asker(service)
    asker.wait()
    assert asker.ended in ("eos", "length", "context")
    assert service.is_well
    assert service.stats().missing_programs == 1
    service.stop()


@pytest.mark.slow
def test_a_process_that_ends_without_stopping_leaves_no_compiler_to_be_killed() -> None:
    """A thread that is killed in the midst of XLA aborts the whole process."""
    lines = (
        "import atexit",
        "from test_service import model, start",
        "service = start(model.__wrapped__(), slots=64)",
        "look = lambda: (service._compiler.is_alive(), service.stats().missing_programs > 0)",
        "atexit.register(lambda: print(*look()))",
        "raise SystemExit(3)",
    )
    ended = run_python("-c", "\n".join(lines), timeout=WAIT_SECONDS)
    assert (ended.returncode, ended.stdout) == (3, "False True\n"), ended.stderr
    assert "Traceback" not in ended.stderr


def test_only_a_tokenizer_with_turns_can_chat() -> None:
    plain = train_tokenizer(STORIES, config=TokenizerConfig(kind="sentencepiece"), vocab_size=400)
    for tokenizer, expected in (
        (plain, False),
        (extend_tokenizer(plain, CONTROL_TOKENS), True),
    ):
        config = changed(SMALL, vocab_size=tokenizer.vocab_size)
        model = LanguageModel(config, random_weights(config), tokenizer)
        assert Service(model, EngineConfig(slots=1)).can_chat == expected


def test_the_model_is_let_go_where_weights_are_kept_in_fewer_bits() -> None:
    config = changed(SMALL, max_position_embeddings=100)
    tokenizer = train_tokenizer(STORIES, config=TokenizerConfig(kind="bytelevel"), vocab_size=300)
    model = LanguageModel(
        changed(config, vocab_size=300), random_weights(changed(config, vocab_size=300)), tokenizer
    )
    service = Service(model, EngineConfig(slots=1, weights="int8"))
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None
    assert not service.is_well


@pytest.mark.parametrize("tied", [True, False])
def test_engines_hold_a_copy_of_the_head_of_a_tied_model(model: LanguageModel, tied: bool) -> None:
    config = changed(model.config, tie_word_embeddings=tied)
    other = LanguageModel(config, random_weights(config), model.tokenizer)
    service = Service(other, EngineConfig(slots=1))
    weights = service._replicas[0].engine._weights
    is_copy = np.array_equal(weights[HEAD], weights[EMBEDDING].T)
    assert is_copy == tied


def test_whoever_hears_of_the_end_may_ask_at_once(model: LanguageModel) -> None:
    service = start(model, slots=1, queue=0)
    done, refused = threading.Event(), []
    left = 20

    def take(piece: Piece) -> None:
        nonlocal left
        if not piece.ended:
            return
        left -= 1
        if left == 0:
            done.set()
            return
        try:
            ask()
        except QueueFullError as error:
            refused.append(error)
            done.set()

    def ask() -> None:
        service.ask(
            as_text("Tim", service.tokenizer),
            sampling=SamplingConfig(max_new_tokens=2),
            sample_number=0,
            stop=[],
            alternatives=None,
            on_piece=take,
        )

    ask()
    assert done.wait(WAIT_SECONDS)
    assert refused == []
    service.stop()


def test_an_answer_that_a_stop_string_ended_was_not_given_up(service: Service) -> None:
    before = service.stats().cancelled_total
    whole = Asker(service).wait()
    asker = Asker(service, stop=[whole[5:8]])
    asker.wait()
    Asker(service).wait()
    assert asker.ended == "stop"
    assert service.stats().cancelled_total == before
