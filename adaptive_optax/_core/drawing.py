"""Shared drawing code: colours for light and dark themes, and axes that are readable on a phone.

The colours are from Okabe and Ito (2008), "Color Universal Design".
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from adaptive_optax._core.names import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MINUS = "\N{MINUS SIGN}"


class Picture(Figure):
    """A figure that a notebook shows, although it was made without `pyplot`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def plain(number: float) -> str:
    """Formats a number as briefly as possible."""
    return re.sub(r"e(-?)\+?0*", r"e\1", f"{number:.6g}").replace("-", MINUS)


class Theme(NamedTuple):
    """The colours of a figure other than its lines."""

    ink: str
    muted: str
    line: str
    strip: str
    paper: str


THEMES = {
    "light": Theme("#1c1e22", "#5a606a", "#d5d9df", "#e9ecf0", "#ffffff"),
    "dark": Theme("#e8eaed", "#a3a9b3", "#3c424b", "#262a31", "#15171a"),
}
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP<>p*hd"
LINES = ("-", "--", "-.")


def text(axes: Any, *arguments: Any, **style: Any) -> None:
    """Writes text on axes literally, so that dollar signs do not start mathematics."""
    axes.text(*arguments, parse_math=False, **style)


def dress(axes: Axes, theme: Theme, title: str, xlabel: str) -> None:
    """Applies the shared style. The y label is horizontal above the axes, where it is easy to read."""
    axes.set_title(shortened(title, 48), loc="left", color=theme.muted, fontsize="medium", parse_math=False)
    axes.set_xlabel(xlabel, color=theme.muted, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.line)
    axes.tick_params(colors=theme.muted, which="both", color=theme.line)
    axes.set_facecolor("none")
    axes.grid(color=theme.line, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)


def set_ticks(axis: Any, low: float, high: float, log: bool) -> None:
    """Puts three to six labelled ticks between low and high."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    if not log:
        axis.set_major_locator(MaxNLocator(5))
        return
    axis.set_minor_locator(NullLocator())
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for subs in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        ticks = np.outer(10.0**decades, subs)
        if np.count_nonzero((low <= ticks) & (ticks <= high)) >= 3:
            axis.set_major_locator(LogLocator(subs=subs, numticks=7))
            return
    axis.set_major_locator(MaxNLocator(4))


def set_range(axes: Axes, low: float, high: float, above: float = 0.0, *, log: bool = True) -> None:
    """Sets the y range to low..high and leaves the fraction `above` of the height free.

    The axis is logarithmic if `low` is positive, unless `log` is False.
    """
    log = log and low > 0
    a, b = (np.log10(low), np.log10(high)) if log else (low, high)
    top, pad = high, 0.06 * (b - a) or (0.1 if log else 0.1 * abs(a) or 1.0)
    a, b = a - pad, b + pad
    free = a + (b - a) / (1 - above)
    low, high, free = (10**a, 10**b, 10**free) if log else (a, b, free)
    if log:
        axes.set_yscale("log")
    axes.set_ylim(low, free)
    set_ticks(axes.yaxis, low, high, log)
    if above:
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= top])


def set_step_axis(axes: Axes, steps: np.ndarray) -> None:
    """Sets the x range to 0..last step, with integer labels."""
    axes.set_xlim(0, steps[-1])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def draw_placeholder(axes: Axes, colours: Theme) -> None:
    """Draws a note in place of a picture without data."""
    axes.set_yticks([])
    text(axes, 0.5, 0.5, "no run to show", transform=axes.transAxes, ha="center", color=colours.muted)
