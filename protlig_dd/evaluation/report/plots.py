"""Plots for a page of HTML: SVG with axes, and the values under the pointer as JSON for the page's script.

Colours are classes c0, c1, ... of the page's style sheet, so that they follow its light and dark palettes. Names are
escaped wherever they are written.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 342.0, 10.0, 186.0  # of the frame
COLOURS = 8
MOST_POINTS = 300
ROW = 36.0  # height of a row of a dot plot


@dataclass(frozen=True)
class Series:
    """What a plot draws of one thing: points (x, y) as a line, a faint line, dots, bars or steps."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "line"
    errors: Sequence[float] | None = None
    """Drawn as a bar of this length each way; 0 where there is none."""


@dataclass(frozen=True)
class Estimate:
    """A row of a dot plot."""

    name: str
    value: float
    error: float
    """NaN where there is none."""
    colour: int = 0


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 multiples of 1, 2 or 5 times a power of ten that lie in [low, high]; at least 2."""
    if not low < high:
        raise ValueError(f"an axis from {low} to {high} has no length")
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if first == last:  # a short axis around one multiple
        return nice_ticks(low, high, most * 2)
    return [number * step for number in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Ticks with the same number of decimals, as few as tell them apart; 20k, 3M and 5e−6 where they would be long."""
    largest, step = max(abs(tick) for tick in ticks), ticks[1] - ticks[0]
    unit, suffix = next(((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if largest >= u), (1.0, ""))
    unit = 1e3 if suffix == "k" else unit
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    if decimals > 4:
        return [f"{tick:.3g}".replace("e-0", "e-").replace("-", "−") for tick in ticks]
    return [f"{tick / unit:.{decimals}f}{suffix if tick else ''}".replace("-", "−") for tick in ticks]


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """The means of at most `most` runs of consecutive points, as equal in size as they can be."""
    parts = min(most, len(x))
    if not parts:
        return [], []
    xs, ys = (np.array_split(np.asarray(values, float), parts) for values in (x, y))
    return [float(part.mean()) for part in xs], [float(part.mean()) for part in ys]


def smooth(y: Sequence[float], span: float) -> list[float]:
    """Exponential means over about `span` points; each is a mean of the points so far, with weights that sum to 1."""
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
    """A figure with axes, lines and a legend; nothing where there are no points.

    Args:
        unit: of y.
        labels: of x = 0, 1, ...; x then has a tick for each.
        from_zero: y begins at 0.

    The rarest values of faint series, 2% at each end, are drawn on the edge where they lie outside the rest's range.
    """
    series = [one for one in series if len(one.x)]
    if not series:
        return Markup("")
    x_low, x_high = range_of([x for one in series for x in one.x])
    ends = [end for one in series for end in ends_of(one)]
    y_low, y_high = range_of([0.0, *ends] if from_zero else ends)
    y_low, y_high = (y_low if from_zero else y_low - 0.05 * (y_high - y_low)), y_high + 0.05 * (y_high - y_low)
    if labels or any(one.style in ("bars", "steps") for one in series):
        half = 0.5 * min(float(np.diff(one.x).min()) if len(one.x) > 1 else 1.0 for one in series)
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
    for one in series:
        parts.append(drawn(one, [across(x) for x in one.x], [up(y) for y in one.y], up(y_low)))
        if one.errors is not None:
            whiskers = zip(one.x, one.y, one.errors, strict=True)
            path = "".join(f"M{across(x):.1f} {up(y - e):.1f}V{up(y + e):.1f}" for x, y, e in whiskers)
            parts.append(Markup('<path class="c{} error" d="{}"/>').format(one.colour % COLOURS, path))
            parts += [circle(one.colour % COLOURS, across(x), up(y), 3.0) for x, y in zip(one.x, one.y, strict=True)]
    parts.append(Markup('<path class="rule" d="M0 {}V{}" hidden=""/>').format(TOP, BOTTOM))
    hover = {
        "left": LEFT,
        "right": RIGHT,
        "low": x_low,
        "high": x_high,
        "xName": x_name,
        "labels": labels,
        "series": [{"name": one.name, "x": rounded(one.x), "y": rounded(one.y)} for one in series],
    }
    return figure(title, unit, svg(title, unit, HEIGHT, parts), series if len(series) > 1 else [], hover)


def dot_plot(title: str, unit: str, rows: Sequence[Estimate]) -> Markup:
    """Estimates, one below the other, with bars of two standard errors each way."""
    bars = [2 * row.error if math.isfinite(row.error) else 0.0 for row in rows]
    low, high = range_of([row.value + way * bar for row, bar in zip(rows, bars, strict=True) for way in (-1, 1)])
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


def drawn(series: Series, x: Sequence[float], y: Sequence[float], bottom: float) -> Markup:
    """One series at these places, in user units."""
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


def ends_of(series: Series) -> list[float]:
    """What the range of y has to hold."""
    if series.style == "faint":
        return np.quantile(series.y, [0.02, 0.98]).tolist()
    errors = series.errors or [0.0] * len(series.y)
    return [y + way * error for y, error in zip(series.y, errors, strict=True) for way in (-1, 1)]


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
            one.colour % COLOURS, "dashed" if one.colour >= COLOURS else one.style, one.name
        )
        for one in legend
    )
    values = "" if hover is None else Markup('<script type="application/json">{}</script>').format(script_json(hover))
    return Markup(
        '<figure class="plot"><figcaption><b>{}</b> <span>{}</span></figcaption>{}'
        '<ul class="legend">{}</ul>{}<div class="tip" hidden></div></figure>'
    ).format(title, unit, drawing, keys, values)


def script_json(value: object) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))


def range_of(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest, spread out where they are the same."""
    low, high = min(values), max(values)
    spread = max(abs(low), 1.0) * 1e-2 if high - low <= 1e-9 * max(abs(low), abs(high)) else 0.0
    return low - spread, high + spread


def rounded(values: Sequence[float]) -> list[float]:
    """To five digits, which is what a reader can use."""
    return [float(f"{value:.5g}") for value in values]


def shortened(name: str, most: int = 48) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
