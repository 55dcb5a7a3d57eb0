"""Plots as HTML: lines in an SVG that stretches with the page, and words around it that do not."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# The drawing's own units; a pixel or less each on any screen.
WIDTH, HEIGHT = 2000, 1000
# Of a curve so many points are drawn at most, and its mean over so many stretches.
MOST_POINTS, STRETCHES = 1000, 100
# Dots that say their number under the mouse; more of them would make the page heavy.
MOST_DOTS = 200
# Words at the side of a small plot are this share of its height apart at least.
LEAST_APART = 0.1
# Beyond this nothing is drawn: sums and ranges of such numbers would overflow.
LARGEST = 1e30


@dataclass(frozen=True)
class Line:
    """One curve of a plot.

    Attributes:
        label: What the legend calls it; none is left out there.
        x: Places of its points on each axis that the plot may have, by the name of the axis.
        y: Its points' heights.
        color: In CSS.
        form: `line`, `faint`, `dashed`, `dots` (line and dots), `level` (its last height, all the way)
            or `marks` (at the lower edge, whatever its heights).
    """

    label: str
    x: Mapping[str, np.ndarray]
    y: np.ndarray
    color: str
    form: str = "line"


@dataclass(frozen=True)
class Scale:
    """Turns numbers into shares of a side of the plot."""

    low: float
    high: float
    is_log: bool

    def place(self, values: np.ndarray) -> np.ndarray:
        """Give shares: 0 at the lower end, 1 at the upper."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, values = math.log10(low), math.log10(high), np.log10(values)
        return (values - low) / (high - low)

    def share(self, value: float) -> float:
        """Give the share of one number."""
        return float(self.place(np.array([value]))[0])

    def ticks(self) -> list[float]:
        """Give round numbers within."""
        if not self.is_log:
            return round_numbers(self.low, self.high)
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = [10.0**n for n in range(low, high + 1, max(1, (high - low) // 5))]
        for digits in ((1, 2, 5), (1,)):
            found = [digit * each for each in decades for digit in digits]
            found = [each for each in found if self.low <= each <= self.high]
            if len(found) <= 8:
                break
        return found if len(found) >= 3 else round_numbers(self.low, self.high)


def round_numbers(low: float, high: float) -> list[float]:
    """Give four to eight multiples of 1, 2 or 5 times a power of ten between two numbers."""
    size = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(size * n for n in (1, 2, 5, 10) if (high - low) / (size * n) <= 7.5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def scale_of(values: np.ndarray, *, is_log: bool, room: float) -> Scale:
    """Make a scale that holds all values.

    Args:
        room: Share of the range that is added at both ends.
    """
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-6 * max(
        abs(low), abs(high)
    ):  # what rounding leaves of numbers that are alike
        low = high
    if is_log and low > 0:
        factor = (high / low) ** room if high > low else 1.2
        return Scale(low / factor, high * factor, True)
    extra = (high - low) * room if high > low else (abs(low) or 1.0) * max(room, 0.05)
    return Scale(low - extra, high + extra, False)


def thin(values: np.ndarray) -> np.ndarray:
    """Choose the points of a long curve that are drawn, extremes among them.

    Up to `MOST_POINTS` are all drawn. Of more, the first, the last, and the lowest and the highest of each of
    499 stretches of the same number of points.
    """
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), MOST_POINTS // 2).astype(int)
    chosen = {0, len(values) - 1}
    for start, end in pairwise(edges.tolist()):
        stretch = values[start:end]
        chosen |= {start + int(stretch.argmin()), start + int(stretch.argmax())}
    return np.array(sorted(chosen))


def averaged(line: Line, *, label: str) -> Line | None:
    """Give the means of a hundred stretches of a noisy curve; None of one too short for that."""
    if len(line.y) < 3 * STRETCHES:
        return None
    edges = np.linspace(0, len(line.y), STRETCHES + 1).astype(int)

    def means(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, edges[:-1]) / np.diff(edges)

    return Line(label, {axis: means(x) for axis, x in line.x.items()}, means(line.y), line.color)


def draw(
    title: str,
    lines: Sequence[Line],
    *,
    axes: Mapping[str, str],
    log: bool = False,
    from_zero: bool = False,
    legend: str = "",
    is_small: bool = False,
) -> str:
    """Draw curves as a `figure`; nothing where they have no points.

    Args:
        title: What the heights are.
        axes: The axes that a reader may choose from, and what each is called.
        log: Heights go by their logarithm, if all are positive.
        from_zero: The scale begins at 0.
        legend: HTML in place of the lines' own labels.
        is_small: One of several in a row.
    """
    curves = [line for line in lines if len(line.y) and line.form != "marks"]
    if not curves:
        return ""
    heights = np.concatenate([line.y[-1:] if line.form == "level" else line.y for line in curves])
    if from_zero:
        heights = np.append(heights, 0.0)
    scale = scale_of(heights, is_log=log, room=0.04)
    if from_zero and scale.low < 0 <= heights.min():
        scale = Scale(0.0, scale.high, False)
    ticks: list[tuple[float, float]] = []
    for tick in scale.ticks():
        share = 1 - scale.share(tick)
        if not ticks or ticks[-1][0] - share >= LEAST_APART:
            ticks.append((share, tick))
    grid = "".join(f"M0 {round(share * HEIGHT)}h{WIDTH}" for share, _ in ticks)
    words = "".join(
        f'<span class="y" style="top:{share:.2%}">{short(tick)}</span>' for share, tick in ticks
    )
    several = len(axes) > 1
    views = [
        f'<div class="view{f" by-{axis}" if several else ""}">'
        f"{_view(title, lines, axis, what, scale, grid)}</div>"
        for axis, what in axes.items()
        if any(len(line.x.get(axis, ())) for line in curves)
    ]
    names = legend or "".join(
        f'<span class="key"><i class="{line.form}" style="--c:{line.color}"></i>'
        f"{html.escape(line.label)}</span>"
        for line in lines
        if line.label and len(line.y)
    )
    return (
        f'<figure class="plot{" small" if is_small else ""}"><figcaption><b>{html.escape(title)}</b> '
        f'{names}</figcaption><div class="frame">{words}{"".join(views)}</div></figure>'
    )


def _view(title: str, lines: Sequence[Line], axis: str, what: str, scale: Scale, grid: str) -> str:
    """Draw all curves over one axis."""
    places = np.concatenate([line.x[axis] for line in lines if len(line.x.get(axis, ()))])
    if places.min() <= 0.5 * places.max():  # a run from its beginning
        places = np.append(places, 0.0)
    across = scale_of(places, is_log=False, room=0.0)
    paths = [f'<path class="grid" d="{grid}"/>']
    for line in lines:
        paths += _paths(line, axis, across, scale)
    ticks = "".join(
        f'<span class="x" style="left:{across.share(tick):.2%}">{short(tick)}</span>'
        for tick in across.ticks()
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(title)}">{"".join(paths)}</svg>'
        f'{ticks}<span class="what">{html.escape(what)}</span>'
    )


def _paths(line: Line, axis: str, across: Scale, scale: Scale) -> list[str]:
    """Draw one curve."""

    def path(data: str, form: str, says: str = "") -> str:
        inside = f"<title>{html.escape(says)}</title>" if says else ""
        end = f">{inside}</path>" if inside else "/>"
        return f'<path class="{form}" style="--c:{line.color}" d="{data}"{end}'

    if line.form == "level":
        height = round((1 - scale.share(line.y[-1])) * HEIGHT)
        return [path(f"M0 {height}h{WIDTH}", "dashed")]
    given = line.x.get(axis)
    if given is None or not len(given):
        return []
    chosen = thin(given if line.form == "marks" else line.y)
    x = np.rint(across.place(given[chosen]) * WIDTH).astype(int)
    if line.form == "marks":
        return [
            path("".join(f"M{each} {HEIGHT}v-70" for each in dict.fromkeys(x.tolist())), "marks")
        ]
    y = np.rint((1 - scale.place(line.y[chosen])) * HEIGHT).astype(int)
    points = list(zip(x.tolist(), y.tolist(), strict=True))
    lone = len(points) == 1
    found = [path("M" + "L".join(f"{a} {b}" for a, b in dict.fromkeys(points)), line.form)]
    if line.form == "dots" or lone:
        said = [
            f"{line.label.split(',')[0]}, {spoken(float(given[place]))}: {line.y[place]:.5g}"
            for place in chosen
        ]
        dots = [f"M{a} {b}h0" for a, b in points]
        if len(dots) > MOST_DOTS:
            found.append(path("".join(dots), "dot"))
        else:
            found += [path(dot, "dot", text) for dot, text in zip(dots, said, strict=True)]
    return found


def short(value: float) -> str:
    """Write the number at a tick: few digits, thousands and millions as letters."""
    for limit, size, letter in ((1e13, 1e0, ""), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / size:.4g}{letter}".replace("e+", "e")
    return f"{value:.4g}".replace("e-0", "e-") if value else "0"


def spoken(value: float) -> str:
    """Write the place of a dot."""
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:.4g}"


def shades(count: int) -> Callable[[int], str]:
    """Give colours for things in a row, from the first to the last."""

    def shade(place: int) -> str:
        share = 100 * place / max(count - 1, 1)
        return f"color-mix(in oklab, var(--first), var(--last) {share:.0f}%)"

    return shade
