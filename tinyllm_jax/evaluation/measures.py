"""Means and ratios with their standard errors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Measured(NamedTuple):
    """A number, and how far it would vary from one sample of as many documents to the next."""

    value: float
    stderr: float | None  # None for a single document


def mean(values: Sequence[float]) -> Measured:
    """Average over documents, with the standard error of a sample."""
    return ratio(values, np.ones(len(values)))


def ratio(parts: Sequence[float], wholes: Sequence[float] | np.ndarray) -> Measured:
    """Divide sums over documents, such as bits by bytes.

    Returns:
        The ratio, with the standard error of a ratio estimator: documents are what was drawn, and
        long ones weigh more.

    Source:
        Cochran 1977, Sampling Techniques, equation 6.13, without the finite-population correction.
    """
    part, whole = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    count = len(part)
    assert count == len(whole) > 0
    value = float(part.sum() / whole.sum())
    if count == 1:
        return Measured(value, None)
    squares = float(((part - value * whole) ** 2).sum())
    return Measured(value, math.sqrt(squares * count / (count - 1)) / float(whole.sum()))


def named(name: str, measured: Measured) -> dict[str, float | None]:
    """Write a measured number and its standard error as `NAME` and `NAME_stderr`."""
    return {name: measured.value, f"{name}_stderr": measured.stderr}
