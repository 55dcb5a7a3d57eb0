"""What is known of finished steps: fetched late, so that the device is never waited for."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinyllm_jax.config import Config
from tinyllm_jax.data.files import replacing
from tinyllm_jax.model.weights import flops_per_token
from tinyllm_jax.training.devices import peak_flops
from tinyllm_jax.training.metrics import MetricsFile
from tinyllm_jax.training.monitor import Monitor
from tinyllm_jax.training.progress import Progress
from tinyllm_jax.training.rewind import Course

# Slow steps are written before a whole log interval has passed.
WRITE_INTERVAL_SECONDS = 5.0


class StepLog:
    """Gathers the numbers of steps while they are still being computed, and writes them later.

    Args:
        folder: The run folder.
        train_batch: Gives a batch again, to be kept where its numbers are not finite.
        describe_step: Gives what follows from the numbers of a step.
        course: Tells which batch a step took.
        monitor: Judges the rows.
        devices: How many compute the steps.
        metrics: Takes the rows.
        progress: Shows the newest one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Config,
        train_batch: Callable[[int], dict[str, np.ndarray]],
        describe_step: Callable[[Mapping[str, Any]], dict[str, float]],
        course: Course,
        monitor: Monitor,
        devices: int,
        metrics: MetricsFile,
        progress: Progress,
    ):
        self._folder, self._config, self._train_batch = folder, config, train_batch
        self._metrics, self._progress = metrics, progress
        self._describe_step, self._course, self._monitor = describe_step, course, monitor
        self._peak_flops = peak_flops(devices=devices)
        # Sizes of dispatches; each is a program. A look at the layers is one, too, under 0.
        self._compiled: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """Begin anew: of the steps so far nothing more is to be written."""
        self._pending: list[tuple[range, dict[str, jax.Array]]] = []
        self._looks: dict[int, dict[str, dict[str, jax.Array]]] = {}  # at the layers, by step
        self.longest_streak = 0  # steps in a row whose loss or gradient was not finite
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin a stretch of steps, so that speeds leave compiling and evaluating out."""
        self._start = self._last_write = time.perf_counter()
        # Steps that are done but not yet written were made before this stretch.
        self._finished_steps = -sum(len(steps) for steps, _ in self._pending)
        self._waited_seconds = 0.0

    def add(self, steps: range, numbers: dict[str, jax.Array], *, waited_seconds: float) -> None:
        """Take the numbers, stacked, of steps that were handed to the device together.

        Args:
            waited_seconds: How long the steps' batches were waited for.
        """
        self._pending.append((steps, numbers))
        self._waited_seconds += waited_seconds
        self._leave_out_compiling(len(steps), numbers)

    def add_look(self, step: int, numbers: dict[str, dict[str, jax.Array]]) -> None:
        """Take what a look at the layers found, as numbers by layer."""
        self._looks[step] = numbers
        self._leave_out_compiling(0, numbers)

    def has_compiled(self, steps: range) -> bool:
        """Tell whether a dispatch finds its program compiled, as one of its size came before."""
        return len(steps) in self._compiled

    def _leave_out_compiling(self, size: int, numbers: Any) -> None:
        """Wait for the first dispatch of a size: only now the clock means something."""
        if size not in self._compiled:
            jax.block_until_ready(numbers)
            self._compiled.add(size)
            self.restart_clock()

    def write_due(self, steps: range) -> None:
        """Write finished steps if it is time to; those just handed over are left to the device."""
        seconds = time.perf_counter() - self._last_write
        if jax.process_count() > 1:  # what is known must not depend on a clock, since it can stop
            seconds = 0.0  # the run, and all processes at the same step
        interval = self._config.train.log_interval_steps
        if any(step % interval == 0 for step in steps) or seconds > WRITE_INTERVAL_SECONDS:
            self.write(leave=1)

    def write(self, *, leave: int) -> None:
        """Fetch and write the numbers of all steps but those of the newest `leave` dispatches."""
        ready = self._pending[: len(self._pending) - leave]
        if not ready:
            return
        self._pending = self._pending[len(ready) :]
        steps = [step for together, _ in ready for step in together]
        fetched = [
            {name: values[place] for name, values in numbers.items()}
            for (together, _), numbers in zip(
                ready, jax.device_get([numbers for _, numbers in ready]), strict=True
            )
            for place in range(len(together))
        ]
        self._finished_steps += len(steps)
        rows: list[dict[str, Any]] = []
        last: dict[str, Any] = {}
        by_layer: dict[str, Any] = {}  # of the newest step; of all steps it would fill the file
        looks = {step: self._looks.pop(step) for step in steps if step in self._looks}
        looks = jax.device_get(looks)
        for step, numbers in zip(steps, fetched, strict=True):
            plain = {name: np.asarray(value).tolist() for name, value in numbers.items()}
            by_layer = {name: plain.pop(name) for name in [*plain] if isinstance(plain[name], list)}
            streak = int(plain.pop("nonfinite_streak"))
            self.longest_streak = max(self.longest_streak, streak)
            is_skipped = streak > 0
            plain |= self._describe_step(plain)
            last = {"kind": "train", "step": step, **plain, "skipped": is_skipped}
            rows.append(last)
            if is_skipped:
                rows.append(self._keep_batch(step))
            rows += self._monitor.judge(last, streak=streak)
            if step in looks:
                look = jax.tree.map(float, looks[step])
                rows.append({"kind": "monitor", "step": step, **look})
                rows += self._monitor.judge_layers(rows[-1])
        if by_layer:
            rows.append({"kind": "layers", "step": last["step"], **by_layer})
        rows.append(self._speed(last))
        self._metrics.write(rows)
        self._last_write = time.perf_counter()

    def _speed(self, last: Mapping[str, Any]) -> dict[str, Any]:
        config, seconds = self._config, max(time.perf_counter() - self._start, 1e-9)
        tokens = self._finished_steps * config.rows_per_step * config.data.sequence_length
        speed = tokens / seconds
        per_token = flops_per_token(config.model, sequence_length=config.data.sequence_length)
        mfu = speed * per_token / self._peak_flops
        left = config.train.max_steps - last["step"]
        self._progress.show(
            step=last["step"],
            loss=last["loss"],
            learning_rate=last["learning_rate"],
            tokens_per_second=speed,
            mfu=mfu,
            seconds_left=left * seconds / max(self._finished_steps, 1),
        )
        return {
            "kind": "speed",
            "step": last["step"],
            "time": time.time(),
            "tokens_per_second": speed,
            "mfu": mfu,
            "data_wait_share": self._waited_seconds / seconds,
        }

    def _keep_batch(self, step: int) -> dict[str, Any]:
        """Save the batch of a step whose loss or gradient was not finite, and say where."""
        path, number = self._folder / "nonfinite" / f"step_{step}.npz", self._course.batch(step)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **self._train_batch(number))  # type: ignore[arg-type]
        self._progress.note(
            f"step {step}: loss or gradient not finite; weights left as they were, batch kept in "
            f"{path}"
        )
        return {"kind": "nonfinite", "step": step, "batch": number, "file": path.name}
