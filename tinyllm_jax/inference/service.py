"""Engines on threads of their own: questions in from any thread, pieces of text out.

service = Service(model, config.engine)
service.start()
ticket = service.ask(as_text("Once", model.tokenizer), sampling=..., on_piece=print, ...)
"""

import functools
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tinyllm_jax.config import EngineConfig, SamplingConfig
from tinyllm_jax.data.asking import Asked
from tinyllm_jax.data.chat_template import CONTROL_TOKENS
from tinyllm_jax.inference.engine import Engine, Job, News, NewToken, Request
from tinyllm_jax.inference.language_model import LanguageModel, precision
from tinyllm_jax.inference.replicas import Replica, replica_devices
from tinyllm_jax.inference.stored_weights import store
from tinyllm_jax.inference.text_stream import TextStream, token_bytes
from tinyllm_jax.model.decoding_weights import add_head
from tinyllm_jax.model.layers import compute_dtype


class Alternative(NamedTuple):
    """A token as people see it, and its log-probability (nats) before any sampling setting."""

    token_id: int
    text: str
    bytes: bytes
    log_prob: float


class ToldToken(NamedTuple):
    """A token of an answer, and the likeliest in its place."""

    token: Alternative
    alternatives: tuple[Alternative, ...]  # likeliest first


@dataclass(frozen=True)
class Piece:
    """What came since the last piece of one answer.

    Attributes:
        text: May be "", while half a character or the beginning of a stop string is held back.
        tokens: What is told of each token; nothing unless asked for.
        new_tokens: Tokens made since the last piece; one that ends the answer counts.
        ended: "" while it goes on, then once "eos", "stop" (a stop string), "length"
            (`max_new_tokens`), "context" (no room is left), "cancelled" or "failed".
    """

    text: str
    tokens: tuple[ToldToken, ...]
    new_tokens: int
    ended: str


class ServiceStats(NamedTuple):
    """How busy the service is, and what it has done since its start."""

    slots: int
    replicas: int  # engines that are ready
    missing_programs: int  # still being compiled; others stand in for them
    busy_slots: int
    waiting: int
    requests_total: int
    prompt_tokens_total: int
    new_tokens_total: int
    cancelled_total: int
    failed_total: int


class QueueFullError(Exception):
    """As many questions wait as may; ask again later."""


class DrainingError(Exception):
    """The service is about to stop, or has failed, and takes no questions."""


class Ticket:
    """One answer that is being made."""

    def __init__(
        self,
        service: "Service",
        stream: TextStream,
        on_piece: Callable[[Piece], None],
        *,
        prompt_tokens: int,
    ):
        self.prompt_tokens = prompt_tokens
        self.job: Job | None = None
        self.replica: Replica | None = None
        self._service = service
        self._stream = stream
        self._on_piece = on_piece
        self._ended = False

    def cancel(self) -> None:
        """Give up the answer, from any thread: its slot is free at the next step."""
        assert self.job is not None
        self.job.cancel()
        self._service.let_go(self)

    def take(self, news: News) -> None:
        """Turn news of the engine into a piece, on the engine's thread."""
        if news.ended:
            # Whoever hears of the end may ask again at once, so the place is free before.
            self._service.forget(self, given_up=news.ended == "cancelled" and not self._ended)
        # A stop string ends an answer before the engine hears of it.
        if not self._ended:
            self.send(self._piece(news))
        if news.ended:
            self._service.has_told()

    def _piece(self, news: News) -> Piece:
        tokens = news.tokens[:-1] if news.ended == "eos" else news.tokens
        texts, used = [], 0
        for token in tokens:
            texts.append(self._stream.push(token.id))
            used += 1
            if self._stream.stopped:
                break
        if news.ended and not self._stream.stopped:
            texts.append(self._stream.finish())
        ended = "stop" if self._stream.stopped else news.ended
        told: tuple[ToldToken, ...] = ()
        if self.job is not None and self.job.request.alternatives is not None:
            told = tuple(map(self._service.told, tokens[:used]))
        made = used if ended == "stop" else len(news.tokens)
        return Piece("".join(texts), told, made, ended)

    def fail(self) -> None:
        """Tell the asker that there will be no more."""
        if not self._ended:
            self.send(Piece("", (), 0, "failed"))

    def send(self, piece: Piece) -> None:
        """Hand a piece over; an asker who cannot take it loses the rest."""
        self._ended = bool(piece.ended)
        if piece.ended == "stop":
            self.cancel()
        try:
            self._on_piece(piece)
        except Exception:
            # One asker's defect must not end the answers of the others.
            traceback.print_exc(file=sys.stderr)
            self._ended = True
            self.cancel()


