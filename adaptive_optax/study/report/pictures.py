"""The pictures of a comparison, each drawn on given axes: rates, differences, curves, telemetry.

The baseline has the text's colour, and every arm has its own marker, so that arms do not differ by colour
alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from adaptive_optax._core.checks import check_choice
from adaptive_optax._core.drawing import (
    LINES,
    MARKERS,
    PALETTE,
    THEMES,
    draw_placeholder,
    dress,
    set_range,
    set_step_axis,
    set_ticks,
    text,
)
from adaptive_optax._core.names import shortened
from adaptive_optax.study.direction import Direction
from adaptive_optax.study.record import Record
from adaptive_optax.study.report.findings import (
    Tuned,
    effective_rates,
    equivalence_margin,
    judge_all,
    judged_trials,
    limits,
    paired_metrics,
    tuned_rates,
    written,
)
from adaptive_optax.study.statistics.paired import column_means
from adaptive_optax.study.statistics.verdict import Verdict

_MOST_WINDOWS = 25


# ---- Parts of pictures ----


def arm_styles(record: Record, theme: str) -> dict[str, dict[str, Any]]:
    """Returns each arm's colour, marker and line style; the baseline has the text's colour."""
    details = record.details
    styles = {details.baseline: {"color": THEMES[theme].ink, "marker": MARKERS[0], "linestyle": "-"}}
    for i, arm in enumerate(details.rivals):
        styles[arm] = {
            "color": PALETTE[i % len(PALETTE)],
            "marker": MARKERS[(i + 1) % len(MARKERS)],
            "linestyle": LINES[i // len(PALETTE) % len(LINES)],
        }
    return {arm: styles[arm] for arm in details.arms}


def _draw_band(axes: Axes, x: Any, mean: Any, error: Any, style: dict[str, Any], **more: Any) -> None:
    error = np.nan_to_num(np.asarray(error))  # one seed has no standard error
    axes.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.15, linewidth=0)
    axes.plot(x, mean, **style, **more)


def _sparse_marks(i: int, every: int, arm: str) -> dict[str, Any]:
    """The style of the i-th arm's curve, with a marker on every few points, at other points for each arm."""
    return {"markevery": (i % every, every), "markersize": 4.5, "linewidth": 1.4, "label": arm}


# ---- The five pictures ----


def plot_rates(record: Record, axes: Axes, *, theme: str = "light") -> None:
    """Draws the final metric against the peak rate on the tuning seeds, for every arm.

    Shows means with bands of one standard error. The best rate is ringed; a rate at which a trial diverged is
    a cross in the strip at the top. The y range includes every arm's best rate and the better half of all
    means; it is logarithmic if all of these are positive and lower is better.

    Args:
        record: What to draw.
        axes: Where to draw it.
        theme: "light" or "dark".
    """
    check_choice("theme", theme, THEMES)
    details, styles = record.details, arm_styles(record, theme)
    tuned = {arm: tuned_rates(record, arm) for arm in details.arms}
    crossed = {arm: found for arm, found in tuned.items() if found.diverged.any()}
    height = min(0.055, 0.3 / max(len(crossed), 1))  # height of one row of crosses, as a share of the axes
    strip = max(0.09, height * len(crossed) + 0.02) if crossed else 0.0

    direction = record.direction
    title = f"{shortened(details.metric_name, 24)}, tuning seeds"
    title += " (higher is better)" * direction.maximize
    dress(axes, THEMES[theme], title, "peak learning rate")
    axes.set_xscale("log")
    for i, (arm, found) in enumerate(tuned.items()):
        _draw_band(axes, found.rates, found.mean, found.error, styles[arm], label=arm, markersize=4.5)
        best = found.best & np.isfinite(found.mean)
        ring = {
            "fillstyle": "none",
            "markersize": 11,
            "markeredgewidth": 1.3,
            "zorder": 4,
            "gid": f"best-{i}",
        }
        axes.plot(found.rates[best], found.mean[best], "o", color=styles[arm]["color"], **ring)
    rates = np.concatenate([found.rates for found in tuned.values()])
    left, right = (rates.min() / 1.6, rates.max() * 1.6) if len(rates) else (0.1, 1.0)
    axes.set_xlim(left, right)
    set_ticks(axes.xaxis, left, right, True)
    _set_readable_range(axes, list(tuned.values()), strip, direction)
    if crossed:
        shade = {"color": THEMES[theme].strip, "linewidth": 0, "zorder": 2.5, "transform": axes.transAxes}
        axes.add_patch(Rectangle((0, 1 - strip), 1, strip + 0.01, clip_on=False, **shade))
        text(axes, -0.02, 1 - strip / 2, "diverged", transform=axes.transAxes, va="center", ha="right",
              color=THEMES[theme].muted)  # fmt: skip
    for row, (arm, found) in enumerate(crossed.items()):
        x = found.rates[found.diverged > 0]
        y = np.full(len(x), 1 - strip / 2 + height * ((len(crossed) - 1) / 2 - row))
        axes.plot(x, y, "x", color=styles[arm]["color"], transform=axes.get_xaxis_transform(), markersize=5.5,
                  zorder=3, gid=f"diverged-{row}")  # fmt: skip


