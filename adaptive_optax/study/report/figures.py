"""Figures of a comparison: all pictures side by side, or one as an SVG element for a page.

They leave pyplot alone, so no display is needed and no figure stays open.
"""

from __future__ import annotations

import io
import re
import warnings
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from adaptive_optax._checks import check_choice
from adaptive_optax._drawing import THEMES, shortened
from adaptive_optax.study.pictures import (
    arm_styles,
    plot_curves,
    plot_differences,
    plot_effective_rates,
    plot_rates,
)

if TYPE_CHECKING:
    from adaptive_optax.study.result import Comparison

PICTURES = {
    "rates": plot_rates,
    "differences": plot_differences,
    "curves": plot_curves,
    "effective_rates": plot_effective_rates,
}

# One picture of the report: 330 units wide, text of 11, so that on a phone of 320 px it is still read.
_WIDTH = 330 / 72
_SVG: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "adaptive_optax",
    "font.size": 11.0,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
}


def plot(comparison: Comparison, *, theme: str = "light") -> Figure:
    """Makes a figure with the four pictures, which belongs to nobody but the caller.

    Args:
        comparison: What to draw.
        theme: "light" or "dark".
    """
    check_choice("theme", theme, THEMES)
    rivals = len(comparison.info["arms"]) - 1
    figure = Figure(figsize=(11.0, 2 * max(4.6, 1.4 + 0.52 * rivals)), layout="constrained")
    figure.set_facecolor(THEMES[theme].paper)
    titles = (
        "Tuning: every arm has its own best rate",
        "Verdict: paired differences",
        "Training at the best rates",
        "The learning rate in effect",
    )
    for axes, draw, title in zip(figure.subplots(2, 2).flat, PICTURES.values(), titles, strict=True):
        draw(comparison, axes, theme=theme)
        heading = f"{title}\n{axes.get_title(loc='left')}"
        style = {"color": THEMES[theme].ink, "fontsize": "medium", "parse_math": False}
        axes.set_title(heading, loc="left", **style)
    _add_legend(figure, comparison, theme)
    return figure


def to_svg(comparison: Comparison, picture: str, *, theme: str = "light", description: str = "") -> str:
    """Gives one picture as an SVG element to stand inside HTML.

    The same comparison gives the same bytes whatever matplotlib's settings are. Its ids begin with the names
    of picture and theme, so that several elements fit into one page, and it needs no namespaces there.

    Args:
        comparison: What to draw.
        picture: "rates", "differences", "curves" or "effective_rates".
        theme: "light" or "dark".
        description: What a screen reader says.
    """
    check_choice("picture", picture, PICTURES)
    check_choice("theme", theme, THEMES)
    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SVG)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has more fonts
        arms = len(comparison.info["arms"])
        height = 60 + 42 * (arms - 1) if picture == "differences" else 250
        figure = Figure(figsize=(_WIDTH, height / 72), layout="constrained")
        PICTURES[picture](comparison, figure.subplots(), theme=theme)
        if picture != "differences":
            rows = _add_legend(figure, comparison, theme)
            figure.set_figheight((height + 16 * rows) / 72)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    prefixed = rf"\g<1>{picture}-{theme}-"
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r'(id="|href="#|url\(#)', prefixed, tag.group()), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg).replace("xlink:href=", "href=")
    box = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg {box.group() if box else ""} role="img" aria-label="{escape(description)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1).strip()


def _add_legend(figure: Figure, comparison: Comparison, theme: str) -> int:
    """Adds the arms below, in as many columns as fit, and gives the number of rows."""
    styles = arm_styles(comparison, theme)
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
