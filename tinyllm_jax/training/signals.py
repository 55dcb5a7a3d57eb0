"""Turn Ctrl-C and SIGTERM into a wish to stop, so that the step in hand ends and is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StopWish:
    """Holds the signal that asked the run to stop, if one did."""

    received: signal.Signals | None = None

    def reached(self) -> bool:
        """Tell whether the step in hand is to be the last."""
        return self.received is not None


@contextmanager
def stop_on_signals() -> Iterator[StopWish]:
    """Catch the first SIGINT or SIGTERM; a second one acts at once, as usual.

    Outside the main thread, where Python allows no handlers, nothing is caught.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    watched = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in watched}

    def remember(number: int, _: object) -> None:
        wish.received = signal.Signals(number)
        for each in watched:
            signal.signal(each, before[each])

    for number in watched:
        signal.signal(number, remember)
    try:
        yield wish
    finally:
        for number in watched:
            signal.signal(number, before[number])
