"""SVG plots for the HTML pages.

Each plot except a dot plot contains its values as JSON, and the page's script shows these values as a tooltip. Colours
are the CSS classes c0, c1, ..., so that they follow the page's light and dark palettes. All names are HTML-escaped.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 342.0, 10.0, 186.0  # edges of the axes
COLOURS = 8
MAX_POINTS = 300
ROW = 36.0  # height of a row of a dot plot


@dataclass(frozen=True)
class Series:
    """Points (x, y) that a plot draws in one style: `line`, `faint` (a faint line), `dots`, `bars` or `steps`."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "line"
    errors: Sequence[float] | None = None
    """Length of the error bar to each side of a point; 0: no bar."""


@dataclass(frozen=True)
class Estimate:
    """One row of a dot plot."""

    name: str
    value: float
    error: float
    """Standard error; NaN if unknown."""
    colour: int = 0


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return axis ticks in [low, high], at consecutive multiples of 1, 2 or 5 times a power of ten.

    There are at most `most` + 1 ticks. If only one tick would fit, the spacing is reduced until there are at least 2.
    """
    if not low < high:
        raise ValueError(f"an axis from {low} to {high} has no length: low must be below high")
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if first == last:  # only one multiple lies on this axis
        return nice_ticks(low, high, most * 2)
    return [number * step for number in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Format ticks with the fewest decimals that distinguish them; long numbers become 20k, 3M or 5e−6."""
    largest, step = max(abs(tick) for tick in ticks), ticks[1] - ticks[0]
    unit, suffix = next(((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if largest >= u), (1.0, ""))
    unit = 1e3 if suffix == "k" else unit
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    if decimals > 4:
        return [f"{tick:.3g}".replace("e-0", "e-").replace("-", "−") for tick in ticks]
    return [f"{tick / unit:.{decimals}f}{suffix if tick else ''}".replace("-", "−") for tick in ticks]


def thin(x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Reduce a curve to at most `most` points, each the mean of a group of consecutive points.

    The groups have equal sizes, or sizes that differ by one.
    """
    n_groups = min(most, len(x))
    if not n_groups:
        return [], []
    xs, ys = (np.array_split(np.asarray(values, float), n_groups) for values in (x, y))
    return [float(group.mean()) for group in xs], [float(group.mean()) for group in ys]


def smooth(y: Sequence[float], span: float) -> list[float]:
    """Return the exponential moving average of `y` over about `span` points; the weights at each point sum to 1."""
    keep, total, weight, means = 1 - 1 / max(1.0, span), 0.0, 0.0, []
    for value in y:
        total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight)
    return means


def plot(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    x_name: str = "step",
    labels: Sequence[str] | None = None,
    from_zero: bool = False,
) -> Markup:
    """Return a figure with axes, curves and a legend, or empty markup if no series has points.

    The y axis may exclude the lowest and highest 2% of a faint series; such points are drawn on the edge of the plot.

    Args:
        unit: unit of y.
        labels: tick labels of x = 0, 1, ..., for a categorical x axis.
        from_zero: whether the y axis starts at 0.
    """
    series = [curve for curve in series if len(curve.x)]
    if not series:
        return Markup("")
    x_low, x_high = range_of([x for curve in series for x in curve.x])
    extremes = [value for curve in series for value in y_extremes(curve)]
    y_low, y_high = range_of([0.0, *extremes] if from_zero else extremes)
    y_low, y_high = (y_low if from_zero else y_low - 0.05 * (y_high - y_low)), y_high + 0.05 * (y_high - y_low)
    if labels or any(curve.style in ("bars", "steps") for curve in series):
        half = 0.5 * min(float(np.diff(curve.x).min()) if len(curve.x) > 1 else 1.0 for curve in series)
        x_low, x_high = x_low - half, x_high + half
    elif 0 < x_low < 0.5 * x_high:
        x_low = 0.0

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - x_low) / (x_high - x_low)

    def up(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)

    parts = [grid(nice_ticks(y_low, y_high), up)]
    if labels is None:
        ticks = nice_ticks(x_low, x_high, 4)
        parts += [x_tick(across(tick), text) for tick, text in zip(ticks, tick_texts(ticks), strict=True)]
        parts.append(
            Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(RIGHT, HEIGHT - 3, x_name)
        )
    else:
        parts += [x_tick(across(float(i)), text) for i, text in enumerate(labels)]
    for curve in series:
        parts.append(draw_series(curve, [across(x) for x in curve.x], [up(y) for y in curve.y], up(y_low)))
        if curve.errors is not None:
            whiskers = zip(curve.x, curve.y, curve.errors, strict=True)
            path = "".join(f"M{across(x):.1f} {up(y - e):.1f}V{up(y + e):.1f}" for x, y, e in whiskers)
            parts.append(Markup('<path class="c{} error" d="{}"/>').format(curve.colour % COLOURS, path))
            points = zip(curve.x, curve.y, strict=True)
            parts += [circle(curve.colour % COLOURS, across(x), up(y), 3.0) for x, y in points]
    parts.append(Markup('<path class="rule" d="M0 {}V{}" hidden=""/>').format(TOP, BOTTOM))
    hover = {
        "left": LEFT,
        "right": RIGHT,
        "low": x_low,
        "high": x_high,
        "xName": x_name,
        "labels": labels,
        "series": [{"name": curve.name, "x": rounded(curve.x), "y": rounded(curve.y)} for curve in series],
    }
    return figure(title, unit, svg(title, unit, HEIGHT, parts), series if len(series) > 1 else [], hover)


def dot_plot(title: str, unit: str, rows: Sequence[Estimate]) -> Markup:
    """Return a figure with one estimate per row. Bars extend two standard errors to each side of an estimate."""
    bars = [2 * row.error if math.isfinite(row.error) else 0.0 for row in rows]
    low, high = range_of([row.value + sign * bar for row, bar in zip(rows, bars, strict=True) for sign in (-1, 1)])
    low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    bottom = TOP + ROW * len(rows) + 4

    def across(x: float) -> float:
        return 12 + (RIGHT - 12) * (x - low) / (high - low)

    ticks, parts = nice_ticks(low, high, 4), []
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        parts += [
            Markup('<path class="grid" d="M{} {}V{}"/>').format(f"{across(tick):.1f}", TOP, bottom),
            x_tick(across(tick), text, bottom + 17),
        ]
    for i, (row, bar) in enumerate(zip(rows, bars, strict=True)):
        y, colour = TOP + ROW * i + 27, row.colour % COLOURS
        parts.append(Markup('<text class="row" x="12" y="{}">{}</text>').format(f"{y - 10:.1f}", shortened(row.name)))
        path = f"M{across(row.value - bar):.1f} {y:.1f}H{across(row.value + bar):.1f}"
        parts.append(Markup('<path class="c{} error" d="{}"/>').format(colour, path))
        parts.append(circle(colour, across(row.value), y, 4.5))
    return figure(title, unit, svg(title, unit, bottom + 24, parts), [], None)


def draw_series(series: Series, x: Sequence[float], y: Sequence[float], bottom: float) -> Markup:
    """Draw one series.

    Args:
        x, y: positions of the points of the series, in SVG user units.
        bottom: vertical position of the x axis.
    """
    colour = series.colour % COLOURS
    dashed = " dashed" if series.colour >= COLOURS else ""
    width = min((b - a for a, b in itertools.pairwise(x)), default=RIGHT - LEFT)
    if series.style == "bars":
        path = "".join(
            f"M{a - 0.4 * width:.1f} {bottom:.1f}V{b:.1f}h{0.8 * width:.1f}V{bottom:.1f}z"
            for a, b in zip(x, y, strict=True)
        )
        return Markup('<path class="c{} bars" d="{}"/>').format(colour, path)
    if series.style == "dots":
        return Markup("").join(circle(colour, a, b, 3.5) for a, b in zip(x, y, strict=True))
    if series.style == "steps":
        path = f"M{x[0] - width / 2:.1f} {bottom:.1f}"
        path += "".join(f"V{b:.1f}h{width:.1f}" for b in y) + f"V{bottom:.1f}"
    else:
        points = [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)]
        path = "M" + "L".join(points if len(points) > 1 else points * 2)
    return Markup('<path class="c{} {}{}" d="{}"/>').format(colour, series.style, dashed, path)


def y_extremes(series: Series) -> list[float]:
    """Return the values that the y axis must include.

    For a faint series they are the 2% and 98% quantiles. For any other series they are the ends of all error bars. A
    point without an error bar counts as a bar of length 0.
    """
    if series.style == "faint":
        return np.quantile(series.y, [0.02, 0.98]).tolist()
    errors = series.errors or [0.0] * len(series.y)
    return [y + sign * error for y, error in zip(series.y, errors, strict=True) for sign in (-1, 1)]


def circle(colour: int, x: float, y: float, radius: float) -> Markup:
    return Markup('<circle class="c{} dot" cx="{}" cy="{}" r="{}"/>').format(colour, f"{x:.1f}", f"{y:.1f}", radius)


def grid(ticks: Sequence[float], up: Callable[[float], float]) -> Markup:
    return Markup("").join(
        Markup('<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" text-anchor="end">{}</text>').format(
            LEFT, f"{up(tick):.1f}", RIGHT, LEFT - 6, f"{up(tick) + 4:.1f}", text
        )
        for tick, text in zip(ticks, tick_texts(ticks), strict=True)
    )


def x_tick(x: float, text: str, y: float = BOTTOM + 16) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(f"{x:.1f}", f"{y:.1f}", text)


def svg(title: str, unit: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg role="img" viewBox="0 0 {} {}"><title>{}</title>{}</svg>').format(
        f"{WIDTH:.0f}", f"{height:.0f}", f"{title}, {unit}" if unit else title, Markup("").join(parts)
    )


def figure(title: str, unit: str, drawing: Markup, legend: Sequence[Series], hover: object) -> Markup:
    keys = Markup("").join(
        Markup('<li class="c{}"><i class="{}"></i><span>{}</span></li>').format(
            series.colour % COLOURS, "dashed" if series.colour >= COLOURS else series.style, series.name
        )
        for series in legend
    )
    values = "" if hover is None else Markup('<script type="application/json">{}</script>').format(script_json(hover))
    return Markup(
        '<figure class="plot"><figcaption><b>{}</b> <span>{}</span></figcaption>{}'
        '<ul class="legend">{}</ul>{}<div class="tip" hidden></div></figure>'
    ).format(title, unit, drawing, keys, values)


def script_json(value: object) -> Markup:
    """Return JSON for a script element. Each < is escaped, because `</script>` in a name would end the element."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))


def range_of(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and largest value, moved apart if they are equal."""
    low, high = min(values), max(values)
    margin = max(abs(low), 1.0) * 1e-2 if high - low <= 1e-9 * max(abs(low), abs(high)) else 0.0
    return low - margin, high + margin


def rounded(values: Sequence[float]) -> list[float]:
    """Round to five significant digits, which is enough for a tooltip."""
    return [float(f"{value:.5g}") for value in values]


def shortened(name: str, most: int = 48) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
