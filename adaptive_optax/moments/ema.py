"""Exponential moving averages with exact bias correction.

    x_t = b_t x_{t-1} + (1 - b_t) s_t,        w_t = b_t w_{t-1} + (1 - b_t),        x_0 = w_0 = 0

The weight w_t is the sum of the coefficients of s_1 .. s_t in x_t, so x_t / w_t is their weighted mean for
any sequence of decays. For a constant decay w_t = 1 - b^t.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.foresight import accepted, if_accepted
from adaptive_optax._core.precision import cast, scale
from adaptive_optax._core.values import static_value, value_at


class Decay(NamedTuple):
    """A decay b with its complement: `keep` = b and `take` = 1 - b, Python floats or scalar arrays.

    Both are kept because 1 - b loses digits in float32: for b = 0.999 it has a relative error of 1.3e-5. The
    complement of a Python number is computed in double precision.

    Attributes:
        keep: b.
        take: 1 - b.
        accepted: Whether the step is accepted, if that was decided before it; if not, averages of arrays
            keep their old values. None if it is accepted or not known yet.
    """

    keep: Any
    take: Any
    accepted: jax.Array | None = None


def decay_at(decay: Any, count: jax.Array, dtype: Any) -> Decay:
    """Evaluates a decay, a number or a schedule, at a step count."""
    known = static_value(decay)
    if known is not None:
        return Decay(known, 1.0 - known, accepted())
    value = value_at(decay, count, dtype)
    return Decay(value, 1 - value, accepted())


def ema(old: Any, new: Any, decay: Decay) -> Any:
    """Returns b old + (1 - b) new, leaf by leaf."""

    def leaf(old, new):
        dtype = np.promote_types(old.dtype, new.dtype)
        old, new = cast(old, dtype), cast(new, dtype)
        return if_accepted(decay.accepted, averaged(old, new), old)

    def averaged(old, new):
        if isinstance(decay.keep, float) and decay.keep >= 0.5:
            # The fixed point is `new` however the two factors are rounded; with b = 0.999 the other form
            # converges to a value 1.3e-5 off. Below 1/2 this form would lose a `new` much smaller than `old`.
            # Where `old` has overflowed, the difference has too, and their sum would be NaN instead of inf.
            return jnp.where(jnp.isinf(old), old + new, old + scale(new - old, decay.take))
        return kept(old, decay) + scale(new, decay.take)

    return jax.tree.map(leaf, old, new)


def kept(old: jax.Array, decay: Decay) -> jax.Array:
    """Returns b old, which is 0 for b = 0 even where `old` has overflowed."""
    if isinstance(decay.keep, float):
        return scale(old, decay.keep) if decay.keep else jnp.zeros_like(old)
    return scale(jnp.where(decay.keep == 0, jnp.zeros_like(old), old), decay.keep)


def ema_weight(weight: jax.Array, decay: Decay) -> jax.Array:
    """Returns w_t from w_{t-1}."""
    return ema(weight, jnp.ones_like(weight), decay._replace(accepted=None))


def weight_error(decay: Decay, dtype: Any) -> Any:
    """Returns a bound on the relative error of a weight due to rounding.

    A weight stops growing when a step would add less than half a unit in the last place.
    """
    return float(jnp.finfo(dtype).eps) / decay.take
