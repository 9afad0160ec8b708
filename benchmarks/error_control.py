"""The learning rates that `error_controlled` and `adgd` find, in three parts; `limit_cost` has their price.

* basin: what a peak rate that is too high costs with the limit and without it, and training without any rate;
* deterministic: evaluations on smooth functions, next to optax's line searches;
* edge: the limit next to the edge of stability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.figure import Figure

from benchmarks import (
    error_control_basin,
    error_control_deterministic,
    error_control_edge,
)
from benchmarks.tables import Table

MEASURES = (
    "wrappers.error_control",
    "study.engine.trials",
    "study.tasks",
    "schedules.one_cycle",
    "transforms.adgd",
)

PARTS: dict[str, Any] = {
    "basin": error_control_basin,
    "deterministic": error_control_deterministic,
    "edge": error_control_edge,
}


def measure(
    quick: bool, advance: Callable[[str], None], parts: Iterable[str] = tuple(PARTS)
) -> dict[str, Any]:
    """Measures the parts."""
    result: dict[str, Any] = {name: PARTS[name].measure(quick, advance) for name in parts}
    trials = 1 if quick else error_control_basin.SEEDS
    seeds = {"basin": f"0 to {trials - 1}", "data": [0, 1], "quadratics": 0, "edge": 0}
    steps = {name: setting.steps for name, setting in error_control_basin.SETTINGS.items()}
    return result | {"settings": {"steps": steps}, "seeds": seeds}


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Returns the tables of all measured parts."""
    return _each("tables", result)


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Draws the pictures of all measured parts."""
    return _each("figures", result)


def _each(name: str, result: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for part, module in PARTS.items():
        if part in result:
            made |= getattr(module, name, lambda _: {})(result[part])
    return made
