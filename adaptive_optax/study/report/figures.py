"""Figures of a comparison: all pictures side by side, or one as an SVG element for a page.

They do not use pyplot, so no display is needed and no figure stays open.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaptive_optax._core.checks import check_choice
from adaptive_optax._core.drawing import THEMES, Picture
from adaptive_optax._core.names import shortened, visible
from adaptive_optax.study.record import Record
from adaptive_optax.study.report.findings import limits
from adaptive_optax.study.report.pictures import (
    arm_styles,
    plot_curves,
    plot_differences,
    plot_effective_rates,
    plot_limits,
    plot_rates,
)

PICTURES = {
    "rates": plot_rates,
    "differences": plot_differences,
    "curves": plot_curves,
    "effective_rates": plot_effective_rates,
    "limits": plot_limits,
}


def pictures_of(record: Record) -> list[str]:
    """The names of the pictures that have something to show.

    Without tuning there is one rate. A training function may report no telemetry, and only the final metric.
    """
    details = record.details
    reported = np.isfinite(record.validation_curves).sum(axis=1)
    shown = {
        "rates": details.tuned,
        "differences": True,
        "curves": details.dataset is not None or not len(reported) or reported.max() != 1,
        "effective_rates": details.mode is not None or np.isfinite(record.telemetry_curves).any(),
        "limits": any(limits(record, arm) is not None for arm in details.arms),
    }
    return [name for name in PICTURES if shown[name]]


# One picture of the report: 330 units wide with text of size 11, readable on a phone of 320 px.
_WIDTH = 330 / 72
_SVG: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "adaptive_optax",
    "font.size": 11.0,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
}


def plot(record: Record, *, theme: str = "light") -> Figure:
    """Makes a figure with all pictures that have something to show, not registered with pyplot.

    Args:
        record: What to draw.
        theme: "light" or "dark".
    """
    check_choice("theme", theme, THEMES)
    rivals = len(record.details.rivals)
    shown = pictures_of(record)
    # An odd last picture fills its row.
    rows: Any = [[*shown[i : i + 2], *shown[i : i + 2]][:2] for i in range(0, len(shown), 2)]
    figure = Picture(figsize=(11.0, len(rows) * max(4.6, 1.4 + 0.52 * rivals)), layout="constrained")
    figure.set_facecolor(THEMES[theme].paper)
    titles = {
        "rates": "Tuning: every arm has its own best rate",
        "differences": "Verdict: paired differences",
        "curves": "Training" + " at the best rates" * record.details.tuned,
        "effective_rates": "Telemetry: effective learning rates",
        "limits": "Telemetry: limits",
    }
    for name, axes in figure.subplot_mosaic(rows).items():
        PICTURES[name](record, axes, theme=theme)
        title = titles[name]
        heading = f"{title}\n{axes.get_title(loc='left')}"
        style = {"color": THEMES[theme].ink, "fontsize": "medium", "parse_math": False}
        axes.set_title(heading, loc="left", **style)
    add_legend(figure, record, theme)
    return figure


def plot_one(record: Record, picture: str, *, theme: str = "light") -> Figure:
    """Makes a figure with one picture, not registered with pyplot.

    Args:
        record: What to draw.
        picture: "rates", "differences", "curves", "effective_rates" or "limits".
        theme: "light" or "dark".
    """
    check_choice("picture", picture, PICTURES)
    check_choice("theme", theme, THEMES)
    figure = Picture(figsize=(6.4, 6.0), layout="constrained", facecolor=THEMES[theme].paper)
    PICTURES[picture](record, figure.subplots(), theme=theme)
    if picture != "differences":  # it names the arms itself
        add_legend(figure, record, theme)
    return figure


def to_svg(record: Record, picture: str, *, theme: str = "light", description: str = "") -> Markup:
    """Returns one picture as an SVG element for use inside HTML.

    The same comparison produces the same bytes, whatever matplotlib's settings. Ids are prefixed with the
    names of picture and theme, so that one page can hold several elements; no namespaces are needed.

    Args:
        record: What to draw.
        picture: "rates", "differences", "curves", "effective_rates" or "limits".
        theme: "light" or "dark".
        description: The text for screen readers.
    """
    check_choice("picture", picture, PICTURES)
    check_choice("theme", theme, THEMES)
    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SVG)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has more fonts
        rivals = len(record.details.rivals)
        height = 60 + 42 * rivals if picture == "differences" else 250
        figure = Picture(figsize=(_WIDTH, height / 72), layout="constrained")
        PICTURES[picture](record, figure.subplots(), theme=theme)
        if picture != "differences":
            rows = add_legend(figure, record, theme)
            figure.set_figheight((height + 16 * rows) / 72)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    prefixed = rf"\g<1>{picture}-{theme}-"
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r'(id="|href="#|url\(#)', prefixed, tag.group()), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg).replace("xlink:href=", "href=")
    box = re.search(r'viewBox="[^"]*"', svg)
    head = Markup('<svg {} role="img" aria-label="{}">').format(
        Markup(box.group() if box else ""), visible(description)
    )
    return Markup(re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1).strip())


def add_legend(figure: Figure, record: Record, theme: str) -> int:
    """Adds a legend of the arms below, in as many columns as fit; returns the number of rows."""
    styles = arm_styles(record, theme)
    handles = [Line2D([], [], markersize=5, **style) for style in styles.values()]
    canvas = FigureCanvasAgg(figure)
    columns = len(handles)
    while True:
        legend = figure.legend(
            handles, [str(i) for i in range(len(handles))], loc="outside lower left", ncols=columns,
            frameon=False, columnspacing=1.2, handlelength=1.8, handletextpad=0.5, labelspacing=0.3,
        )  # fmt: skip
        for text, arm in zip(legend.get_texts(), styles, strict=True):
            text.set(parse_math=False, text=shortened(arm, 40), color=THEMES[theme].ink)
        if columns == 1 or legend.get_window_extent(canvas.get_renderer()).width <= figure.bbox.width:
            return -(-len(handles) // columns)
        legend.remove()
        columns -= 1
