"""Continuous batching: requests join and leave a running batch between steps, none waits for another.

    engine = Engine(config.model, weights, tokens=tokenizer.vocab_size, settings=config.engine)
    engine.admit(engine.job(request, tell))  # tell(news) is called by step()
    while engine.step(): ...

The cache has a fixed number of slots, and each request in work has one. Prompts are read in chunks
of one size, one chunk of each and of a few prompts between two dispatches of new tokens, so long
prompts do not stall the others. What is known of a slot (its last token, place, settings) stays on
the device; the next dispatch is under way while the host reads the last one. All programs are
compiled at the start.

Source: continuous batching: Yu et al. 2022, Orca (OSDI), section 3; prompts in chunks: Agrawal et al.
2023, arXiv:2308.16369.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from tinyllm_jax.config import EngineConfig, ModelConfig, SamplingConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.inference.sampling import RowSettings, next_tokens
from tinyllm_jax.inference.stored_weights import restore, store
from tinyllm_jax.model.compiled import compiled
from tinyllm_jax.model.kv_cache import LayerCache, empty_cache
from tinyllm_jax.model.layers import compute_dtype
from tinyllm_jax.model.weights import merge_weights, model_structure

# The likeliest tokens that can be told with each token; OpenAI's limit, too.
MOST_ALTERNATIVES = 20
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


class _Rows(NamedTuple):
    """All slots, as they lie on the device."""

    cache: tuple[LayerCache, ...]
    present: Bool[Array, "slots vocab"]
    token: Int[Array, "slots"]  # the last of each text
    position: Int[Array, "slots"]  # where it stands
    made: Int[Array, "slots"]  # new tokens so far
    left: Int[Array, "slots"]  # new tokens still allowed; 0 is a slot at rest
    end_id: Int[Array, "slots"]
    told: Bool[Array, "slots"]  # whether log-probabilities are asked for
    settings: RowSettings


class _Begin(NamedTuple):
    """What a slot becomes once its prompt is read."""

    token: Any
    position: Any
    left: Any
    end_id: Any
    told: Any
    settings: RowSettings


class _Made(NamedTuple):
    """What one dispatch made."""

    tokens: Int[Array, "rows steps"]
    counts: Int[Array, "rows"]
    met_end: Bool[Array, "rows"]
    log_probs: Float[Array, "rows steps"]
    alternative_ids: Int[Array, "rows steps alternatives"]
    alternative_log_probs: Float[Array, "rows steps alternatives"]


class Engine:
    """Slots, queue and compiled programs for one model; for one thread.

    Args:
        config: Shape and arithmetic of the model.
        weights: The flat dictionary of `tinyllm_jax.model.weights`.
        tokens: Ids from here on are never picked.
        settings: Chunk size, form of the weights.
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
        self._under_way: tuple[_Made, list[tuple[int, Job]]] | None = None
        structure, _ = model_structure(config)
        stored = store(weights, kind=settings.weights, dtype=compute_dtype(config))
        if device is not None and device.platform == "cpu":
            # What NumPy sees is where the array is, and JAX takes it over as it is: all engines read
            # the same memory.
            stored = jax.tree.map(np.asarray, stored)
        self._weights = jax.device_put(stored, device)
        self._rows = jax.device_put(_empty_rows(config, slots=self.slots, room=self.room), device)
        self._read = compiled(functools.partial(_read_chunk, config, structure), donate_argnums=1)
        self._make = compiled(
            functools.partial(
                _make_tokens, config, structure, tokens, settings.tokens_per_dispatch
            ),
            static_argnames=("rows", "reach"),
            donate_argnums=1,
        )
        self._programs: dict[tuple[int, int], Callable[..., Any]] = {}
        self._read_program: Callable[..., Any] | None = None

    def compile(self, *, is_wanted: Callable[[], bool] = lambda: True) -> bool:
        """Compile every program that will ever run, several at once.

        Args:
            is_wanted: Asked before each program; the rest is left out when it says no.

        Returns:
            Whether all are compiled.
        """
        shapes = [(rows, reach) for rows in self._row_counts() for reach in self._reaches()]
        keep = np.zeros(self.slots, bool)
        chunk = np.zeros((1, self.settings.prefill_tokens), np.int32)
        places = (np.int32(0), np.int32(0), np.int32(0), np.bool_(False))

        def lower_all() -> Iterator[Any]:
            yield self._read.lower(self._weights, self._rows, chunk, places, _begin(None))
            for rows, reach in shapes:
                if is_wanted():
                    yield self._make.lower(self._weights, self._rows, keep, rows=rows, reach=reach)

        with ThreadPoolExecutor(max_workers=4) as threads:
            # XLA compiles one while Python lowers the next.
            compiling = threads.map(lambda one: one.compile() if is_wanted() else None, lower_all())
            programs: list[Any] = [program for program in compiling if program is not None]
        if len(programs) <= len(shapes):
            return False
        self._read_program, self._programs = (
            programs[0],
            dict(zip(shapes, programs[1:], strict=True)),
        )
        return True

    def job(self, request: Request, tell: Callable[[News], None]) -> Job:
        """Check a request and make a job of it; this alone may be called from any thread.

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

    def _dispatch(self) -> tuple[_Made, list[tuple[int, Job]]] | None:
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
        rows = next(n for n in self._row_counts() if n > working[-1][0])
        furthest = min(max(job.reach for _, job in working), self.room)
        reach = next(n for n in self._reaches() if n >= furthest)
        keep = np.zeros(self.slots, bool)
        keep[[slot for slot, _ in working]] = True
        self._rows, made = self._programs[rows, reach](self._weights, self._rows, keep)
        return made, working

    def _tell(self, made: _Made, working: list[tuple[int, Job]]) -> None:
        """Read what a dispatch made and pass it on."""
        # Plain Python numbers: reading them one by one from arrays would take longer than making them.
        fetched: Any = _Made(*(each.tolist() for each in jax.device_get(made)))
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


def _begin(job: Job | None) -> _Begin:
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
    return _Begin(
        token=np.int32(0 if job is None else job.request.prompt_ids[-1]),
        position=np.int32(0 if job is None else len(job.request.prompt_ids) - 1),
        left=np.int32(0 if job is None else job.budget),
        end_id=np.int32(-1 if job is None else job.request.end_id),
        told=np.bool_(job is not None and job.request.alternatives is not None),
        settings=RowSettings(*settings),
    )


def _empty_rows(config: ModelConfig, *, slots: int, room: int) -> _Rows:
    """Make all slots, at rest."""
    first = _begin(None)

    def spread(value: Any) -> Array:
        return jnp.asarray(np.full(slots, value))

    return _Rows(
        cache=empty_cache(config, batch=slots, slots=room, dtype=compute_dtype(config)),
        present=jnp.zeros((slots, config.vocab_size), bool),
        token=spread(first.token),
        position=spread(first.position),
        made=spread(np.int32(0)),
        left=spread(first.left),
        end_id=spread(first.end_id),
        told=spread(first.told),
        settings=RowSettings(*map(spread, first.settings)),
    )


def _read_chunk(
    config: ModelConfig,
    structure: nnx.GraphDef,
    weights: Any,
    rows: _Rows,
    chunk: Int[Array, "1 size"],
    places: tuple[Array, Array, Array, Array],
    begin: _Begin,
) -> _Rows:
    """Write a chunk of one prompt into its slot; behind the last one, let its row begin.

    Args:
        chunk: Tokens, padded at the end.
        places: Slot, position of the first token, number of tokens, whether the prompt ends here.
    """
    slot, start, count, is_last = places
    model = merge_weights(structure, restore(weights, dtype=compute_dtype(config)))
    # Out of range is written nowhere, neither into the cache nor among the present tokens.
    number = jnp.arange(chunk.shape[1])
    room = rows.cache[0].slots()
    positions = jnp.where(number < count, start + number, room)[None]
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 0), rows.cache)
    # What an earlier request left is masked, but a NaN times a weight of 0 would still be a NaN.
    own = jax.tree.map(lambda x: jnp.where(start == 0, jnp.zeros_like(x), x), own)
    own = model.hidden(chunk, positions, cache=own).cache
    cache = jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, slot, 0), rows.cache, own
    )
    seen = jnp.where(start == 0, False, rows.present[slot])
    seen = seen.at[jnp.where(number < count, chunk[0], config.vocab_size)].set(True)

    def put(old: Array, new: Array) -> Array:
        return old.at[slot].set(jnp.where(is_last, new, old[slot]))

    return _Rows(
        cache=cache,
        present=rows.present.at[slot].set(seen),
        token=put(rows.token, begin.token),
        position=put(rows.position, begin.position),
        made=put(rows.made, jnp.int32(0)),
        left=rows.left.at[slot].set(jnp.where(is_last, begin.left, 0)),
        end_id=put(rows.end_id, begin.end_id),
        told=put(rows.told, begin.told),
        settings=RowSettings(*map(put, rows.settings, begin.settings)),
    )


def _make_tokens(
    config: ModelConfig,
    structure: nnx.GraphDef,
    known: int,
    most: int,
    weights: Any,
    everything: _Rows,
    keep: Bool[Array, "slots"],
    *,
    rows: int,
    reach: int,
) -> tuple[_Rows, _Made]:
    """Make up to `most` tokens for each of the first `rows` slots.

    Args:
        keep: The rows that go on; a row that is cancelled or being read must not.
        reach: Slots of the cache that are looked at.
    """
    model = merge_weights(structure, restore(weights, dtype=compute_dtype(config)))
    part: _Rows = jax.tree.map(lambda x: x[:rows], everything)
    part = part._replace(
        cache=jax.tree.map(lambda x: x[:, :, :reach], part.cache),
        left=jnp.where(keep[:rows], part.left, 0),
    )
    every_row = jnp.arange(rows)
    nothing = jnp.zeros((rows, most, MOST_ALTERNATIVES), jnp.float32)
    made = _Made(
        tokens=jnp.zeros((rows, most), jnp.int32),
        counts=jnp.zeros(rows, jnp.int32),
        met_end=jnp.zeros(rows, bool),
        log_probs=nothing[:, :, 0],
        alternative_ids=nothing.astype(jnp.int32),
        alternative_log_probs=nothing,
    )

    def one_token(carried: tuple[Array, _Rows, _Made]) -> tuple[Array, _Rows, _Made]:
        # The first step reads the last token of a prompt once more, so that this program alone
        # holds head and sampler.
        step, part, made = carried
        going = part.left > 0
        # A row at rest writes nowhere.
        positions = jnp.where(going, part.position, reach)[:, None]
        hidden = model.hidden(part.token[:, None], positions, cache=part.cache)
        assert hidden.cache is not None
        logits = model.logits(hidden.states)[:, 0]
        logits = jnp.where(jnp.arange(config.vocab_size)[None] < known, logits, -jnp.inf)
        token = next_tokens(
            logits, present=part.present, settings=part.settings, token_number=part.made
        )
        told = _log_probs(logits, token, asked=part.told & going)
        token = jnp.where(going, token, part.token)
        met_end = going & (token == part.end_id)
        column = jnp.where(going, step, most)
        made = _Made(
            tokens=made.tokens.at[every_row, column].set(token),
            counts=made.counts + going,
            met_end=made.met_end | met_end,
            log_probs=made.log_probs.at[every_row, column].set(told[0]),
            alternative_ids=made.alternative_ids.at[every_row, column].set(told[1]),
            alternative_log_probs=made.alternative_log_probs.at[every_row, column].set(told[2]),
        )
        part = part._replace(
            cache=hidden.cache,
            present=part.present.at[every_row, jnp.where(going, token, config.vocab_size)].set(
                True
            ),
            token=token,
            position=part.position + going,
            made=part.made + going,
            left=jnp.where(met_end, 0, part.left - going),
        )
        return step + 1, part, made

    _, part, made = jax.lax.while_loop(
        lambda carried: (carried[0] < most) & (carried[1].left > 0).any(),
        one_token,
        (jnp.zeros((), jnp.int32), part, made),
    )

    def put(whole: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, new, (0,) * whole.ndim)

    return jax.tree.map(put, everything, part), made


def _log_probs(
    logits: Float[Array, "rows vocab"], token: Int[Array, "rows"], *, asked: Bool[Array, "rows"]
) -> tuple[Float[Array, "rows"], Int[Array, "rows n"], Float[Array, "rows n"]]:
    """Give log-probabilities of the tokens and of the likeliest; zeros when nobody asks."""
    rows, count = len(logits), min(MOST_ALTERNATIVES, logits.shape[1])

    def compute() -> tuple[Array, Array, Array]:
        found = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        best, ids = jax.lax.top_k(found, count)
        missing = ((0, 0), (0, MOST_ALTERNATIVES - count))
        own = jnp.take_along_axis(found, token[:, None], axis=1)[:, 0]
        return own, jnp.pad(ids.astype(jnp.int32), missing), jnp.pad(best, missing)

    def skip() -> tuple[Array, Array, Array]:
        nothing = jnp.zeros((rows, MOST_ALTERNATIVES), jnp.float32)
        return nothing[:, 0], nothing.astype(jnp.int32), nothing

    return jax.lax.cond(asked.any(), compute, skip)
