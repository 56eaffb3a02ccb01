"""Figures as SVG that takes the page's own text colour, so that one file is readable on dark and on light."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from pipelines.reporting.calibration import BINS, Reliability
from pipelines.reporting.dump import Array

INK = "#0a0b0c"
"""A colour that stands for the page's own and that no palette holds."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00", "#7f7f7f")
"""Okabe and Ito's palette, told apart by the colour-blind; its yellow is darkened, which white paper would swallow."""
PALE = ("#e69f00", "#cc79a7", "#56b4e9")
"""Those on which white letters cannot be read."""
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^Dv"
MARKS = {"resumed": ("^", "#e69f00"), "skipped": ("x", "#d55e00"), "stopped": ("s", "#7f7f7f")}
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


_pixels: ContextVar[dict[str, Array] | None] = ContextVar("pixels", default=None)


@contextmanager
def rasterised() -> Iterator[dict[str, Array]]:
    """Collects every figure that is drawn inside as pixels too, uint8 [H, W, 3] by its text: for what takes no SVG."""
    found: dict[str, Array] = {}
    token = _pixels.set(found)
    try:
        yield found
    finally:
        _pixels.reset(token)


def _matplotlib() -> Any:
    """matplotlib, which draws without a screen."""
    # a notebook names a backend of its own here, which this environment may lack
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib

    matplotlib.use("agg")
    return matplotlib