def _set_readable_range(axes: Axes, tuned: list[Tuned], above: float, direction: Direction) -> None:
    means, errors = (np.concatenate([getattr(found, name) for found in tuned]) for name in ("mean", "error"))
    finite = np.isfinite(means)
    if not finite.any():
        axes.set_yticks([])
        return
    costs = direction.cost(means)
    bests = [np.nanmin(direction.cost(found.mean)) for found in tuned if np.isfinite(found.mean).any()]
    best = np.min((costs - np.nan_to_num(errors))[finite])
    if not direction.maximize and best <= 0 < np.min(means[finite]):
        best = np.min(means[finite])  # a wide band alone must not prevent the logarithmic axis
    low, high = sorted(direction.cost(cost) for cost in (best, max(*bests, np.median(costs[finite]))))
    set_range(axes, low, high, above, log=not direction.maximize)


def plot_differences(record: Record, axes: Axes, *, theme: str = "light") -> None:
    """Draws a forest plot: how every arm differs from the baseline, paired by seed.

    Dots are seeds, the bar is the adjusted interval, the strip is the region of equivalence. A seed at which
    the arm diverged is a cross at the worse edge; a seed at which only the baseline diverged, one at the
    better edge. Intervals far beyond those of the other arms end in an arrow.

    Args:
        record: What to draw; only dots are drawn if it cannot be judged.
        axes: Where to draw it.
        theme: "light" or "dark".
    """
    check_choice("theme", theme, THEMES)
    colours, details, styles = THEMES[theme], record.details, arm_styles(record, theme)
    verdicts, _, _ = judge_all(record)
    margin, rivals = equivalence_margin(record), details.rivals
    metrics = {arm: paired_metrics(record, arm) for arm in rivals}
    differences = {arm: mine - base for arm, (mine, base) in metrics.items()}
    low, high = _common_range(differences, verdicts, margin)
    edge = 0.03 * (high - low)

    gap = "\N{NO-BREAK SPACE}" * 8  # a browser would collapse ordinary spaces
    sides = ("worse", "better") if record.direction.maximize else ("better", "worse")
    label = (
        f"← {sides[0]}{gap}{sides[1]} →\n{shortened(details.metric_name + ' minus ' + details.baseline, 46)}"
    )
    dress(axes, colours, "", label)
    axes.set_xlim(low, high)
    set_ticks(axes.xaxis, low, high, False)
    axes.set_ylim(len(rivals) - 0.4, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    for y, arm in enumerate(rivals):
        colour, verdict, seeds = styles[arm]["color"], verdicts.get(arm), differences[arm]
        if np.isfinite(margin):
            zone = {"color": colours.strip, "linewidth": 0, "gid": f"zone-{y}"}
            axes.broken_barh([(-margin, 2 * margin)], (y - 0.12, 0.56), **zone)
        axes.vlines(0, y - 0.12, y + 0.44, color=colours.muted, linewidth=0.9)
        seen = seeds[np.isfinite(seeds)]
        dots = {"markersize": 3.6, "alpha": 0.75, "markeredgewidth": 0, "gid": f"seeds-{y}"}
        axes.plot(seen, np.full(len(seen), y + 0.3), "o", color=colour, label=arm, **dots)
        lost = np.isnan(seeds)
        edges = (low + edge, high - edge) if record.direction.maximize else (high - edge, low + edge)
        for x, seeds_lost in (
            (edges[0], lost & np.isnan(metrics[arm][0])),
            (edges[1], lost & ~np.isnan(metrics[arm][0])),
        ):
            if seeds_lost.any():
                axes.plot(x, y + 0.3, "x", color=colour, markersize=5.5, gid=f"diverged-{y}")
        firm, words = False, "not judged"
        if verdict is not None:
            firm = verdict.decision in ("better", "worse")
            words = verdict.decision
            if np.isfinite(verdict.relative_effect):
                words += " " + written(100 * verdict.relative_effect, "+.1f", " %")
            _draw_interval(axes, verdict, y, colour, styles[arm]["marker"])
        side = {"transform": axes.get_yaxis_transform(), "va": "bottom"}
        text(axes, 0, y - 0.2, shortened(arm, 36), color=colours.ink, **side)
        emphasis = {"color": colours.ink, "weight": "bold"} if firm else {"color": colours.muted}
        text(axes, 1, y - 0.2, words, ha="right", **emphasis, **side)


def _common_range(
    differences: dict[str, np.ndarray], verdicts: dict[str, Verdict], margin: float
) -> tuple[float, float]:
    """Returns the range of all arms except those whose extent exceeds eight times the lower median."""
    extents = []
    for arm, seeds in differences.items():
        ends = np.array([0.0, *seeds, *(verdicts[arm].interval if arm in verdicts else ())])
        extents.append(ends[np.isfinite(ends)])
    sizes = [np.ptp(ends) for ends in extents]
    typical = np.quantile(sizes or [0.0], 0.5, method="lower")
    shown = [ends for ends, size in zip(extents, sizes, strict=True) if size <= 8 * typical]
    whole = np.concatenate([[0.0], *shown, [-margin, margin] if np.isfinite(margin) else []])
    room = 0.06 * np.ptp(whole) or 1.0
    return whole.min() - room, whole.max() + room


def _draw_interval(axes: Axes, verdict: Verdict, row: int, colour: str, marker: str) -> None:
    if np.isnan([*verdict.interval, verdict.effect]).any():
        return
    (low, high), (start, end), y = axes.get_xlim(), verdict.interval, row + 0.08
    ends = np.clip([start, end], low, high)
    axes.plot(ends, [y, y], color=colour, linewidth=2.4, solid_capstyle="butt", gid=f"interval-{row}")
    if low <= verdict.effect <= high:
        axes.plot(verdict.effect, y, marker, color=colour, markersize=6)
    for beyond, x, arrow in ((start < low, low, "<"), (end > high, high, ">")):
        if beyond:
            axes.plot(x, y, arrow, color=colour, clip_on=False, markersize=6)


def plot_curves(record: Record, axes: Axes, *, theme: str = "light") -> None:
    """Draws validation curves with bands of one standard error, and dotted training curves.

    Shows every arm at its best rate: means over the verdict's seeds, without diverged trials. The y range is
    that of the second half of the steps. Training losses are means over at most 25 windows, because batches
    are noisy; they have their own axis, on the right, if the metric is not the loss.

    Args:
        record: What to draw.
        axes: Where to draw it.
        theme: "light" or "dark".
    """
    check_choice("theme", theme, THEMES)
    colours, details = THEMES[theme], record.details
    steps, windows = np.asarray(record.validation_steps), np.asarray(record.training_steps)
    width = max(1, -(-len(windows) // _MOST_WINDOWS))
    windows = windows[width - 1 :: width]
    same = details.metric_name == "loss" or not len(windows)
    title = f"validation {shortened(details.metric_name, 20)}" + " (dotted: training)" * (
        same and len(windows) > 0
    )
    dress(axes, colours, title + " (higher is better)" * record.direction.maximize, "step")
    set_step_axis(axes, steps)
    other = axes if same else axes.twinx()
    every = max(len(steps) // 6, 1)  # markers are sparse, and at different steps for each arm
    seen, fitted = [], []
    for i, (arm, style) in enumerate(arm_styles(record, theme).items()):
        trials = judged_trials(record, arm)
        if not len(trials):
            continue
        curves = np.asarray(record.validation_curves)[trials]
        reported = np.isfinite(curves).any(axis=0)  # a training function may measure at steps of its own
        mean, error = column_means(curves[:, reported], leave_out=record.details.mode is None)
        marks = _sparse_marks(i, every, arm)
        _draw_band(axes, steps[reported], mean, error, style, **marks)
        late = steps[reported] >= steps[-1] / 2
        seen += [(mean - error)[late], (mean + error)[late]]
        if len(windows):
            training = column_means(np.asarray(record.training_curves)[trials])[0]
            training = training[: len(windows) * width].reshape(-1, width).mean(axis=1)
            other.plot(windows, training, ":", color=style["color"], linewidth=0.9)
            fitted.append(training[windows >= steps[-1] / 2])
    if not seen:
        other.set_yticks([])
        draw_placeholder(axes, colours)
        return
    low, high = _ends(seen)
    least, most = _ends(fitted) if fitted else (low, high)
    if same:
        set_range(axes, _extended(low, high, least), high, log=least > 0 and not record.direction.maximize)
        return
    set_range(axes, low, high, log=not record.direction.maximize)
    set_range(other, least, most)
    other.set_ylabel("training loss (dotted)", rotation=270, va="bottom", color=colours.muted)
    other.spines[:].set_visible(False)
    other.tick_params(colors=colours.muted, which="both", color=colours.line)


def _ends(curves: list[np.ndarray]) -> tuple[float, float]:
    """The least and the largest finite value."""
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _extended(low: float, high: float, least: float) -> float:
    """Lowers a range towards the training curves without squeezing the validation curves."""
    if low > 0:
        return min(low, max(least, low / 3))
    return min(low, max(least, 2 * low - high))


def plot_effective_rates(record: Record, axes: Axes, *, theme: str = "light") -> None:
    """Draws the effective learning rate over the steps, with the scheduled rate dotted.

    The effective rate is the rate of the gradient step nearest to the optimizer's step. Shows every arm at
    its best rate: means over the verdict's seeds with bands of one standard error, without diverged trials.
    The first measurement may leave the picture.
    With noisy gradients a rate may be negative. Then the axis is linear, with a line at 0: a logarithmic axis
    would show such rates, and bands that reach below 0, as a fall to zero.

    Args:
        record: What to draw.
        axes: Where to draw it.
        theme: "light" or "dark".
    """
    check_choice("theme", theme, THEMES)
    colours = THEMES[theme]
    dress(axes, colours, "effective learning rate (dotted: as scheduled)", "step")
    steps = np.asarray(record.telemetry_steps)
    seen, scheduled = [], []
    for i, (arm, style) in enumerate(arm_styles(record, theme).items()):
        found = effective_rates(record, arm)
        if found is None:
            continue
        at = np.isfinite(found.mean)
        marks = _sparse_marks(i, 4, arm)
        _draw_band(axes, steps[at], found.mean[at], found.error[at], style, **marks)
        axes.plot(steps, found.scheduled, ":", color=style["color"], linewidth=0.9)
        # The first measurement sets no range: there a warm-up is near 0, and Adam's direction is the sign.
        shown = at & (np.cumsum(at) > 1) if at.sum() > 2 else at
        seen += [found.mean[shown], (found.mean - np.nan_to_num(found.error))[shown]]
        scheduled.append(found.scheduled[shown][found.scheduled[shown] > 0])
    values = np.concatenate(seen) if seen else np.zeros(0)
    if not len(values):
        draw_placeholder(axes, colours)
        return
    values = np.concatenate([values, *scheduled])
    set_step_axis(axes, np.asarray([record.details.steps]))
    set_range(axes, values.min(), values.max())
    if values.min() <= 0:
        axes.axhline(0, color=colours.muted, linewidth=0.9, zorder=1.5, gid="zero")


def plot_limits(record: Record, axes: Axes, *, theme: str = "light") -> None:
    """Draws the limit of `error_controlled` over the steps, with 2 / curvature dotted.

    Without noise and momentum a learning rate of 2 / curvature is at the edge of stability. Shows every arm
    that has a limit at its best rate: geometric means over the verdict's seeds, without diverged trials.

    Args:
        record: What to draw.
        axes: Where to draw it.
        theme: "light" or "dark".
    """
    check_choice("theme", theme, THEMES)
    colours = THEMES[theme]
    dress(axes, colours, "step limit (dotted: 2 / curvature)", "step")
    steps, seen = np.asarray(record.telemetry_steps), []
    for i, (arm, style) in enumerate(arm_styles(record, theme).items()):
        found = limits(record, arm)
        if found is None:
            continue
        marks = _sparse_marks(i, 4, arm)
        axes.plot(steps, found.limit, **style, **marks)
        axes.plot(steps, found.edge, ":", color=style["color"], linewidth=0.9)
        seen += [found.limit[1:], found.edge[1:]]  # the first is where the search starts
    values = np.concatenate(seen) if seen else np.zeros(0)
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        draw_placeholder(axes, colours)
        return
    set_step_axis(axes, np.asarray([record.details.steps]))
    set_range(axes, values.min(), values.max())
