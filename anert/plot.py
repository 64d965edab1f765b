"""Drawing with characters: bars, and lines of braille dots. Pure: text and style names only.

A line of a frame is a list of spans (text, style name); styles get their colors in anert/dashboard.py.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Sequence

Span = tuple[str, str]
Line = list[Span]

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the braille dot at [row][column] of a cell (Unicode block U+2800)."""


class History:
    """A series of any length in bounded memory: at `capacity` points, neighbours are merged to their mean. Its numbers
    lie side by side, since whoever draws it finds none of them in a cache.

    `add` is O(1) but for the merge, which comes after as many additions as it merges.
    """

    __slots__ = ("_count", "_sum", "capacity", "stride", "x", "y")

    def __init__(self, capacity: int = 256) -> None:
        self.capacity = capacity
        self.stride = 1
        self.x, self.y = array("d"), array("d")
        self._sum, self._count = 0.0, 0

    def add(self, x: float, y: float) -> None:
        """Append one value; one that is not finite is left out."""
        if not math.isfinite(y):
            return
        self._sum += y
        self._count += 1
        if self._count == self.stride:
            self.x.append(x)
            self.y.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self.y) >= self.capacity:
            self.x = self.x[1::2]
            self.y = array("d", [(a + b) / 2 for a, b in zip(self.y[::2], self.y[1::2], strict=True)])
            self.stride *= 2

    def copy(self) -> History:
        """A snapshot that another thread may read."""
        other = History(self.capacity)
        other.stride, other.x, other.y = self.stride, self.x[:], self.y[:]
        other._sum, other._count = self._sum, self._count
        return other


class Ema:
    """Exponential moving average, corrected for its start (Adam's correction)."""

    __slots__ = ("_weight", "beta", "value")

    def __init__(self, beta: float) -> None:
        self.beta, self.value, self._weight = beta, 0.0, 0.0

    def add(self, x: float) -> float:
        if math.isfinite(x):
            self._weight = self.beta * self._weight + 1 - self.beta
            self.value += (1 - self.beta) / self._weight * (x - self.value)
        return self.value


def bar(fraction: float, width: int) -> str:
    """A bar of `fraction` of `width` cells, in steps of half a cell, padded to the width; more than nothing shows."""
    fraction = min(max(fraction, 0.0), 1.0) if math.isfinite(fraction) else 0.0
    halves = round(fraction * width * 2) or int(fraction > 0)
    full, half = divmod(halves, 2)
    return ("━" * full + "╸" * half).ljust(width)


def sparkline(values: Sequence[float], width: int) -> str:
    """The series as a line of braille dots in `width` cells, from its lowest to its highest value."""
    if not values or width < 1:
        return ""
    means = resample(values, min(2 * width, len(values)))
    low, high = min(means), max(means)
    canvas = Canvas(width, 1)
    before = None
    for i, v in enumerate(means):
        x = round(i * (2 * width - 1) / max(len(means) - 1, 1))
        y = 3 - round((v - low) / (high - low) * 3) if high > low else 3
        canvas.line(*(before or (x, y)), x, y, "")
        before = (x, y)
    return "".join(text for text, _ in canvas.rows()[0])