def _pixels_of(figure: Any) -> Array:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, facecolor="white")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _figure(alt: str, out: list[str], height: float = 2.6, width: float = 4.6) -> Iterator[Any]:
    """Axes to draw on; what was drawn is put into `out` as a <figure>."""
    matplotlib = _matplotlib()
    from matplotlib import pyplot
    from matplotlib.rcsetup import cycler

    style = {
        **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.color": INK,
        "axes.axisbelow": True,
        "font.size": 10,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "image.cmap": "cividis",
        # text stays text; the salt makes the names inside a drawing its own, for all drawings lie in one page
        "svg.fonttype": "none",
        "svg.hashsalt": alt,
        "axes.prop_cycle": cycler(color=COLOURS),
        "text.parse_math": False,  # a class may be called `$5`
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # a browser has the letters that this font lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        yield axes
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        if (found := _pixels.get()) is not None:
            found[alt] = _pixels_of(figure)
        pyplot.close(figure)
    out.append(f"<figure>{_for_the_page(file.getvalue(), alt)}<figcaption>{escape(alt)}</figcaption></figure>")


def _for_the_page(svg: str, alt: str) -> str:
    """The drawing without what belongs to a file of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) ?(?:width|height)="[\d.]+pt"', r"\1", svg)
    svg = re.sub(r'(<svg [^>]*?) ?(?:width|height)="[\d.]+pt"', r"\1", svg)
    svg = re.sub(r"font: ([^;\"]*?px) [^;\"]+", r"font: \1 system-ui, sans-serif", svg)
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(alt, quote=True)}" ', 1)


def lines(
    series: Series,
    label: str,
    alt: str,
    levels: Mapping[str, float] | None = None,
    marks: Mapping[str, Sequence[float]] | None = None,
    log: bool = False,
) -> str:
    """Lines over steps. levels: dashed lines across, by name. marks: kind of `MARKS` -> steps, at the lower edge."""
    from matplotlib.ticker import LogFormatter

    out: list[str] = []
    with _figure(alt, out) as axes:
        for number, (name, (x, y)) in enumerate(series.items()):
            marker = "o" if len(x) < 25 else None
            axes.plot(x, y, DASHES[number // len(COLOURS) % len(DASHES)], marker=marker, markersize=3, label=_label(name))
        for number, (name, value) in enumerate((levels or {}).items()):
            axes.axhline(value, color=INK, linestyle=DASHES[1 + number % 3], linewidth=1, label=name)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # without formulas, which no text is read as
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
        for kind, steps in (marks or {}).items():
            marker, colour = MARKS[kind]
            # at the lower edge whatever the axis shows: the y of a mark is no value
            place = axes.get_xaxis_transform()
            axes.plot(steps, [0.03] * len(steps), marker, color=colour, transform=place, linestyle="none", label=kind)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if len(series) + len(levels or {}) + len(marks or {}) > 1:
            _legend(axes)
    return out[0]


def stacked(x: Sequence[float], shares: Mapping[str, Sequence[float]], alt: str) -> str:
    """Shares over steps that fill the height."""
    out: list[str] = []
    with _figure(alt, out) as axes:
        axes.stackplot(x, list(shares.values()), labels=list(map(_label, shares)), colors=COLOURS, alpha=0.85)
        axes.set(xlabel="step", ylabel="share", ylim=(0, 1))
        axes.margins(x=0)
        _legend(axes)
    return out[0]


def bars(values: Mapping[str, Sequence[float]], label: str, alt: str) -> str:
    """A bar for each name: the mean of its values, and a line from the least to the greatest where there are several."""
    out: list[str] = []
    with _figure(alt, out, height=0.9 + 0.42 * len(values)) as axes:
        places = np.arange(len(values))[::-1]
        means = [float(np.mean(each)) for each in values.values()]
        axes.barh(places, means, color=COLOURS[0], alpha=0.85, height=0.6)
        for place, mean, each in zip(places, means, values.values(), strict=True):
            if len(each) > 1:
                axes.plot([min(each), max(each)], [place, place], color=INK, linewidth=2, marker="|", markersize=9)
            axes.annotate(f"{mean:.2f}", (max(each), place), (6, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(places, [_short(name, 22) for name in values])
        axes.set_xlabel(label)
        axes.margins(x=0.16)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
    return out[0]


def changes(values: Mapping[str, float], label: str, alt: str) -> str:
    """A bar for each name to the left or right of zero: blue gains, orange losses."""
    out: list[str] = []
    with _figure(alt, out, height=0.9 + 0.2 * len(values)) as axes:
        places = np.arange(len(values))[::-1]
        found = np.array(list(values.values()))
        axes.barh(places, found, color=np.where(found >= 0, COLOURS[0], COLOURS[5]), height=0.7)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(places, [_short(name, 22) for name in values], fontsize=9)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    return out[0]


def reliabilities(found: Mapping[str, Reliability], alt: str) -> str:
    """Accuracy over confidence, and the line of a model that is as right as it says."""
    out: list[str] = []
    with _figure(alt, out, height=3.4, width=4.0) as axes:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":", label="as right as sure")
        for number, (name, each) in enumerate(found.items()):
            there = each.counts > 0
            sizes = 8 + 60 * each.counts[there] / each.counts.max()
            marker = MARKERS[number % len(MARKERS)]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(
                each.confidence[there], each.accuracy[there], marker, ls="-", lw=1.2, ms=4, color=colour, label=_label(name)
            )
            axes.scatter(each.confidence[there], each.accuracy[there], sizes, marker=marker, alpha=0.7, color=colour)
        axes.set(xlabel=f"confidence, {BINS} bins", ylabel="share right", xlim=(0, 1.02), ylim=(0, 1.05))
        _legend(axes)
    return out[0]


def scatter(places: Array, labels: Array, names: Mapping[int, str], alt: str) -> str:
    """Points [N, 2] in the colour and mark of their class, the class's name in the middle of its points."""
    out: list[str] = []
    with _figure(alt, out, height=4.2, width=4.4) as axes:
        for number, (label, name) in enumerate(names.items()):
            mine = places[labels == label]
            if not len(mine):
                continue
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
            axes.scatter(*mine.T, s=12, alpha=0.6, color=colour, marker=marker, linewidths=0)
            box = {"boxstyle": "round,pad=0.15", "facecolor": colour, "alpha": 0.9, "linewidth": 0}
            middle = np.median(mine, axis=0)
            ink = "black" if colour in PALE else "white"
            axes.annotate(_short(name, 14), middle, fontsize=9, ha="center", va="center", color=ink, bbox=box)
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
    return out[0]


def matrix(values: Array, limit: float, names: Sequence[str], alt: str) -> str:
    """A matrix [K, K] in colours from 0 to `limit`; what is not a number is left empty."""
    out: list[str] = []
    with _figure(alt, out, height=3.2, width=3.9) as axes:
        shown = axes.imshow(values, vmin=0, vmax=limit)
        axes.grid(visible=False)
        if len(names) <= 20:
            tags = [_short(name, 8) for name in names]
            wide = sum(map(len, tags)) > 24  # letters in a row below the matrix
            axes.set_xticks(range(len(names)), tags, rotation=90 if wide else 0)
            axes.set_yticks(range(len(names)), tags)
        axes.figure.colorbar(shown, ax=axes, shrink=0.85)
    return out[0]


def grouped(series: Mapping[str, Sequence[float]], groups: Sequence[str], label: str, alt: str) -> str:
    """Bars beside each other: one for each name in each group."""
    out: list[str] = []
    with _figure(alt, out) as axes:
        width = 0.8 / max(len(series), 1)
        for number, (name, values) in enumerate(series.items()):
            places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
            axes.bar(places, values, width, label=_label(name), color=COLOURS[number % len(COLOURS)])
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        _legend(axes)
    return out[0]


def ledger(parts: Mapping[str, float], label: str, alt: str) -> str:
    """A bar for each part, as long as what it costs."""
    out: list[str] = []
    with _figure(alt, out, height=0.9 + 0.26 * len(parts)) as axes:
        places = np.arange(len(parts))[::-1]
        axes.barh(places, list(parts.values()), color=COLOURS[2], height=0.7)
        axes.set_yticks(places, list(parts), fontsize=9)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    return out[0]


def heat(values: Array, side: int = 96) -> Array:
    """A map [H, W] as colours uint8 [side, side, 3], dark at its least and bright at its greatest."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    coloured = (255 * _matplotlib().colormaps["cividis"](scaled)[..., :3]).astype(np.uint8)
    return np.asarray(Image.fromarray(coloured).resize((side, side), Image.Resampling.NEAREST))


def _legend(axes: Any) -> None:
    """A legend above the axes: inside it would lie on a curve sooner or later."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, handlelength=1.6, columnspacing=1.2, borderaxespad=0.2)


def _label(name: str) -> str:
    """A name for a legend, where matplotlib leaves out all that begin with `_`: a space without width goes before them."""
    return f"\u200b{name}" if name.startswith("_") else name


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
