"""The plot of `TelemetryLog`: effective learning rates of layers over training."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from adaptive_optax._core.checks import check_choice
from adaptive_optax._core.drawing import LINES, PALETTE, THEMES, Picture, dress, set_range, set_step_axis
from adaptive_optax._core.names import shortened

_MOST_NAMES = 10


def draw(steps: np.ndarray, layers: dict[str, np.ndarray], rate: np.ndarray, theme: str) -> Figure:
    """Draws a line for each layer, and a dotted line for the nominal learning rate.

    Up to ten layers have distinct colours and line styles and are named. More layers are coloured from dark
    to bright in the order of the tree, and only some are named.
    """
    check_choice("theme", theme, THEMES)
    colours = THEMES[theme]
    figure = Picture(figsize=(6.4, 4.6), layout="constrained")
    figure.set_facecolor(colours.paper)
    axes = figure.subplots()
    dress(axes, colours, "effective learning rate (dotted: as given)", "step")
    few = len(layers) <= _MOST_NAMES
    ramp = np.linspace(0.1, 0.9, len(layers))
    named = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_NAMES)).round()
    for i, (name, values) in enumerate(layers.items()):
        style: dict[str, Any] = {"color": matplotlib.colormaps["viridis"](ramp[i])}
        if few:
            style = {"color": PALETTE[i % len(PALETTE)], "linestyle": LINES[i // len(PALETTE)]}
        label = shortened(name, 28) if i in named else None
        axes.plot(steps, np.where(values > 0, values, np.nan), linewidth=1.4, label=label, **style)
    axes.plot(steps, rate, ":", color=colours.ink, linewidth=1.1)
    values = np.concatenate([*layers.values(), rate])
    positive = values[np.isfinite(values) & (values > 0)]
    if len(positive):
        set_range(axes, positive.min(), positive.max())
    set_step_axis(axes, steps)
    legend = figure.legend(loc="outside lower left", ncols=2, frameon=False, labelcolor=colours.ink)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