def resample(values: Sequence[float], n: int) -> list[float]:
    """`n` means of nearly equal neighbouring groups of the values (n <= len)."""
    edges = [i * len(values) // n for i in range(n + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low or most < 1:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50):
        step = factor * power
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        if 0 <= last - first < most:
            return [i * step for i in range(first, last + 1)]
    return [low]


class Canvas:
    """A field of braille dots, `width` by `height` cells of 2 by 4 dots; the latest style in a cell colors it."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.bits = [[0] * width for _ in range(height)]
        self.styles = [["faint"] * width for _ in range(height)]
        self.marks: dict[tuple[int, int], Span] = {}

    def dot(self, x: int, y: int, style: str) -> None:
        """Set the dot at column x from the left, row y from the top; outside is ignored."""
        if 0 <= x < 2 * self.width and 0 <= y < 4 * self.height:
            self.bits[y >> 2][x >> 1] |= DOTS[y & 3][x & 1]
            self.styles[y >> 2][x >> 1] = style

    def line(self, x0: int, y0: int, x1: int, y1: int, style: str) -> None:
        """Dots from one to the other (digital differential analyser)."""
        n = max(abs(x1 - x0), abs(y1 - y0))
        for i in range(1, n):
            self.dot(x0 + round((x1 - x0) * i / n), y0 + round((y1 - y0) * i / n), style)
        self.dot(x0, y0, style)
        self.dot(x1, y1, style)

    def mark(self, x: int, y: int, char: str, style: str) -> None:
        """A character in the cell of a dot, over whatever the dots show."""
        if 0 <= x < 2 * self.width and 0 <= y < 4 * self.height:
            self.marks[y >> 2, x >> 1] = (char, style)

    def rows(self, grid: Iterable[int] = ()) -> list[Line]:
        """The cells as lines of spans; empty cells of the rows in `grid` show a faint rule."""
        ruled = set(grid)
        return [self._row(r, "┈" if r in ruled else " ") for r in range(self.height)]

    def _row(self, r: int, empty: str) -> Line:
        chars = [chr(0x2800 + bits) if bits else empty for bits in self.bits[r]]
        styles = list(self.styles[r])
        for (row, c), (char, style) in self.marks.items():
            if row == r:
                chars[c], styles[c] = char, style
        text = "".join(chars)
        edges = [0, *(c for c in range(1, self.width) if styles[c] != styles[c - 1]), self.width]
        return [(text[a:b], styles[a]) for a, b in itertools.pairwise(edges)]


def chart(raw: History, smooth: History, points: Sequence[tuple[float, float]], width: int, height: int) -> list[Line]:
    """Loss over steps: `raw` as faint dots, `smooth` as a line, `points` (validation) as marks; axes on two sides.

    Returns `height` lines of `width` cells. The first twentieth of a long run does not set the scale.
    """
    left, rows = 6, height - 1
    canvas = Canvas(max(width - left - 1, 1), max(rows, 1))
    if not smooth.y:
        blank: Line = [("waiting for the first step".center(width), "dim")]
        return [blank if r == height // 2 else [(" " * width, "")] for r in range(height)]
    x_low = min([smooth.x[0], *raw.x[:1]])
    x_high = max([smooth.x[-1], *raw.x[-1:], *(p[0] for p in points), x_low + 1])
    low, high = _span(smooth, points, x_low + (x_high - x_low) / 20)
    wide, tall = 2 * canvas.width - 1, 4 * canvas.height - 1

    def place(x: float, y: float) -> tuple[int, int]:
        return round((x - x_low) / (x_high - x_low) * wide), round((high - y) / (high - low) * tall)

    for x, y in zip(raw.x, raw.y, strict=True):
        canvas.dot(*place(x, y), "raw")
    before = None
    for x, y in zip(smooth.x, smooth.y, strict=True):
        here = place(x, y)
        canvas.line(*(before or here), *here, "train")
        before = here
    for x, y in points:
        canvas.mark(*place(x, y), "●", "val")
    labels = {
        min(round((high - t) / (high - low) * tall) >> 2, rows - 1): t
        for t in ticks(low, high, max(min(rows // 3 + 1, 7), 2))
    }
    lines = []
    for r, line in enumerate(canvas.rows(labels)):
        label = f"{labels[r]:{left}.{_places(high - low)}f} " if r in labels else " " * (left + 1)
        lines.append([(label, "dim"), *line])
    return [*lines, _x_axis(x_low, x_high, left + 1, canvas.width)]


def _span(smooth: History, points: Sequence[tuple[float, float]], settled: float) -> tuple[float, float]:
    """The y range: all of the line after `settled`, all points, and a little air."""
    late = [y for x, y in zip(smooth.x, smooth.y, strict=True) if x >= settled] or smooth.y[-1:]
    late = [*late, *(y for x, y in points if x >= settled)]
    low, high = min(late), max(late)
    air = (high - low) * 0.06 or max(abs(high) * 0.05, 0.05)
    return low - air, high + air


def _places(span: float) -> int:
    return 1 if span >= 2 else 2 if span >= 0.1 else 3


def _x_axis(low: float, high: float, left: int, width: int) -> Line:
    """Round steps below the chart, each centered under its column."""
    cells = [" "] * (left + width)
    for tick in ticks(low, high, max(width // 12, 2)):
        text = f"{tick:,.0f}"
        at = left + round((tick - low) / (high - low) * (width - 1)) - len(text) // 2
        at = max(left, min(at, left + width - len(text)))
        cells[at : at + len(text)] = text
    return [("".join(cells), "dim")]
