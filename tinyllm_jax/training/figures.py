"""By which number an evaluation is judged, and how that is told to people."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A number that evaluations give.

    Checkpoints and metrics hold it as `loss`, the lower the better, whatever it is.
    """

    name: str
    higher_is_better: bool

    def say(self, loss: float) -> str:
        """Write it with its name."""
        value = 0.0 - loss if self.higher_is_better else loss
        return f"validation {self.name} {value:.4f}"

    def say_best(self, loss: float) -> str:
        """Write the best one of a run."""
        return f"{'Highest' if self.higher_is_better else 'Lowest'} {self.say(loss)}"


LOSS = Figure("loss", higher_is_better=False)
REWARD = Figure("reward", higher_is_better=True)
