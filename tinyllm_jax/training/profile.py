"""A trace of some steps, for people who ask where the time goes."""

from pathlib import Path
from typing import Any

import jax

from tinyllm_jax.training.progress import Progress


class Profile:
    """Traces the steps that follow those which compile, and writes the trace to `profile/`.

    The trace opens at https://ui.perfetto.dev (`perfetto_trace.json.gz`) and in XProf (the folder).

    Args:
        folder: The run folder.
        steps: How many steps are traced at least; 0 is none.
        progress: Told where the trace is.
    """

    def __init__(self, folder: Path, *, steps: int, progress: Progress):
        self._folder = folder / "profile"
        self._steps_left, self._progress = steps, progress
        self._is_running = False

    def before(self, *, compiled: bool) -> None:
        """Begin, once a dispatch will find its program compiled."""
        if compiled and self._steps_left > 0 and not self._is_running:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._is_running = True

    def after(self, steps: range, numbers: Any) -> None:
        """Count the steps of a dispatch, and end once there are enough."""
        if self._is_running:
            self._steps_left -= len(steps)
            if self._steps_left <= 0:
                jax.block_until_ready(numbers)
                self.close()

    def close(self) -> None:
        """Write what was traced, if anything."""
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running, self._steps_left = False, 0
            self._progress.note(f"trace of steps: {self._folder}")
