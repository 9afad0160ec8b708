"""The limit and the edge of stability: a deterministic training without any rate.

The autoencoder is trained with all samples as one batch by Adam without and with momentum. Every 10 steps the
learning rate is compared with 2 / curvature, as a probe finds it along its direction, and with
2 / lambda_max, where lambda_max is the largest eigenvalue of the preconditioned Hessian D^-1/2 H D^-1/2, from
a power iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import adaptive_optax as ao
from adaptive_optax._core.drawing import LINES, PALETTE, THEMES, dress, set_range, set_step_axis
from adaptive_optax._core.states import one_state_of
from adaptive_optax.transforms.adam import ScaleByAdamState, direction_parts
from benchmarks.error_control_tasks import autoencoder

EVERY, STEPS, ITERATIONS = 10, 1000, 30
MOMENTA = (0.0, 0.9)
CURVES = {
    "learning_rate": "learning rate",
    "along_direction": "2 / curvature along the direction",
    "largest": "2 / largest eigenvalue",
}


def largest_eigenvalue(
    loss: Callable[[Any], jax.Array], params: Any, root: Any, vector: Any, iterations: int
) -> tuple[jax.Array, Any]:
    """Returns the eigenvalue of D^-1/2 H D^-1/2 that is largest in magnitude, and its vector.

    Args:
        loss: The function whose Hessian is H.
        params: Where the Hessian is taken.
        root: D, like the parameters.
        vector: The first vector.
        iterations: Number of Hessian-vector products.
    """
    scale = jax.tree.map(lambda d: 1 / jnp.sqrt(d), root)

    def product(vector):
        tangent = jax.tree.map(jnp.multiply, scale, vector)
        curved = jax.jvp(jax.grad(loss), (params,), (tangent,))[1]
        return jax.tree.map(jnp.multiply, scale, curved)

    def iterate(_, carry):
        _, vector = carry
        vector = optax.tree.scale(1 / optax.tree.norm(vector), vector)
        after = product(vector)
        return optax.tree.vdot(vector, after), after

    return jax.lax.fori_loop(0, iterations, iterate, (jnp.zeros(()), vector))


def trajectory(b1: float, steps: int, iterations: int) -> list[dict[str, Any]]:
    """Trains the autoencoder; returns what is found every `EVERY` steps, None for a curvature below 0."""
    task = autoencoder()
    params, model_state = task.start(jax.random.key(0))
    batch, key = jax.tree.map(jnp.asarray, task.train), jax.random.key(1)
    tx = ao.error_controlled(ao.scale_by_adam(b1=b1), every=EVERY)

    def loss(params):
        return task.training_loss(params, model_state, batch, key)[0]

    def step(carry):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state

    def block(carry, _):
        params, state, vector = carry
        after, state = step((params, state))  # the step that probes
        root = direction_parts(one_state_of(ScaleByAdamState, state, "scale_by_adam")).root
        eigenvalue, vector = largest_eigenvalue(loss, params, root, vector, iterations)
        found = ao.get_error_control(state)
        after, state = jax.lax.fori_loop(1, EVERY, lambda _, carry: step(carry), (after, state))
        return (after, state, vector), (loss(params), found.learning_rate, found.curvature, eigenvalue)

    keys = optax.tree.split_key_like(jax.random.key(2), params)
    vector = jax.tree.map(lambda k, x: jax.random.normal(k, x.shape), keys, params)
    scanned = jax.jit(lambda carry: jax.lax.scan(block, carry, length=steps // EVERY)[1])
    losses, rates, curvatures, eigenvalues = map(np.asarray, scanned((params, tx.init(params), vector)))
    return [
        {
            "step": i * EVERY,
            "loss": float(losses[i]),
            "learning_rate": float(rates[i]),
            "along_direction": _edge(curvatures[i]),
            "largest": _edge(eigenvalues[i]),
        }
        for i in range(len(rates))
    ]


def _edge(curvature: Any) -> float | None:
    return 2 / float(curvature) if np.isfinite(curvature) and curvature > 0 else None


def measure(quick: bool, advance: Callable[[str], None]) -> list[dict[str, Any]]:
    """Trains with both momenta; a quick run takes few steps without momentum."""
    rows = []
    for b1 in MOMENTA[: 1 if quick else None]:
        advance(f"edge: b1 {b1:g}")
        rows.append(
            {"b1": b1, "points": trajectory(b1, 60, 3) if quick else trajectory(b1, STEPS, ITERATIONS)}
        )
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    """Draws the three curves, one panel per momentum, for light and dark."""
    return {f"error_control_edge_{theme}": _figure(rows, theme) for theme in THEMES}


def _figure(rows: list[dict[str, Any]], theme: str) -> Figure:
    colours = THEMES[theme]
    figure = Figure(figsize=(4.6, 0.9 + 2.4 * len(rows)), layout="constrained", facecolor=colours.paper)
    panels = np.ravel(figure.subplots(len(rows), 1))
    for axes, row in zip(panels, rows, strict=True):
        points = row["points"]
        steps = np.array([point["step"] for point in points])
        dress(axes, colours, f"Adam, b1 = {row['b1']:g}, all samples in a batch", "step")
        drawn = []
        for (name, label), colour, line in zip(CURVES.items(), PALETTE, LINES, strict=False):
            y = np.array([np.nan if point[name] is None else point[name] for point in points])
            axes.plot(steps, y, color=colour, linestyle=line, linewidth=1.3, label=label)
            drawn.append(y[len(y) // 20 :])  # the first steps of the warm-up would hide the rest
        set_range(axes, float(np.nanmin(drawn)), float(np.nanmax(drawn)))
        set_step_axis(axes, steps)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", frameon=False, labelcolor=colours.ink, fontsize="small"
    )
    return figure
