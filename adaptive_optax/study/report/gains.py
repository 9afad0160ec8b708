"""The picture of `decay_now`: what every arm gains, against the step at which it began."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from adaptive_optax._core.checks import check_choice
from adaptive_optax._core.drawing import THEMES, Picture, dress, plain, set_range
from adaptive_optax._core.names import shortened
from adaptive_optax.study.record import Record
from adaptive_optax.study.report.figures import add_legend
from adaptive_optax.study.report.pictures import arm_styles


def plot_gains(steps: Sequence[int], records: Sequence[Record], *, theme: str = "light") -> Figure:
    """Makes a figure of gains with their intervals, not registered with pyplot.

    Args:
        steps: Where the run was continued.
        records: A comparison for each step.
        theme: "light" or "dark".
    """
    check_choice("theme", theme, THEMES)
    colours, last = THEMES[theme], records[-1]
    figure = Picture(figsize=(6.4, 4.8), layout="constrained", facecolor=colours.paper)
    axes = figure.subplots()
    metric = shortened(last.details.metric_name, 24)
    dress(axes, colours, "", "step of the run at which the arms began")
    title = f"{metric} minus the constant rate's, {last.direction.better} is better"
    axes.set_title(title, loc="left", color=colours.muted, fontsize="medium", parse_math=False)
    styles = arm_styles(last, theme)
    span = (max(steps) - min(steps)) or 1
    seen = [np.zeros(1)]
    rivals = last.details.rivals
    for i, arm in enumerate(rivals):
        verdicts = [record.verdicts[arm] for record in records]
        effect = np.array([verdict.effect for verdict in verdicts])
        low, high = np.array([verdict.interval for verdict in verdicts]).T
        shifted = np.array(steps) + 0.02 * span * (i - (len(rivals) - 1) / 2)  # so that bars do not hide bars
        axes.errorbar(
            shifted,
            effect,
            yerr=[effect - low, high - effect],
            **styles[arm],
            markersize=5,
            capsize=2,
            linewidth=1.2,
        )
        seen += [low, high]
    axes.axhline(0, color=styles[last.details.baseline]["color"], linewidth=1)
    between = (steps[0] + steps[1]) / 2 if len(steps) > 1 else steps[0] - 0.25 * span  # clear of the bars
    above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axes.annotate("constant rate", (between, 0), color=colours.ink, fontsize="small", **above)
    values = np.concatenate(seen)
    values = values[np.isfinite(values)]
    set_range(axes, float(values.min()), float(values.max()), log=False)
    now = np.array([verdict.interval for verdict in last.verdicts.values()])
    resolved = float(np.nanmax(np.abs(now))) if np.isfinite(now).any() else 0.0
    if np.abs(values).max() > 10 * resolved > 0:  # early on, decaying loses far more than it gains later
        axes.set_yscale("symlog", linthresh=2 * resolved, linscale=2.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.set_xticks(list(steps), [f"{step:,}" for step in steps])
    room = 0.1 * span if len(steps) > 1 else 0.4 * span
    axes.set_xlim(min(steps) - room, max(steps) + room)
    add_legend(figure, last, theme)
    return figure
