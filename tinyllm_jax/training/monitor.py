"""Watches the numbers of a run for what goes wrong, and says what to try.

Both packages judge their rows of metrics here; this module imports neither framework.

Source: z-scores by median and median absolute deviation: Iglewicz and Hoaglin 1993, How to Detect and
Handle Outliers.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tinyllm_jax.config import Config

Row = dict[str, Any]
# A median absolute deviation times this is the standard deviation of normally distributed numbers.
DEVIATIONS = 1.4826
# The spread of losses is taken to be this share of them at least: where they hardly differ from step to
# step, the deviation is a matter of chance.
LEAST_SPREAD = 0.01
# From so many losses on their spread says something: of normally distributed ones, 3 in 100,000 are then
# told as spikes at a z of 8; from 10 on it would be 8 in 10,000, and from 5 on one in 70.
ENOUGH_LOSSES = 20
# From here on a layer's number is told. A softmax over logits that far apart sees one token, with a
# gradient of 0; to a residual stream of a thousand, in bfloat16 and its three digits, nothing below two
# can be added; an update of a good run is about a thousandth of the weights, and of its first steps a
# few hundredths.
LARGEST_LOGIT, LARGEST_ACTIVATION, LARGEST_UPDATE = 100.0, 1000.0, 0.3


class Trouble(NamedTuple):
    """Steps that a run goes back from."""

    first: int
    last: int
    what: str  # for people


class Monitor:
    """Judges the rows of a run in their order, and adds warnings to them.

    What it thinks of a row depends on the rows before alone, so that a resumed run warns as one that was
    never stopped.

    Args:
        past: The rows so far.
        note: Tells the person something.
    """

    def __init__(
        self, config: Config, *, past: Iterable[Mapping[str, Any]], note: Callable[[str], None]
    ):
        self._settings, self._limit = config.monitor, config.train.max_nonfinite_steps
        # The loss of answers that a model has just written says nothing about how well it does.
        self._judges_loss = config.run.mode != "rlhf" and self._settings.spike_z > 0
        self._note = note
        self.go_back(past)

    def go_back(self, past: Iterable[Mapping[str, Any]]) -> None:
        """Forget all but these rows."""
        self.trouble: Trouble | None = None  # what to go back from, where that may be
        self._losses: deque[float] = deque(maxlen=self._settings.spike_window)
        self._told: set[str] = set()  # warnings of the last look at layers
        self._last_spike = -1
        self.rewinds = 0
        for row in past:
            if row["kind"] == "train" and not isinstance(row["loss"], str):
                self._losses.append(row["loss"])
            elif row["kind"] == "rewind":
                self.rewinds += 1

    def judge(self, row: Row, *, streak: int) -> list[Row]:
        """Give the warnings that a training row deserves.

        Args:
            streak: Steps in a row, this the last of them, whose update was not applied.
        """
        step, loss = row["step"], row["loss"]
        if self._settings.rewinds > 0 and streak >= self._limit and self.trouble is None:
            what = f"{streak} steps in a row had a loss or gradient that is not finite"
            self.trouble = Trouble(step - streak + 1, step, what)
        if not self._judges_loss or not math.isfinite(loss):
            return []
        before = [*self._losses]
        self._losses.append(loss)
        if len(before) < min(self._settings.spike_window // 2, ENOUGH_LOSSES):
            return []
        usual, z = robust_z(loss, before)
        if z < self._settings.spike_z:
            return []
        what = f"loss spike {loss:.4g} where {usual:.4g} is usual (robust z {z:.0f})"
        text = f"step {step}: {what}. Try a lower --learning-rate or a longer --warmup-steps"
        if self._settings.rewinds == 0:
            text += ", or --monitor.rewinds 2, which goes back and leaves such batches out"
        if self._last_spike != step - 1:
            self._note(f"{text}.")
        self._last_spike = step
        if self._settings.rewinds > 0 and self.trouble is None:
            self.trouble = Trouble(step, step, what)
        told = {"value": loss, "usual": usual, "z": z}
        return [{"kind": "warning", "step": step, "name": "loss_spike", **told, "text": f"{text}."}]

    def judge_layers(self, row: Row) -> list[Row]:
        """Give the warnings that a look at the layers deserves."""
        found = [*_unusual_layers(row)]
        for each in found:
            if each["name"] not in self._told:
                self._note(each["text"])
        self._told = {each["name"] for each in found}
        return found


def robust_z(number: float, before: Sequence[float]) -> tuple[float, float]:
    """Give the median of the numbers before, and how many robust standard deviations above it one is."""
    usual = statistics.median(before)
    deviation = DEVIATIONS * statistics.median(abs(each - usual) for each in before)
    spread = max(deviation, LEAST_SPREAD * abs(usual), 1e-6)
    return usual, (number - usual) / spread


def _unusual_layers(row: Row) -> Iterable[Row]:
    def largest(parts: Mapping[str, float], limit: float) -> tuple[str, float] | None:
        """Find the layer with the largest number above a limit; one that is none is the largest."""
        above = {part: value for part, value in parts.items() if not value <= limit}
        if not above:
            return None
        part = max(above, key=lambda each: math.inf if math.isnan(above[each]) else above[each])
        return part, above[part]

    step = row["step"]
    checks = (
        (
            *("large_logits", "attention_logit_max", LARGEST_LOGIT),
            "attention logits of {} reach {:.4g}, where a softmax sees one token only. Try "
            "--model.qk_norm true in a new run, or a lower --learning-rate.",
        ),
        (
            *("large_activations", "activation_rms", LARGEST_ACTIVATION),
            "activations of {} have a root mean square of {:.4g}. Try a lower --learning-rate or a "
            "higher --optimizer.weight_decay.",
        ),
        (
            *("large_updates", "update_ratio", LARGEST_UPDATE),
            "{} changes by {:.4g} of its size in one step. Try a lower --learning-rate or a longer "
            "--warmup-steps.",
        ),
    )
    for name, numbers, limit, text in checks:
        if found := largest(row.get(numbers, {}), limit):
            part, value = found
            told = {"part": part, "value": value, "text": f"step {step}: {text.format(*found)}"}
            yield {"kind": "warning", "step": step, "name": name, **told}
    norms = row["gradient_norm"]
    without = [part for part, norm in norms.items() if norm == 0.0 and part.startswith("layers.")]
    if without:
        text = (
            f"step {step}: no gradient reaches {without[0]}. Try a higher --optimizer.epsilon if numbers "
            "underflow, or look whether its weights are zero: python -m tinyllm_jax.inspect."
        )
        told = {"part": without[0], "value": 0.0, "text": text}
        yield {"kind": "warning", "step": step, "name": "no_gradient", **told}
