"""Reducing the learning rate when a metric stops improving."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from adaptive_optax._core.checks import check_choice, check_flag, check_integer
from adaptive_optax._core.foresight import Magnitudes
from adaptive_optax._core.overrides import filled_like
from adaptive_optax._core.precision import incremented, scalar_dtype, scaled, widen
from adaptive_optax._core.ranges import check_hyperparameter, check_members
from adaptive_optax._core.state_check import check_state
from adaptive_optax._core.states import carries_hyperparameters
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Count, Scalar

Mode = Literal["min", "max"]
"""Whether a lower or a higher metric is better."""

Preset = Literal["optax", "torch", "keras"]
"""The library whose rule `reduce_on_plateau` follows."""

_MISSING = object()


def _set_scale(state: Any, name: str, value: Any) -> Any:
    scale = 1.0 if value is None else value
    check_members(name, scale, state.scale, "reduce_on_plateau")
    return state._replace(scale=filled_like(state.scale, scale))


@carries_hyperparameters("scale", set_value=_set_scale)
class ReduceOnPlateauState(NamedTuple):
    """State of `reduce_on_plateau`.

    Attributes:
        count: Number of steps taken.
        scale: The factor on updates. If you set it, it continues to fall from the new value.
        best: The best metric so far; initially the worst finite number of its dtype, so that
            `jax_debug_infs` does not raise.
        total: Sum of the finite metrics in the current window.
        spoiled: Number of non-finite metrics in the current window.
        filled: Number of metrics in the current window.
        bad: Number of windows without improvement.
        cooldown: Number of coming windows that cannot count as bad.
    """

    count: Count
    scale: Scalar
    best: Scalar
    total: Scalar
    spoiled: Count
    filled: Count
    bad: Count
    cooldown: Count


def reduce_on_plateau(
    factor: ArrayLike = 0.1,
    patience: int = 10,
    rtol: ArrayLike = 1e-4,
    atol: ArrayLike = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: ArrayLike = 0.0,
    *,
    mode: Mode = "min",
    preset: Preset = "optax",
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by a scale that falls when a metric stops improving.

    Put it after the learning rate and pass the metric to every update: `update(updates, state, params,
    value=loss)`, `nnx.Optimizer.update(model, grads, value=loss)`, or
    `integrations.flax.TrainState.apply_gradients(grads=grads, value=loss)`. Metrics are averaged over
    windows of `accumulation_size`; everything below refers to windows.

    Pass a metric that is measured once per epoch, such as a validation loss, once: with the first update
    after the measurement. Pass `value=None` to the other updates; they do not change the scale and count
    nothing. The scale then falls when PyTorch's ReduceLROnPlateau, stepped at the end of each epoch, lowers
    its learning rate. (If you passed the last value again at each step, every step would count as a bad
    window.) In a scan, where every step takes the same arguments, `is_new` says whether `value` is new.

    For such a metric, the plateau must be outside any wrapper that may withhold a step, as in
    `optax.chain(reject_nonfinite(inner), reduce_on_plateau())`. Inside `reject_nonfinite` and
    `dynamic_loss_scale` the metric is lost if the step is rejected, and inside `accumulate_gradients` it only
    sees the metric of the micro-batch that completes an emission.

    A metric x improves on the best b if $x < b - \text{rtol} |b| - \text{atol}$ (with `mode="max"`,
    if $x > b + \text{rtol} |b| + \text{atol}$). A window with a NaN or an infinity does not improve.
    The originals multiply b by 1 - rtol instead. For positive metrics that is the same; for negative ones it
    counts some worse values as improvements.

    The presets fire on the same windows as the originals:

    | preset    | the scale falls after      | in the last window of a cooldown |
    | --------- | -------------------------- | -------------------------------- |
    | `"optax"` | `patience` bad windows     | a bad window does not count      |
    | `"torch"` | `patience` + 1 bad windows | a bad window does not count      |
    | `"keras"` | `patience` bad windows     | a bad window counts              |

    Only metrics change the scale; nothing of a NaN in the updates is kept.

    The presets do not set defaults: Keras has `patience=10, rtol=0, atol=1e-4` (its `min_delta`), PyTorch has
    the defaults here. PyTorch also skips changes of the learning rate that are smaller than 1e-8.

    Args:
        factor: The factor by which the scale falls, in (0, 1).
        patience: See the table; an integer, at least 1 for "optax" and "keras", at least 0 for "torch".
        rtol: The relative improvement that counts, at least 0.
        atol: The absolute improvement that counts, in the metric's units, at least 0.
        cooldown: The number of windows after a fall in which bad ones are not counted, at least 0.
        accumulation_size: The number of metrics in a window, at least 1.
        min_scale: The lower limit of the scale, in [0, 1]: `min_lr` of PyTorch or Keras over the learning
            rate.
        mode: Whether the metric should become small, "min", or large, "max".
        preset: "optax", "torch" or "keras".

    Returns:
        The transformation. `update` needs the keyword `value`, a real scalar or None. It also takes `is_new`,
        a bool that may be traced; if it is False, `value` is ignored, as for None.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init), or
            `value` is missing or not a scalar, or `is_new` is not a bool (at update).

    State cost: eight scalars.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp, optax
        >>> tx = optax.chain(ao.sgd(1.0), ao.reduce_on_plateau(factor=0.5, patience=2))
        >>> state = tx.init(jnp.ones(1))
        >>> for loss in (3.0, 2.0, 2.0, 2.0):
        ...     updates, state = tx.update(jnp.ones(1), state, value=loss)
        >>> updates.tolist(), ao.get_hyperparams(state)["scale"].item()
        ([-0.5], 0.5)

        Once per epoch:

        >>> state, validation_loss = tx.init(jnp.ones(1)), None
        >>> for epoch in range(4):
        ...     for step in range(5):
        ...         value = validation_loss if step == 0 else None
        ...         updates, state = tx.update(jnp.ones(1), state, value=value)
        ...     validation_loss = 2.0
        >>> ao.get_hyperparams(state)["scale"].item()
        0.5

    Source: PyTorch's ReduceLROnPlateau, Keras's ReduceLROnPlateau and optax.contrib.reduce_on_plateau.
    """
    check_hyperparameter("factor", factor)
    check_choice("mode", mode, ("min", "max"))
    check_choice("preset", preset, ("optax", "torch", "keras"))
    check_integer("patience", patience, "[0, inf)" if preset == "torch" else "[1, inf)")
    check_hyperparameter("rtol", rtol)
    check_hyperparameter("atol", atol)
    check_integer("cooldown", cooldown, "[0, inf)")
    check_integer("accumulation_size", accumulation_size, "[1, inf)")
    check_hyperparameter("min_scale", min_scale)
    sign = 1 if mode == "min" else -1
    limit = patience + 1 if preset == "torch" else patience

    def init_fn(params):
        dtype = scalar_dtype(params)

        def integer():
            return jnp.zeros((), jnp.int32)

        return ReduceOnPlateauState(
            count=integer(),
            scale=jnp.ones((), dtype),
            best=jnp.full((), sign * jnp.finfo(dtype).max, dtype),
            total=jnp.zeros((), dtype),
            spoiled=integer(),
            filled=integer(),
            bad=integer(),
            cooldown=integer(),
        )

    def update_fn(updates, state, params=None, *, value: Any = _MISSING, is_new: Any = True, **extra_args):
        del params, extra_args
        check_state("reduce_on_plateau", state, init_fn, "updates", updates)
        if value is _MISSING:
            raise ValueError(
                "reduce_on_plateau needs the metric: update(updates, state, params, value=loss); "
                "use value=None if there is no new one."
            )
        check_flag("is_new", is_new)
        if value is None:
            state = state._replace(count=incremented(state.count))
            return scaled(widen(updates), state.scale), state
        metric = value if isinstance(value, jax.Array) else np.asarray(value)  # a NaN is a valid metric
        if metric.ndim or not any(jnp.issubdtype(metric.dtype, kind) for kind in (np.floating, np.integer)):
            raise ValueError(f"value must be a real scalar, got {value!r}.")
        dtype = state.scale.dtype
        metric = jnp.asarray(metric, dtype)
        new, finite = jnp.asarray(is_new), jnp.isfinite(metric)
        total = state.total + jnp.where(new & finite, metric, 0)
        spoiled = state.spoiled + (new & ~finite).astype(jnp.int32)
        filled = state.filled + new.astype(jnp.int32)
        full = new & (filled == accumulation_size)
        mean = total / accumulation_size

        # With signs such that less is better. The first finite metric always improves.
        best, x = sign * state.best, sign * mean
        has_best = jnp.abs(best) < jnp.finfo(dtype).max
        size = jnp.where(has_best, jnp.abs(best), 0)
        improves = (~has_best | (x < best - (rtol * size + atol))) & (spoiled == 0) & jnp.isfinite(x)
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

    return transformation("reduce_on_plateau", init_fn, update_fn, growth=_growth)


def _growth(given: Magnitudes, state: ReduceOnPlateauState) -> tuple[jax.Array, jax.Array]:
    return given.updates * jnp.abs(state.scale), given.state
