"""Several processes and one run: how they meet, what they agree on, and how they end.

JAX's own multi-controller runtime does the work: every process runs the same program on its own
devices. What is said between hosts here (who is there, which settings and data each has, why one
ended) goes through the key-value store of its coordination service, beside the arrays, so that
nothing waits for a device that another process no longer has.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tinyllm_jax.config import Config, DistributedConfig, read_preset
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import build
from tinyllm_jax.training.signals import StopWish, stop_on_signals

T = TypeVar("T")
# A wait looks this often whether another process has ended.
LOOK_SECONDS = 2.0
# Processes that end give each other so long to say why; then those that said nothing are gone.
ROLL_CALL_SECONDS = 5.0
# A process that failed has so long to clean up.
CLEAN_UP_SECONDS = 20.0
# How the runtime, Gloo and NCCL speak of a connection that ended.
OF_A_PEER = re.compile(
    r"gloo|nccl|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|coordination service|heartbeat|barrier|"
    r"connection (reset|closed|refused)|socket closed",
    re.IGNORECASE,
)
KEYS, ENDED = "tinyllm/turn/", "tinyllm/ended/"


class PeerEndedError(Exception):
    """Another process has ended while this one waited for it."""


class Hosts:
    """This process among those of its run.

    All processes call everything here in the same order, as they do with what computes.

    Args:
        index: This process, from 0.
        count: Processes of the run.
        client: Of JAX's coordination service; None with one process.
        coordinator: HOST:PORT of that service.
    """

    def __init__(self, index: int, count: int, *, client: Any, coordinator: str):
        self.index, self.count, self.coordinator = index, count, coordinator
        self.go_on = "the same command and --auto-resume"  # what to type when a process is gone
        self._client = client
        self._turns = itertools.count()
        self._exit_code: int | None = None  # once this process leaves
        self._calls_the_roll = False

    @property
    def is_first(self) -> bool:
        """Tell the process that writes what is written once."""
        return self.index == 0

    def share(self, text: str) -> list[str]:
        """Give every process the texts of all, by their numbers.

        Raises:
            InputError, PeerEndedError: another process has ended instead.
        """
        if self.count == 1:
            return [text]
        number = next(self._turns)
        turn = f"{KEYS}{number}"
        self._client.key_value_set(f"{turn}/{self.index}", text)
        if self.is_first:
            texts = [self._wait_for(f"{turn}/{other}") for other in range(self.count)]
            self._client.key_value_set(f"{turn}/all", json.dumps(texts))
            if number > 0:  # who is in this turn has read all of the one before
                self._client.key_value_delete(f"{KEYS}{number - 1}")
        return json.loads(self._wait_for(f"{turn}/all"))

    def meet(self) -> None:
        """Wait for all."""
        self.share("")

    def first(self, work: Callable[[], Any]) -> None:
        """Let process 0 do what is done once, while the others wait."""
        if self.is_first:
            work()
        self.meet()

    def first_tells(self, work: Callable[[], str]) -> str:
        """Let process 0 do what is done once, and give all what it says."""
        return self.share(work() if self.is_first else "")[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Let process 0 do something, and then all others, who may find it done."""
        if not self.is_first:
            self.meet()
            return work()
        done = work()
        self.meet()
        return done

    @contextlib.contextmanager
    def first_in(self, context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
        """Let process 0 be in a context, such as a lock, while all do what follows."""
        with context if self.is_first else contextlib.nullcontext():
            self.meet()
            yield

    @contextlib.contextmanager
    def first_writes(self, folder: Path) -> Iterator[Path]:
        """Give process 0 a folder, and all others one whose content is thrown away."""
        if self.is_first:
            yield folder
            return
        with tempfile.TemporaryDirectory() as other:
            yield Path(other)

    def agree(self, facts: Mapping[str, Any], *, advice: str) -> None:
        """Refuse to go on where processes do not have the same facts.

        Raises:
            InputError: on all of them; names what differs, and ends with the advice.
        """
        plain = {
            key: json.dumps(value, sort_keys=True, default=str) for key, value in facts.items()
        }
        found = self.share(json.dumps([socket.gethostname(), plain]))
        if len({json.dumps(json.loads(each)[1]) for each in found}) == 1:
            return
        (_, ours), *others = map(json.loads, found)
        lines = [
            f"{key} is {theirs.get(key, 'not set')} in process {index} ({name}) and "
            f"{ours.get(key, 'not set')} in process 0. {advice}"
            for index, (name, theirs) in enumerate(others, start=1)
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]
        raise InputError("\n".join(lines[:10]))

    def _wait_for(self, key: str) -> str:
        while True:
            try:
                return self._client.blocking_key_value_get(key, int(LOOK_SECONDS * 1000))
            except Exception as error:  # the runtime has one type for all that happens
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            for index, (code, reason) in self._ended().items():
                if code == 2:
                    raise InputError(f"process {index} of {self.count} stopped: {reason}")
                raise PeerEndedError(reason)

    def _ended(self) -> dict[int, tuple[int, str]]:
        """Read which processes have said that they end, with which exit code and why."""
        entries = self._client.key_value_dir_get(ENDED)
        return {int(key.rsplit("/", 1)[-1]): json.loads(value) for key, value in entries}

    def leave(self, error: BaseException) -> None:
        """Tell the others that this process ends. Where they are the reason, it ends here.

        Otherwise it is for the caller to say what happened, and there is a while for it.
        """
        is_input = isinstance(error, InputError)
        self._exit_code = 2 if is_input else 1
        is_lost = isinstance(error, PeerEndedError) or (
            isinstance(error, (ValueError, RuntimeError))
            and not is_input
            and OF_A_PEER.search(str(error)) is not None
        )
        name = "" if is_input else f"{type(error).__name__}: "
        ended = self._roll_call(code=self._exit_code, reason="" if is_lost else f"{name}{error}")
        if is_lost:
            who = self._who_is_gone(ended)
            if who is None:  # nobody; so it was no peer after all
                traceback.print_exception(error)
                who = "the connection between the processes broke"
            self._end(who)
        guard = threading.Timer(CLEAN_UP_SECONDS, os._exit, [1])
        guard.daemon = True
        guard.start()

    def _roll_call(self, *, code: int, reason: str) -> dict[int, tuple[int, str]] | None:
        """Tell why this process ends, and hear it of the others; None without process 0."""
        self._calls_the_roll = True
        try:
            self._client.key_value_set(f"{ENDED}{self.index}", json.dumps([code, reason]))
            end = time.monotonic() + ROLL_CALL_SECONDS
            while len(ended := self._ended()) < self.count and time.monotonic() < end:
                time.sleep(0.1)
        except Exception:  # of whatever type: the service does not answer
            return None
        finally:
            self._calls_the_roll = False
        if self.is_first:
            time.sleep(1.0)  # the others read until then
        return ended

    def _who_is_gone(self, ended: Mapping[int, tuple[int, str]] | None) -> str | None:
        if ended is None:
            return f"process 0 of {self.count} (at {self.coordinator}) is gone"
        said = [
            f"process {index} of {self.count} "
            + (f"stopped ({ended[index][1]})" if index in ended else "is gone")
            for index in range(self.count)
            if index not in ended or ended[index][1]
        ]
        return ", ".join(said) or None

    def _end(self, who: str) -> NoReturn:
        """End this process at once, with one line that says why."""
        line = (
            f"error: {' '.join(who.split())}, so process {self.index} stops. Start all again, as "
            f"many as there are, with {self.go_on}."
        )
        print(line, file=sys.stderr, flush=True)
        os._exit(1)  # what Python does at its end would wait for the others

    def end_on_abort(self) -> None:
        """Turn the runtime's abort, when heartbeats or process 0 are missing, into one line.

        It calls `abort()` in a thread of its own and gives Python no other way to notice: in jaxlib
        0.10 its callback for missed heartbeats fails (std::bad_cast).
        """
        if sys.platform == "win32":
            return

        def on_abort(_: int) -> None:
            if self._exit_code is not None:  # the main thread knows more, and says it
                time.sleep(ROLL_CALL_SECONDS + 2.0)
                # Unless it asks a service that will never answer, which gives no time limit.
                if not self._calls_the_roll:
                    os._exit(self._exit_code)
            if self.is_first or can_reach(self.coordinator):
                self._end("another process (named in the lines above) is gone")
            self._end(f"process 0 of {self.count} (at {self.coordinator}) is gone")

        global _handler
        _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
        library = ctypes.CDLL(None)
        library.signal.restype = ctypes.c_void_p
        library.signal(int(signal.SIGABRT), _handler)


_here = Hosts(0, 1, client=None, coordinator="")
_handler: Any = None  # must live as long as the process


def hosts() -> Hosts:
    """Give this process among those of its run; JAX, too, has one such state a process."""
    return _here


@contextlib.contextmanager
def joined(settings: DistributedConfig) -> Iterator[Hosts]:
    """Meet the other processes, if there are any, and part from them at the end.

    Raises:
        InputError: they cannot meet.
    """
    global _here
    if not settings.coordinator:
        yield hosts()
        return
    _here = initialise(settings)
    _here.end_on_abort()
    try:
        counts = {"distributed.num_processes": _here.count}
        _here.agree(counts, advice="Start all with the same number.")
        yield _here
        _here.meet()
    except BaseException as error:
        _here.leave(error)
        raise
    import jax

    jax.distributed.shutdown()


def distributed_settings(
    preset: str | None, overrides: Mapping[str, Any], problems: Sequence[str]
) -> DistributedConfig:
    """Read how processes meet from a command line whose other settings are not yet checked.

    Raises:
        InputError: they break rules; told with what is already known to be wrong.
    """
    table = {**(read_preset(preset)[1] if preset else {}), **overrides}
    mine = {key: value for key, value in table.items() if key.startswith("distributed.")}
    if not mine:
        return DistributedConfig()
    return build(Config, [("", mine)], problems).distributed


def initialise(settings: DistributedConfig) -> Hosts:
    """Start JAX's runtime for several processes, and wait until all are there.

    Raises:
        InputError: nobody listens at the address, or the cluster cannot be asked.
    """
    import jax
    from jax._src import distributed

    explicit = settings.coordinator != "auto"
    is_complete = explicit and settings.num_processes > 0 and settings.process_id >= 0
    if explicit and settings.process_id > 0:
        wait_until_reachable(settings)
    place = settings.coordinator if explicit else "the first process of the job"
    missing = threading.Timer(
        settings.start_timeout_seconds, _say_who_is_missing, [place, settings]
    )
    missing.daemon = True
    missing.start()
    try:
        jax.distributed.initialize(
            coordinator_address=settings.coordinator if explicit else None,
            num_processes=settings.num_processes or None,
            process_id=settings.process_id if settings.process_id >= 0 else None,
            # Where all is said, other clusters that this one runs on must not be asked.
            cluster_detection_method="deactivate" if is_complete else None,
            # Longer than ours, whose end is a line and not an abort.
            initialization_timeout=settings.start_timeout_seconds + 60,
            heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=60,
        )
    except Exception as error:
        # Of several types, where a cluster cannot be asked or an address not be used.
        raise InputError(_why_not(settings, error)) from error
    finally:
        missing.cancel()
    state = distributed.global_state
    return Hosts(
        state.process_id,
        state.num_processes,
        client=state.client,
        coordinator=state.coordinator_address or "",
    )


def _why_not(settings: DistributedConfig, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if settings.coordinator == "auto":
        return (
            f"distributed.coordinator=auto: the cluster does not say who is there ({reason}). Start "
            "with srun, mpirun, a Kubernetes Job or on a Cloud TPU, or give "
            "--distributed.coordinator HOST:PORT, num_processes and process_id."
        )
    return (
        f"distributed.coordinator={settings.coordinator}: {reason}. Use a free port of the host of "
        "process 0, and give each process a process_id of its own."
    )


def _say_who_is_missing(place: str, settings: DistributedConfig) -> None:
    """End this process, which waits inside the runtime; that would only abort."""
    print(
        f"error: not all processes came to {place} within {settings.start_timeout_seconds} s. Start "
        f"all of them{f' ({settings.num_processes})' if settings.num_processes else ''}, each with "
        "its own distributed.process_id, or raise --distributed.start_timeout_seconds.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def wait_until_reachable(settings: DistributedConfig) -> None:
    """Wait until process 0 listens: JAX itself would abort where it never does.

    Raises:
        InputError: it does not in time.
    """
    end = time.monotonic() + settings.start_timeout_seconds
    while not can_reach(settings.coordinator):
        if time.monotonic() > end:
            raise InputError(
                f"distributed.coordinator={settings.coordinator}: nobody listens there after "
                f"{settings.start_timeout_seconds} s. Start process 0 on that host, open the port in "
                "its firewall, or raise --distributed.start_timeout_seconds."
            )
        time.sleep(0.2)


def can_reach(address: str) -> bool:
    """Tell whether anything listens at HOST:PORT."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
            return True
    except OSError:  # also a name that is not known, or not yet
        return False


class StopTogether(StopWish):
    """The wish of any process to stop, which all hear of at the same step."""

    def __init__(self) -> None:
        self._calls = 0

    def reached(self) -> bool:
        """Tell whether to stop now, once a dispatch."""
        from jax.experimental import multihost_utils

        # Numbered by calls, since the runtime takes the number after the largest it has seen.
        self._calls += 1
        if not multihost_utils.reached_preemption_sync_point(self._calls):
            return False
        self.received = self.received or signal.SIGTERM
        return True


@contextlib.contextmanager
def stop_together() -> Iterator[StopWish]:
    """Catch what asks to stop, in any process of the run.

    With several processes SIGTERM stays with JAX's preemption notice, which tells the others; Ctrl-C
    is handed to it.
    """
    if hosts().count == 1 or threading.current_thread() is not threading.main_thread():
        with stop_on_signals() as wish:
            yield wish
        return
    wish, before = StopTogether(), signal.getsignal(signal.SIGINT)

    def hand_on(number: int, _: object) -> None:
        wish.received = signal.Signals(number)
        signal.signal(signal.SIGINT, before)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, hand_on)
    try:
        yield wish
    finally:
        signal.signal(signal.SIGINT, before)
