"""The report's plots as inline SVG: selectable text, colours that follow the page's colour scheme, unique ids.

Nothing here reads a file, or depends on run.json except for the rows of its history.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.run_record import Row
from finetune.runtime.console import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#1d2733",
    "muted": "#5d6976",
    "line": "#dde2e7",
    "before": "#a3aeb9",
    "after": "#0b7285",
    "second": "#c2410c",
}
"""CSS variable of the page -> its value in the light scheme, which matplotlib draws with and `_plot` replaces by the variable."""

WIDTH = 4.7  # inches, 338 SVG units: about 1:1 on a phone, where the text is then 10 pixels high
SMOOTH_FROM = 40  # from this number of logged losses on, a running mean is drawn over the raw line

Series = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One plot. svg: markup to inline; empty if there was nothing to draw, which the caption then says."""

    title: str
    caption: str
    svg: str = ""


def draw_plots(history: Sequence[Row]) -> list[Plot]:
    """The curves of a training in the order in which the report shows them.

    history: logged rows of run.json, each with `step` and some of `loss`, `eval_loss`, `learning_rate`,
    `grad_norm`, `tokens_per_second`. If a resumed run logged a step twice, the later row is used.
    """
    with _styled():
        return [
            _loss_plot(_series(history, "loss"), _series(history, "eval_loss")),
            _line_plot("Learning rate", _series(history, "learning_rate"), "highest {high:.2g}, last {last:.2g}"),
            _line_plot("Tokens per second", _series(history, "tokens_per_second"), "median {median:,.0f}"),
            _line_plot("Gradient norm", _series(history, "grad_norm"), "median {median:.2g}, highest {high:.2g}"),
        ]


@dataclass(frozen=True)
class Interval:
    """A difference in points and its 95% intervals; over_databases is None if nothing is known."""

    name: str
    points: float
    over_questions: tuple[float, float]
    over_databases: tuple[float, float] | None


def draw_differences(title: str, differences: Sequence[Interval]) -> Plot:
    """Differences to one reference, each with its intervals."""
    with _styled():
        figure, axes = _figure(1.2 + 0.5 * len(differences))
        for row, one in enumerate(differences):
            spans = [(row - 0.12, one.over_questions, "after"), (row + 0.12, one.over_databases, "second")]
            for height, span, colour in spans:
                if span:
                    axes.plot(span, (height, height), color=COLOURS[colour], linewidth=2.4, solid_capstyle="butt")
                    axes.plot([one.points], [height], color=COLOURS[colour], marker="o")
        axes.axvline(0, color=COLOURS["muted"], linewidth=1)
        axes.plot([], [], color=COLOURS["after"], label="over questions")
        axes.plot([], [], color=COLOURS["second"], label="over databases")
        axes.set_yticks(range(len(differences)), [_label(one.name) for one in differences], color=COLOURS["ink"])
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.set_xlabel("points")
        axes.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=2)
        spoken = "; ".join(f"{one.name}: {one.points:+.1f} points" for one in differences)
        return _plot(figure, title, "95% intervals", spoken)


@dataclass(frozen=True)
class Curve:
    """Validation losses over optimizer steps. kind: best, done or stopped, which decides how it is drawn."""

    name: str
    points: Series
    kind: str


def draw_curves(title: str, curves: Sequence[Curve], comparisons: Sequence[int]) -> Plot:
    """One line for each trial of a sweep; comparisons: the steps at which trials were stopped."""
    if not any(curve.points for curve in curves):
        return Plot(title, "No validation loss yet.")
    styles = {"best": ("second", 2.4, 1.0), "done": ("after", 1.8, 1.0), "stopped": ("before", 1.2, 0.9)}
    with _styled():
        figure, axes = _figure(2.8)
        for step in comparisons:
            axes.axvline(step, color=COLOURS["line"], linewidth=1)
        for curve in sorted(curves, key=lambda curve: list(styles).index(curve.kind), reverse=True):
            if curve.points:
                colour, width, alpha = styles[curve.kind]
                axes.plot(*_xy(curve.points), color=COLOURS[colour], linewidth=width, alpha=alpha, marker="o")
                axes.annotate(
                    _label(curve.name), curve.points[-1], (4, 0), textcoords="offset points", va="center", fontsize=8
                )
        axes.margins(x=0.15)
        axes.set_xlabel("step")
        axes.set_ylabel("validation loss")
        axes.grid(axis="y")
        spoken = "; ".join(f"{curve.name}: {curve.points[-1][1]:.3g}" for curve in curves if curve.points)
        return _plot(figure, title, "vertical lines: where trials are compared", spoken)


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc must not change the report
        matplotlib.rcParams.update(_STYLE)
        yield


