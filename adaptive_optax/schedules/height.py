"""How high a schedule is: its peak, and its mean."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_optax._core.values import value_at

# A schedule does not say how long it is. Counts are as dense as 1 in 270, so that a peak of any length of
# run is missed by less than 1 %.
_COUNTS = np.unique(np.concatenate([np.arange(256), np.geomspace(256, 2**24, 3001).astype(np.int32)]))
_SAME = 1e-6  # as a fraction of the peak


def peak_and_mean(schedule: optax.Schedule, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the largest value of a schedule, and its mean over the steps until it stops changing.

    If it stops at a value above that mean, as after a warm-up, the mean is that value: the run may go on for
    as long as it likes.

    Examples:
        >>> import jax.numpy as jnp, optax
        >>> peak, mean = peak_and_mean(optax.linear_schedule(0.2, 0.0, 1000), jnp.float32)
        >>> round(peak.item(), 3), round(mean.item(), 3)
        (0.2, 0.1)

    Args:
        schedule: A function of the step count that runs under `jax.vmap`.
        dtype: The dtype of the results.

    Raises:
        ValueError: If the schedule cannot be traced.
    """
    try:
        values = jax.vmap(lambda count: value_at(schedule, count, dtype))(jnp.asarray(_COUNTS, jnp.int32))
    except TypeError as error:  # of tracers that are used as numbers
        raise ValueError(
            f"The shape of a schedule is found by jax.vmap, under which {schedule!r} does not run: use "
            "jax.numpy, jnp.where in place of `if`, and no float(); or follow_schedule=False."
        ) from error
    peak = jnp.max(values)
    changes = jnp.abs(values - values[-1]) > _SAME * peak
    last = jnp.max(jnp.where(changes, jnp.arange(len(_COUNTS)), -1))
    widths = np.diff(_COUNTS).astype(dtype)
    is_inside = jnp.arange(len(widths)) <= last
    areas = jnp.where(is_inside, (values[1:] + values[:-1]) / 2 * widths, 0)
    whole = jnp.sum(jnp.where(is_inside, widths, 0))
    mean = jnp.where(last < 0, peak, jnp.sum(areas) / jnp.maximum(whole, 1))
    return peak, jnp.maximum(mean, values[-1])
