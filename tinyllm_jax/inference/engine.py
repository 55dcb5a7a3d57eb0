"""Continuous batching: requests join and leave a running batch between steps, none waits for another.

    engine = Engine(config.model, weights, tokens=tokenizer.vocab_size, settings=config.engine)
    engine.admit(engine.job(request, tell))  # tell(news) is called by step()
    while engine.step(): ...

The cache has a fixed number of slots, and each request in work has one. Prompts are read in chunks
of one size, a few chunks between two dispatches of new tokens, the prompts in turn, so long prompts
do not stall the others. What is known of a slot (its last token, place, settings) stays on the
device; the next dispatch is under way while the host reads the last one. No request makes a program:
two are compiled before the first step, and a thread may add those that are faster.

Source: continuous batching: Yu et al. 2022, Orca (OSDI), section 3; prompts in chunks: Agrawal et al.
2023, arXiv:2308.16369.
"""

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinyllm_jax.config import EngineConfig, ModelConfig, SamplingConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.sampling import RowSettings
from tinyllm_jax.inference.slots import Begin, Made, empty_rows, make_tokens, read_chunk
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.layers import compute_dtype

# Chunks that are read between two dispatches at most; those that get tokens wait for them.
CHUNKS_AT_ONCE = 4
# Caches up to this are read whole; of longer ones only as much as the longest text needs.
SHORTEST_REACH = 512


@dataclass(frozen=True)
class Request:
    """What is asked of the engine.

    Attributes:
        prompt_ids: At least one token, bos included.
        end_id: The token that ends the answer; -1 for none.
        sampling: All but `prompt`, `num_samples` and `slide`.
        sample_number: Tells apart the answers to one prompt under one seed.
        alternatives: Likeliest tokens told with each token; None tells no log-probabilities at all.
    """

    prompt_ids: Sequence[int]
    end_id: int
    sampling: SamplingConfig
    sample_number: int
    alternatives: int | None


class NewToken(NamedTuple):
    """A token of an answer; log-probabilities (nats) are the model's own, before any setting."""

    id: int
    log_prob: float
    alternatives: list[tuple[int, float]]  # likeliest first


class News(NamedTuple):
    """What a step brought for one request."""

    tokens: list[NewToken]
    ended: str  # "" while it goes on; "eos", "length", "context" or "cancelled"


class Job:
    """A request on its way; `cancel` may be called between steps."""

    def __init__(self, request: Request, tell: Callable[[News], None], *, room: int):
        self.request = request
        self.tell = tell
        self.cancelled = False
        self.slot = -1
        self.last_turn = 0  # prompts are read in turns
        self.read_tokens = 0  # of the prompt
        self.made_tokens = 0
        self.reach = len(request.prompt_ids)  # positions that dispatches so far may have filled
        left = room - len(request.prompt_ids)
        self.budget = min(request.sampling.max_new_tokens, left)
        self.ends_with = "length" if self.budget == request.sampling.max_new_tokens else "context"
        self.has_ended = False

    @property
    def is_read(self) -> bool:
        """Tell whether the whole prompt stands in the cache."""
        return self.read_tokens >= len(self.request.prompt_ids)

    @property
    def is_dispatched(self) -> bool:
        """Tell whether the dispatches so far make all tokens that it may have."""
        return self.reach >= len(self.request.prompt_ids) + self.budget

    def cancel(self) -> None:
        """Leave the engine at its next step, which tells "cancelled"."""
        self.cancelled = True