class Service:
    """Many answers at once from one model.

    Args:
        model: The model and its tokenizer.
        config: Slots, queue, form of the weights.

    Raises:
        InputError: more room a slot is asked for than the model has positions.
    """

    def __init__(self, model: LanguageModel, config: EngineConfig):
        self.tokenizer = model.tokenizer
        self.can_chat = all(model.tokenizer.control_id(text) is not None for text in CONTROL_TOKENS)
        self._config = config
        devices = replica_devices(config)
        assert config.slots % len(devices) == 0
        with precision(model.config):
            # Not the model's own, which would lie beside those that are kept in fewer bits.
            weights = add_head(model.config, model.weights)
            weights = store(weights, kind=config.weights, dtype=compute_dtype(model.config))
            engines = [
                Engine(
                    model.config,
                    weights,
                    tokens=model.tokenizer.vocab_size,
                    settings=config,
                    slots=config.slots // len(devices),
                    device=device,
                )
                for device in devices
            ]
        self._precision = functools.partial(precision, model.config)
        self._replicas = [
            Replica(engine, precision=self._precision, on_failure=self._fail) for engine in engines
        ]
        self._compiler = threading.Thread(target=self._compile_all, name="compiler")
        self.context = engines[0].room  # tokens of question and answer
        self.places = config.slots + config.queue  # answers at work and waiting
        self._open: set[Ticket] = set()
        self._waiting: deque[Ticket] = deque()  # of these, those that no engine has a place for
        self._telling = 0  # answers that have ended, whose last piece is being handed over
        self._changed = threading.Condition()
        self._closed = self._is_broken = False
        self._requests = self._prompt_tokens = self._new_tokens = 0
        self._cancelled = self._failed = 0
        self._alternatives: dict[int, tuple[str, bytes]] = {}

    def start(self) -> None:
        """Compile what one engine cannot do without, then begin to answer.

        What makes it faster, and the other engines, are compiled while it answers.
        """
        with self._precision():
            self._replicas[0].engine.compile(only_enough=True)
        self._replicas[0].start()
        self._compiler.start()

    def _compile_all(self) -> None:
        def is_wanted() -> bool:
            # A process that ends without `stop` waits for this thread.
            return not self._closed and threading.main_thread().is_alive()

        try:
            with self._precision():
                self._replicas[0].engine.compile(is_wanted=is_wanted)
                for replica in self._replicas[1:]:
                    if not replica.engine.compile(only_enough=True, is_wanted=is_wanted):
                        return
                    replica.start()
                    self._hand_out()
                    replica.engine.compile(is_wanted=is_wanted)
        except Exception:
            # What there is goes on to answer, as `missing_programs` tells.
            if is_wanted():
                traceback.print_exc(file=sys.stderr)

    @property
    def is_well(self) -> bool:
        """Tell whether questions are taken and answered."""
        return any(replica.is_ready for replica in self._replicas) and not self._closed

    def ask(
        self,
        asked: Asked,
        *,
        sampling: SamplingConfig,
        sample_number: int,
        stop: Sequence[str],
        alternatives: int | None,
        on_piece: Callable[[Piece], None],
    ) -> Ticket:
        """Ask for one answer, from any thread.

        Args:
            asked: The prompt; pieces tell only what follows it.
            sampling: All but `prompt`, `num_samples` and `slide`.
            sample_number: Tells apart the answers to one prompt under one seed.
            stop: Texts that end the answer, and are not told.
            alternatives: Likeliest tokens told with each token; None tells no log-probabilities.
            on_piece: Called on the engine's thread; must return at once.

        Raises:
            InputError: the prompt leaves no room for an answer.
            QueueFullError: as many wait as may.
            DrainingError: the service takes no more questions.
        """
        request = Request(asked.ids, asked.end_id, sampling, sample_number, alternatives)
        stream = TextStream(self.tokenizer, lead=asked.lead, stop=stop)
        ticket = Ticket(self, stream, on_piece, prompt_tokens=len(asked.ids))
        job = self._replicas[0].engine.job(request, ticket.take)
        ticket.job = job
        with self._changed:
            if self._closed:
                raise DrainingError("The server is stopping.")
            if len(self._open) >= self.places:
                raise QueueFullError(
                    f"{len(self._open)} answers are in work or waiting, and no more may. Ask again "
                    "later."
                )
            self._open.add(ticket)
            self._requests += 1
            self._prompt_tokens += ticket.prompt_tokens
            self._waiting.append(ticket)
            self._hand_out()
        return ticket

    def _hand_out(self) -> None:
        """Give the questions that wait to the engines that have the fewest, while they have room."""
        with self._changed:
            replica = self._least_busy()
            while self._waiting and replica.open < replica.room:
                self._give(self._waiting.popleft(), replica)
                replica = self._least_busy()

    def _least_busy(self) -> Replica:
        ready = [replica for replica in self._replicas if replica.is_ready]
        return min(ready or self._replicas[:1], key=lambda replica: replica.open)

    def _give(self, ticket: Ticket, replica: Replica) -> None:
        assert ticket.job is not None
        ticket.replica = replica
        replica.open += 1
        replica.put(ticket.job)

    def let_go(self, ticket: Ticket) -> None:
        """Let an engine drop, and tell of, a cancelled question that still waits for one."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._give(ticket, self._least_busy())

    def stats(self) -> ServiceStats:
        """Count what is going on."""
        in_work = sum(replica.engine.in_work for replica in self._replicas)
        return ServiceStats(
            slots=self._config.slots,
            replicas=sum(replica.is_ready for replica in self._replicas),
            missing_programs=sum(each.engine.missing_programs for each in self._replicas),
            busy_slots=min(in_work, self._config.slots),
            waiting=max(len(self._open) - in_work, 0),
            requests_total=self._requests,
            prompt_tokens_total=self._prompt_tokens,
            new_tokens_total=self._new_tokens,
            cancelled_total=self._cancelled,
            failed_total=self._failed,
        )

    def drain(self, *, seconds: float) -> bool:
        """Take no more questions and wait for the answers in work; True when all were finished."""
        with self._changed:
            self._closed = True
            ended = self._changed.wait_for(
                lambda: not (self._open or self._telling), timeout=seconds
            )
            return ended and not self._is_broken

    def stop(self) -> None:
        """Cancel what is in work, and end the threads."""
        with self._changed:
            self._closed = True
            for ticket in self._open:
                ticket.cancel()
        if self._compiler.is_alive():
            self._compiler.join()
        for replica in self._replicas:
            replica.stop()
        for replica in self._replicas:
            replica.join()

    def told(self, token: NewToken) -> ToldToken:
        """Add texts to the ids of a token and of its alternatives."""

        def told(id: int, log_prob: float) -> Alternative:
            if id not in self._alternatives:
                self._alternatives[id] = (
                    self.tokenizer.token_text(id),
                    token_bytes(self.tokenizer, id),
                )
            return Alternative(id, *self._alternatives[id], log_prob)

        return ToldToken(
            told(token.id, token.log_prob), tuple(told(*each) for each in token.alternatives)
        )

    def forget(self, ticket: Ticket, *, given_up: bool) -> None:
        """Count an answer that has left the engine."""
        assert ticket.job is not None
        assert ticket.replica is not None
        with self._changed:
            ticket.replica.open -= 1
            self._hand_out()
            self._open.discard(ticket)
            self._telling += 1
            self._new_tokens += ticket.job.made_tokens
            self._cancelled += given_up

    def has_told(self) -> None:
        """Note that the last piece of an answer has been handed over."""
        with self._changed:
            self._telling -= 1
            self._changed.notify_all()

    def _fail(self, replica: Replica) -> None:
        """Give up the answers of an engine that has failed; the others end theirs."""
        with self._changed:
            self._closed = self._is_broken = True
            left = {ticket for ticket in self._open if ticket.replica in (replica, None)}
            self._waiting.clear()
            self._open -= left
            self._failed += len(left)
            self._changed.notify_all()
        for ticket in left:
            ticket.fail()
