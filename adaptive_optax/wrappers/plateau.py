"""The learning rate drops when a metric stalls."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._checks import (
    check_choice,
    check_inexact,
    check_integer,
    check_scalar,
    check_state,
)
from adaptive_optax._precision import incremented, scalar_dtype, scaled, widen

Mode = Literal["min", "max"]
Preset = Literal["optax", "torch", "keras"]


class ReduceOnPlateauState(NamedTuple):
    """State of `reduce_on_plateau`. The scalars are float32, or float64 if a parameter is.

    Attributes:
        count: Number of steps taken, int32 scalar.
        scale: The factor on updates; it may be set, and falls on from there.
        best: The best metric so far, infinitely bad before the first.
        total: Sum of the finite metrics in the window that is being filled.
        spoiled: Number of those that are not finite, int32 scalar.
        filled: Number of metrics in it, int32 scalar.
        bad: Number of windows without improvement, int32 scalar.
        cooldown: Windows for which none counts as bad, int32 scalar.
    """

    count: jax.Array
    scale: jax.Array
    best: jax.Array
    total: jax.Array
    spoiled: jax.Array
    filled: jax.Array
    bad: jax.Array
    cooldown: jax.Array

    hyperparameters = ("scale",)  # not a field: it has no annotation


def reduce_on_plateau(
    factor: float = 0.1,
    patience: int = 10,
    rtol: float = 1e-4,
    atol: float = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: float = 0.0,
    *,
    mode: Mode = "min",
    preset: Preset = "optax",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by a scale that falls when a metric no longer improves.

    Put it behind the learning rate and pass the metric to every update: `update(updates, state, params,
    value=loss)`, `nnx.Optimizer.update(model, grads, value=loss)`, or
    `integrations.flax.TrainState.apply_gradients(grads=grads, value=loss)`. Metrics are averaged over
    windows of `accumulation_size`; everything below speaks of windows.

    A metric x improves on the best b if :math:`x < b - \text{rtol} |b| - \text{atol}` (with `mode="max"`,
    if :math:`x > b + \text{rtol} |b| + \text{atol}`). A window with a NaN or an infinity does not improve.
    The originals multiply b by 1 - rtol instead, which is the same for positive metrics and takes worse
    negative ones for better.

    The presets fire on the same windows as the originals:

    =========  ==============================  ========================================================
    preset     the scale falls when            in the last window of a cooldown
    =========  ==============================  ========================================================
    `optax`    `patience` windows were bad     a bad one does not count
    `torch`    `patience` + 1 windows were     a bad one does not count
    `keras`    `patience` windows were bad     a bad one counts
    =========  ==============================  ========================================================

    The presets set no defaults: Keras's own are `patience=10, rtol=0, atol=1e-4` (its `min_delta`), PyTorch's
    those here. PyTorch also leaves a rate alone that would change by less than 1e-8.

    Args:
        factor: On the scale at each fall, in (0, 1).
        patience: As in the table, an integer; at least 1 for "optax" and "keras", 0 for "torch".
        rtol: The relative improvement that counts, at least 0.
        atol: The absolute improvement that counts, in the metric's units, at least 0.
        cooldown: Windows after a fall in which bad ones are not counted, at least 0.
        accumulation_size: Metrics in a window, at least 1.
        min_scale: The scale does not fall below it; in [0, 1].
        mode: Whether the metric is to be small, "min", or large, "max".
        preset: "optax", "torch" or "keras".

    Returns:
        The transformation. `update` needs the keyword `value`, a real scalar. Updates are float32 or wider.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init), or
            `value` is missing or no scalar (at update).

    State cost: eight scalars.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.sgd(1.0), ao.reduce_on_plateau(factor=0.5, patience=2))
        >>> state = tx.init(jnp.ones(1))
        >>> for loss in (3.0, 2.0, 2.0, 2.0):
        ...     updates, state = tx.update(jnp.ones(1), state, value=loss)
        >>> updates.tolist(), ao.get_hyperparams(state)["scale"].item()
        ([-0.5], 0.5)

    Source: PyTorch's ReduceLROnPlateau, Keras's ReduceLROnPlateau and optax.contrib.reduce_on_plateau.
    """
    check_scalar("factor", factor, "(0, 1)")
    check_choice("mode", mode, ("min", "max"))
    check_choice("preset", preset, ("optax", "torch", "keras"))
    check_integer("patience", patience, "[0, inf)" if preset == "torch" else "[1, inf)")
    check_scalar("rtol", rtol, "[0, inf)")
    check_scalar("atol", atol, "[0, inf)")
    check_integer("cooldown", cooldown, "[0, inf)")
    check_integer("accumulation_size", accumulation_size, "[1, inf)")
    check_scalar("min_scale", min_scale, "[0, 1]")
    sign = 1 if mode == "min" else -1
    limit = patience + 1 if preset == "torch" else patience

    def init_fn(params):
        check_inexact("reduce_on_plateau", "params", params)
        dtype = scalar_dtype(params)

        def integer():
            return jnp.zeros((), jnp.int32)

        return ReduceOnPlateauState(
            count=integer(),
            scale=jnp.ones((), dtype),
            best=jnp.full((), sign * jnp.inf, dtype),
            total=jnp.zeros((), dtype),
            spoiled=integer(),
            filled=integer(),
            bad=integer(),
            cooldown=integer(),
        )

    def update_fn(updates, state, params=None, *, value: Any = None, **extra_args):
        del params, extra_args
        check_state("reduce_on_plateau", state, ReduceOnPlateauState)
        check_inexact("reduce_on_plateau", "updates", updates)
        if value is None:
            raise ValueError(
                "reduce_on_plateau needs the metric: update(updates, state, params, value=loss)."
            )
        metric = value if isinstance(value, jax.Array) else np.asarray(value)  # a NaN is a metric too
        if metric.ndim or not any(jnp.issubdtype(metric.dtype, kind) for kind in (np.floating, np.integer)):
            raise ValueError(f"value must be a real scalar, got {value!r}.")
        dtype = state.scale.dtype
        metric = jnp.asarray(metric, dtype)
        total = state.total + jnp.where(jnp.isfinite(metric), metric, 0)
        spoiled = state.spoiled + (~jnp.isfinite(metric)).astype(jnp.int32)
        filled = state.filled + 1
        full = filled == accumulation_size
        mean = total / accumulation_size

        # In the direction in which less is better. An infinite best has no tolerance.
        best, x = sign * state.best, sign * mean
        size = jnp.where(jnp.isfinite(best), jnp.abs(best), 0)
        tolerance = jnp.where(jnp.isfinite(best), rtol * size + atol, 0)
        improves = (x < best - tolerance) & (spoiled == 0)
        cooling = state.cooldown > 0
        cooldown_left = jnp.maximum(state.cooldown - 1, 0)
        if preset == "keras":
            cooling = cooldown_left > 0
        bad = jnp.where(improves | cooling, 0, state.bad + 1)
        falls = full & (bad >= limit)
        lower = jnp.minimum(state.scale, jnp.maximum(state.scale * factor, min_scale))

        def when_full(new, old):
            return jnp.where(full, new, old).astype(old.dtype)

        state = ReduceOnPlateauState(
            count=incremented(state.count),
            scale=jnp.where(falls, lower, state.scale),
            best=when_full(jnp.where(improves, mean, state.best), state.best),
            total=jnp.where(full, 0, total),
            spoiled=when_full(0, spoiled),
            filled=when_full(0, filled),
            bad=when_full(jnp.where(falls, 0, bad), state.bad),
            cooldown=when_full(jnp.where(falls, cooldown, cooldown_left), state.cooldown),
        )
        return scaled(widen(updates), state.scale), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