class Engine:
    """Slots, queue and compiled programs for one model; for one thread, but for `job` and `compile`.

    Args:
        config: Shape and arithmetic of the model.
        weights: The flat dictionary of `tinyllm_jax.model.weights`, in the form that `store` gave it,
            with or without the head that `add_head` makes.
        tokens: Ids from here on are never picked.
        settings: Room, chunk size and tokens of a dispatch; the form of the weights is theirs already.
        slots: How many of the slots are this engine's; None is all.
        device: Where it computes; None is JAX's default.

    Raises:
        InputError: more room a slot is asked for than the model has positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        *,
        tokens: int,
        settings: EngineConfig,
        slots: int | None = None,
        device: Any = None,
    ):
        limit = config.max_position_embeddings
        if settings.context > limit:
            raise InputError(
                f"engine.context={settings.context} is more than model.max_position_embeddings="
                f"{limit}. Use {limit} or less."
            )
        self.config = config
        self.settings = settings
        self.slots = slots or settings.slots
        self.room = settings.context or limit  # positions of a slot
        self.waiting: deque[Job] = deque()
        self.in_work = 0  # requests that have left the queue and have not ended
        self._turns = itertools.count()
        self._slots: list[Job | None] = [None] * self.slots
        self._under_way: tuple[Made, list[tuple[int, Job]]] | None = None
        kept = dict(weights)
        if device is not None and device.platform == "cpu":
            # What NumPy sees is where the array is, and JAX takes it over as it is: all engines read
            # the same memory.
            kept = jax.tree.map(np.asarray, kept)
        self._weights = jax.device_put(kept, device)
        self._rows = jax.device_put(
            empty_rows(config, _begin(None), slots=self.slots, room=self.room), device
        )
        self._read = compiled(functools.partial(read_chunk, config), donate_argnums=1)
        self._make = compiled(
            functools.partial(make_tokens, config, tokens, settings.tokens_per_dispatch),
            static_argnames=("rows", "reach"),
            donate_argnums=1,
        )
        # The rows themselves are given away at each call, also while a thread lowers another program.
        self._rows_form = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._rows
        )
        everything = (self.slots, self.room)
        shapes = [(rows, reach) for rows in self._row_counts() for reach in self._reaches()]
        self._shapes = [everything, *(shape for shape in shapes if shape != everything)]
        self._programs: dict[tuple[int, int], Callable[..., Any]] = {}
        self._adding = threading.Lock()
        self._read_program: Callable[..., Any] | None = None

    @property
    def missing_programs(self) -> int:
        """Count the programs that are not compiled yet."""
        return len(self._shapes) - len(self._programs) + (self._read_program is None)

    def compile(
        self, *, only_enough: bool = False, is_wanted: Callable[[], bool] = lambda: True
    ) -> bool:
        """Compile the programs that are missing, several at once; from any thread, while others step.

        Args:
            only_enough: Leave out all but the reader of prompts and the program of all rows over the
                whole cache, which stands in for the others.
            is_wanted: Asked before each program; the rest is left out when it says no.

        Returns:
            Whether all that were meant are there.
        """
        meant = self._shapes[: 1 if only_enough else None]
        missing = [shape for shape in meant if shape not in self._programs]
        keep = jax.ShapeDtypeStruct((self.slots,), bool)
        chunk = np.zeros((1, self.settings.prefill_tokens), np.int32)
        places = (np.int32(0), np.int32(0), np.int32(0), np.bool_(False))

        def lower_all() -> Iterator[tuple[tuple[int, int] | None, Any]]:
            if self._read_program is None and is_wanted():
                given = (self._weights, self._rows_form, chunk, places, _begin(None))
                yield None, self._read.lower(*given)
            for rows, reach in missing:
                if is_wanted():
                    given = (self._weights, self._rows_form, keep)
                    yield (rows, reach), self._make.lower(*given, rows=rows, reach=reach)

        def compile_one(shape: tuple[int, int] | None, lowered: Any) -> None:
            if not is_wanted():
                return
            program = lowered.compile()
            with self._adding:
                if shape is None:
                    self._read_program = program
                else:
                    # A new dictionary, since the thread that steps may look into this one.
                    self._programs = {**self._programs, shape: program}

        with ThreadPoolExecutor(max_workers=4) as threads:
            # XLA compiles one while Python lowers the next.
            under_way = [threads.submit(compile_one, *each) for each in lower_all()]
        for each in under_way:
            each.result()
        return self._read_program is not None and all(shape in self._programs for shape in meant)

    def job(self, request: Request, tell: Callable[[News], None]) -> Job:
        """Check a request and make a job of it; may be called from any thread.

        Args:
            request: Prompt and settings.
            tell: Called from `step` with what is new, the last time with `ended`.

        Raises:
            InputError: the prompt is empty, has ids that the model lacks, or leaves no room.
        """
        ids = np.asarray(request.prompt_ids)
        if ids.size == 0:
            raise InputError("The prompt has no tokens. Begin with the bos token at least.")
        if ids.size >= self.room:
            raise InputError(
                f"The prompt has {ids.size} tokens, and there is room for {self.room} with the "
                "answer. Shorten it."
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise InputError(
                f"The prompt has ids from {ids.min()} to {ids.max()}, and model.vocab_size="
                f"{self.config.vocab_size}. Use the tokenizer that the model was trained with."
            )
        return Job(request, tell, room=self.room)

    def admit(self, job: Job) -> None:
        """Put a job at the end of the queue."""
        self.waiting.append(job)

    def step(self) -> bool:
        """Let requests in, read chunks of prompts, make some tokens for all; False when idle.

        No more chunks than there are requests that wait for tokens meanwhile, the prompts in turn: few do
        not wait for many, and free slots fill soon.
        """
        assert self._read_program is not None, "compile() comes first"
        self._drop_cancelled()
        while self.waiting and None in self._slots:
            # The lowest free slot, since few rows are computed while only low slots are in use.
            slot = self._slots.index(None)
            self._slots[slot] = job = self.waiting.popleft()
            job.slot, job.last_turn = slot, next(self._turns)
            self.in_work += 1
        working = [job for job in self._slots if job is not None]
        unread = deque(sorted((j for j in working if not j.is_read), key=lambda job: job.last_turn))
        for _ in range(max(1, min(CHUNKS_AT_ONCE, len(working) - len(unread)))):
            if unread:
                self._read_one_chunk(job := unread.popleft())
                if not job.is_read:
                    unread.append(job)
        before, self._under_way = self._under_way, self._dispatch()
        if before is not None:
            self._tell(*before)
        return bool(self.waiting or self._under_way or any(self._slots))

    def _drop_cancelled(self) -> None:
        for job in [job for job in self.waiting if job.cancelled]:
            self.waiting.remove(job)
            self._end(job, "cancelled")
        for slot, job in enumerate(self._slots):
            if job is not None and job.cancelled:
                self._slots[slot] = None
                self._end(job, "cancelled")

    def _end(self, job: Job, why: str, tokens: Sequence[NewToken] = ()) -> None:
        job.has_ended = True
        self.in_work -= job.slot >= 0
        job.tell(News([*tokens], why))

    def _read_one_chunk(self, job: Job) -> None:
        prompt, size = job.request.prompt_ids, self.settings.prefill_tokens
        start = job.read_tokens
        part = prompt[start : start + size]
        chunk = np.zeros((1, size), np.int32)
        chunk[0, : len(part)] = part
        job.read_tokens += len(part)
        job.last_turn = next(self._turns)
        assert self._read_program is not None
        self._rows = self._read_program(
            self._weights,
            self._rows,
            chunk,
            (np.int32(job.slot), np.int32(start), np.int32(len(part)), np.bool_(job.is_read)),
            _begin(job),
        )

    def _dispatch(self) -> tuple[Made, list[tuple[int, Job]]] | None:
        """Begin to make tokens for all that are read; which rows ended is known on the device first."""
        working = [
            (slot, job) for slot, job in enumerate(self._slots) if job is not None and job.is_read
        ]
        if not working:
            return None
        for slot, job in working:
            job.reach += self.settings.tokens_per_dispatch
            if job.is_dispatched:
                # The slot is free for what the device does after this dispatch.
                self._slots[slot] = None
        highest, furthest = working[-1][0], min(max(job.reach for _, job in working), self.room)
        programs = self._programs
        least = min(each for each in programs if each[0] > highest and each[1] >= furthest)
        keep = np.zeros(self.slots, bool)
        keep[[slot for slot, _ in working]] = True
        self._rows, made = programs[least](self._weights, self._rows, keep)
        return made, working

    def _tell(self, made: Made, working: list[tuple[int, Job]]) -> None:
        """Read what a dispatch made and pass it on."""
        # Plain Python numbers: reading them one by one from arrays would take longer than making them.
        fetched: Any = Made(*(each.tolist() for each in jax.device_get(made)))
        for slot, job in working:
            # Once, since other threads cancel.
            is_cancelled, has_slot = job.cancelled, self._slots[slot] is job
            if is_cancelled and not has_slot and not job.has_ended:
                self._end(job, "cancelled")
            if is_cancelled or job.has_ended:
                continue  # one with a slot leaves it, and is told, at the next step
            count, wanted = fetched.counts[slot], job.request.alternatives
            tokens = []
            for place in range(count):
                alternatives: list[tuple[int, float]] = []
                if wanted:
                    alternatives = [
                        *zip(
                            fetched.alternative_ids[slot][place][:wanted],
                            fetched.alternative_log_probs[slot][place][:wanted],
                            strict=True,
                        )
                    ]
                tokens.append(
                    NewToken(
                        fetched.tokens[slot][place], fetched.log_probs[slot][place], alternatives
                    )
                )
            job.made_tokens += count
            ended = ""
            if fetched.met_end[slot]:
                ended = "eos"
            elif job.made_tokens >= job.budget:
                ended = job.ends_with
            if ended:
                if has_slot:
                    self._slots[slot] = None
                self._end(job, ended, tokens)
            elif tokens:
                job.tell(News(tokens, ""))

    def _row_counts(self) -> list[int]:
        """List the numbers of rows that programs exist for: 1, 4, 16, ... and all slots.

        A product of another number of rows may round otherwise, which in bfloat16 changes texts: then, and
        on accelerators, where few rows take as long as many, all slots are always computed.
        """
        wide = jnp.finfo(compute_dtype(self.config)).bits >= 32
        few = wide and jax.default_backend() == "cpu"
        counts = _powers(4, start=1, below=self.slots) if few else []
        return [*counts, self.slots]

    def _reaches(self) -> list[int]:
        """List the lengths of cache that programs exist for."""
        return [*_powers(4, start=SHORTEST_REACH, below=self.room), self.room]


def _powers(base: int, *, start: int, below: int) -> list[int]:
    found = []
    while start < below:
        found.append(start)
        start *= base
    return found


def _begin(job: Job | None) -> Begin:
    """Write down what a slot becomes for this request; None gives the shapes."""
    sampling = SamplingConfig() if job is None else job.request.sampling
    settings: list[Any] = [
        np.float32(0.0 if sampling.greedy else sampling.temperature),
        np.int32(sampling.top_k),
        np.float32(sampling.top_p),
        np.float32(sampling.repetition_penalty),
        np.uint32(sampling.seed),
        np.int32(0 if job is None else job.request.sample_number),
    ]
    return Begin(
        token=np.int32(0 if job is None else job.request.prompt_ids[-1]),
        position=np.int32(0 if job is None else len(job.request.prompt_ids) - 1),
        left=np.int32(0 if job is None else job.budget),
        end_id=np.int32(-1 if job is None else job.request.end_id),
        told=np.bool_(job is not None and job.request.alternatives is not None),
        settings=RowSettings(*settings),
    )
