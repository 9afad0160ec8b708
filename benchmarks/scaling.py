"""How the time of an AdamW step grows with the number of parameters, and with the number of leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import adaptive_optax as ao
from adaptive_optax._core.drawing import PALETTE, THEMES, dress, set_range, set_ticks
from benchmarks import trees
from benchmarks.contenders import ROTATED_BYTES, SEEDS, Step, gradient_sets, preparation, preparation_sum
from benchmarks.tables import Table, digits, ratio
from benchmarks.timing import against, alternate

MEASURES = (
    "interop.convert_storage",
    "optimizers",
)

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "ours": lambda: ao.adamw(1e-3),
    "optax": lambda: optax.adamw(1e-3),
}
_FITTED = 4  # the number of largest trees to which the power law is fitted


def measure(quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    """Measures eight leaves of increasing size, and increasing numbers of small leaves."""
    largest = 8 if jax.default_backend() == "cpu" else 9
    sizes = [1e3, 1e4] if quick else [10**e for e in np.arange(5, largest + 0.1, 0.5)]
    counts = [2, 4] if quick else [10, 30, 100, 300, 1000, 3000]
    rows = []
    for parameters in sizes:
        shapes = trees.like_square(8, round((parameters / 8) ** 0.5))
        rows.append(_row("parameters", shapes, quick, advance))
    for leaves in counts:
        rows.append(_row("leaves", trees.like_square(leaves, 32), quick, advance))
    return {"rows": rows, "exponents": _exponents(rows), "seeds": SEEDS}


def _row(grows: str, shapes: trees.Shapes, quick: bool, advance: Callable[[str], None]) -> dict[str, Any]:
    parameters = trees.size(shapes)
    advance(f"{len(shapes)} leaves, {parameters:,} parameters")
    gradients = gradient_sets(shapes, 2**20 if quick else ROTATED_BYTES)
    steps = {name: Step(make, shapes, gradients) for name, make in OPTIMIZERS.items()}
    row = {
        "grows": grows,
        "leaves": len(shapes),
        "parameters": parameters,
        "timed": against(alternate(steps, 15 if quick else 60, seconds=2), "optax"),
    }
    return row | {"preparation_s": preparation(steps, 1)} if grows == "leaves" else row


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Returns x and y, by curve title and optimizer."""
    curves: dict[str, dict[str, Any]] = {}
    for name in OPTIMIZERS:
        for grows in ("parameters", "leaves"):
            chosen = [row for row in rows if row["grows"] == grows]
            x = np.array([row[grows] for row in chosen], float)
            ms = np.array([row["timed"][name]["ms"] for row in chosen])
            curves.setdefault(f"step against {grows}", {})[name] = x, ms
            if grows == "leaves":
                seconds = [preparation_sum(row, name) for row in chosen]
                curves.setdefault("trace + compile against leaves", {})[name] = x, np.array(seconds)
    return curves


def _exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fits log y = a + exponent log x to the largest trees."""
    return {
        title: {
            name: float(np.polyfit(np.log(x[-_FITTED:]), np.log(y[-_FITTED:]), 1)[0])
            for name, (x, y) in curves.items()
        }
        for title, curves in _curves(rows).items()
    }


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the tables of times and of exponents."""
    times = Table(
        "AdamW against optax's", ["leaves", "parameters", "ms", "optax, ms", "ratio", "trace + compile"]
    )
    for row in result["rows"]:
        prepared = ""
        if "preparation_s" in row:
            ours, theirs = (digits(preparation_sum(row, name), 2) for name in ("ours", "optax"))
            prepared = f"{ours} s, {theirs} s"
        timed = row["timed"]
        ms = (digits(timed[name]["ms"]) for name in ("ours", "optax"))
        times.add(f"{row['leaves']:,}", f"{row['parameters']:,}", *ms, ratio(timed["ours"]), prepared)
    fitted = Table(f"Exponents, fitted to the {_FITTED} largest", ["time of", "adaptive_optax", "optax"])
    for title, exponents in result["exponents"].items():
        fitted.add(title, *(f"{exponents[name]:.2f}" for name in ("ours", "optax")))
    return {"main": times, "exponents": fitted}


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Draws the times on logarithmic axes, for light and dark."""
    return {f"scaling_{theme}": _figure(result, theme) for theme in THEMES}


def _figure(result: dict[str, Any], theme: str) -> Figure:
    colours, curves = THEMES[theme], _curves(result["rows"])
    figure = Figure(figsize=(4.6, 7.6), layout="constrained", facecolor=colours.paper)
    units = {
        "step against parameters": "ms",
        "step against leaves": "ms",
        "trace + compile against leaves": "s",
    }
    for axes, (title, drawn) in zip(figure.subplots(3, 1), curves.items(), strict=True):
        dress(axes, colours, f"{title}, {units[title]}", title.split()[-1])
        every = np.concatenate([y for _, y in drawn.values()])
        x = next(iter(drawn.values()))[0]
        axes.set_xscale("log")
        set_ticks(axes.xaxis, x[0], x[-1], log=True)
        set_range(axes, every.min(), every.max())
        for (name, (x, y)), colour, marker in zip(drawn.items(), PALETTE, "os", strict=False):
            exponent = result["exponents"][title][name]
            label = f"{'adaptive_optax' if name == 'ours' else name}: exponent {exponent:.2f}"
            axes.plot(x, y, marker=marker, color=colour, label=label, markersize=4, linewidth=1.4)
        axes.legend(frameon=False, labelcolor=colours.ink, fontsize="small")
    return figure
