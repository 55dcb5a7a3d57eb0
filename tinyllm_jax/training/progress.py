"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

# Seconds between status lines where stderr is no terminal (a log file, CI).
LINE_INTERVAL_SECONDS = 10.0


class Progress:
    """Shows steps, loss, learning rate, speed and the time left, on stderr."""

    def __init__(self, *, first_step: int, max_steps: int):
        self.is_terminal = sys.stderr.isatty()
        self._max_steps = max_steps
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            disable=not self.is_terminal,
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% {bar:20} {n_fmt}/{total_fmt} {postfix} | {remaining} left",
        )

    def advance(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        self._bar.update(step - self._bar.n)

    def show(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        tokens_per_second: float,
        mfu: float,
        seconds_left: float,
    ) -> None:
        """Show the newest numbers."""
        numbers = (
            f"loss {loss:.3f} | lr {learning_rate:.1e} | {tokens_per_second:,.0f} tok/s | "
            f"MFU {mfu:.0%}"
        )
        self._bar.set_postfix_str(numbers, refresh=False)
        now = time.monotonic()
        if not self.is_terminal and now - self._last_line >= LINE_INTERVAL_SECONDS:
            self._last_line = now
            minutes, seconds = divmod(int(seconds_left), 60)
            self.note(f"step {step}/{self._max_steps} | {numbers} | {minutes}:{seconds:02} left")

    def note(self, text: str) -> None:
        """Print lines above the bar."""
        tqdm.write(text, file=sys.stderr)

    def show_evaluation(
        self, *, step: int, figure: str, described: Mapping[str, float], text: str
    ) -> None:
        """Print what an evaluation found, other ways to say it, and what the model writes.

        Args:
            figure: The number that it is judged by, with its name.
        """
        details = ", ".join(say_number(name, value) for name, value in described.items())
        self.note(f"step {step}: {figure} ({details})\n  {text}\n")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar on the screen as it stands."""
        self._bar.close()


class Silent(Progress):
    """Shows nothing: another process of the run does."""

    def __init__(self, *, first_step: int, max_steps: int):
        super().__init__(first_step=first_step, max_steps=max_steps)
        self._bar.close()
        self._bar.disable = True

    def note(self, text: str) -> None:
        """Print nothing."""


def say_number(name: str, value: float) -> str:
    """Write a number after its name; a `_share` as percent."""
    if name.endswith("_share"):
        return f"{name.removesuffix('_share').replace('_', ' ')} {value:.1%}"
    return f"{name.replace('_', ' ')} {value:.4g}"