def _label(name: str) -> str:
    """The name of a run, which often differs from that of another one at its end only."""
    name = visible(name, one_line=True)
    return name if len(name) <= 22 else f"{name[:9]}…{name[-12:]}"


_STYLE: Any = {  # Any, because matplotlib types the keys as one long Literal
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # otherwise the ids, and so the file, would differ between runs
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # a database may be called a$b$c
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.borderaxespad": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


def _loss_plot(train: Series, validation: Series) -> Plot:
    title = "Loss on the SQL tokens"
    if not train and not validation:
        return Plot(title, "No loss was logged.")
    figure, axes = _figure(2.3)
    captions = []
    if train:
        smooth = len(train) >= SMOOTH_FROM
        axes.plot(
            *_xy(train),
            color=COLOURS["after"],
            alpha=0.4 if smooth else 1,
            linewidth=1 if smooth else 1.8,
            marker="" if len(train) > 1 else "o",
            clip_on=False,
            label="training",
        )
        if smooth:
            axes.plot(*_xy(_running_mean(train)), color=COLOURS["after"], label="running mean")
        captions.append(f"training {train[0][1]:.3g} to {train[-1][1]:.3g}")
    if validation:
        axes.plot(*_xy(validation), color=COLOURS["second"], marker="o", clip_on=False, label="validation")
        captions.append(f"validation {validation[0][1]:.3g} to {validation[-1][1]:.3g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=3)
    return _plot(figure, title, ", ".join(captions))


def _line_plot(title: str, series: Series, caption: str) -> Plot:
    """One quantity over optimizer steps. caption: a format string with the fields high, median and last."""
    values = sorted(value for _, value in series if math.isfinite(value))
    if not values:
        return Plot(title, "Nothing was logged.")
    figure, axes = _figure(2.3)
    axes.plot(*_xy(series), color=COLOURS["after"], marker="" if len(series) > 1 else "o", clip_on=False)
    axes.set_ylim(bottom=0, top=values[-1] * 1.1 or 1)
    if values[-1] < 0.01:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    axes.set_xlabel("step")
    axes.grid(axis="y")
    text = caption.format(high=values[-1], median=values[len(values) // 2], last=series[-1][1])
    return _plot(figure, title, text)


def _series(history: Sequence[Row], key: str) -> Series:
    points = {
        step: float(value)
        for row in history
        if (step := row.get("step")) is not None and (value := row.get(key)) is not None
    }
    return sorted(points.items())


def _xy(series: Series) -> tuple[list[float], list[float]]:
    return [x for x, _ in series], [y for _, y in series]


def _running_mean(series: Series) -> Series:
    """Centred mean over about a twentieth of the points; the window narrows towards both ends."""
    reach = max(1, len(series) // 40)
    means = []
    for i, (x, _) in enumerate(series):
        side = min(reach, i, len(series) - 1 - i)
        near = [y for _, y in series[i - side : i + side + 1]]
        means.append((x, sum(near) / len(near)))
    return means


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _plot(figure: Figure, title: str, caption: str, spoken: str = "") -> Plot:
    """The figure as SVG for inlining: ids unique in the page, colours as the page's variables, no metadata URLs."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():  # the text stays text, which the reader's browser has a font for
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    drawn = re.search(r"<svg[^>]*viewBox=\"([^\"]*)\"[^>]*>(.*)</svg>", buffer.getvalue(), re.DOTALL)
    assert drawn is not None
    body = re.sub(r"<style.*?</style>", "", drawn[2], flags=re.DOTALL)  # it would apply to the whole page
    prefix = re.sub(r"\W+", "-", title.lower())
    body = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{prefix}-", body)
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    label = html.escape(visible(". ".join(filter(None, (title, caption, spoken)))))
    return Plot(title, caption, f'<svg role="img" aria-label="{label}" viewBox="{drawn[1]}">{body}</svg>')
