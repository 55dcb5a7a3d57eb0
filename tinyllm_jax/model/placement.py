"""Where arrays stand: the model says what an array is, and whoever compiles it says where it goes.

On one device everything stays where it is, and nothing here does anything. The twin has one device.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jaxtyping import Array, Float, Int, PRNGKeyArray


class Placement:
    """One device, or one of several that do not know of each other: all stays as it is."""

    # What of a block is kept for its backward pass, as a policy of `jax.checkpoint`; None is all.
    kept: Callable[..., Any] | None = None
    # Whether the program holds arrays whole, so that a loop may go over their rows.
    whole_rows = True
    # Among how many devices of one program the rows are divided.
    row_groups = 1

    def block_weights(self, weights: Any) -> Any:
        """Bring the weights of one block to where they are used."""
        return weights

    def other_weights(self, weights: dict[str, Array]) -> dict[str, Array]:
        """Bring the weights outside the blocks to where they are used, and leave the others."""
        return weights

    def residual(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        """Keep the residual stream where its rows are."""
        return x

    def logits(self, logits: Float[Array, "batch seq vocab"]) -> Float[Array, "batch seq vocab"]:
        """Keep logits where their rows, and their part of the vocabulary, are."""
        return logits

    def by_row(self, function: Callable[..., Any], x: Float[Array, "batch ..."]) -> Any:
        """Apply a function that treats each row by itself."""
        return function(x)

    def experts(
        self,
        mix: Callable[..., Array],
        kernels: Any,
        x: Float[Array, "batch seq hidden"],
        weights: Float[Array, "batch seq choices"],
        choices: Int[Array, "batch seq choices"],
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "batch seq hidden"]:
        """Let tokens pass their experts.

        Args:
            mix: Adds up what the experts of some kernels make of tokens, as a function of
                (kernels, x, weights, choices, dropout_key, number of the first of these experts).
            kernels: Of all experts, stacked.
        """
        return mix(kernels, x, weights, choices, dropout_key, 0)

    def passes(self, batch: dict[str, Array], *, count: int) -> dict[str, Array]:
        """Cut the rows of a step into its passes, as a first axis."""
        return {name: rows.reshape(count, -1, *rows.shape[1:]) for name, rows in batch.items()}

    def dropout_key(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """Give each of several devices, that do not know of each other, dropout of its own."""
        return key

    def total(self, numbers: Any) -> Any:
        """Add numbers up over devices that do not know of each other."""
        return numbers

    def largest(self, number: Array) -> Array:
        """Find the largest of the numbers of devices that do not know of each other."""
        return number


ONE_DEVICE = Placement()
_placement: ContextVar[Placement] = ContextVar("placement", default=ONE_DEVICE)


def placement() -> Placement:
    """Give the placement of the program that is being compiled."""
    return _placement.get()


@contextlib.contextmanager
def placed(new: Placement) -> Iterator[None]:
    """Compile what is traced inside for this placement."""
    token = _placement.set(new)
    try:
        yield
    finally:
        _placement.reset(token)
