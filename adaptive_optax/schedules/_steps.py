"""Arithmetic on step counts that stays exact where float32 does not: past 2**24 steps, and in long powers.

A float32 holds integers only up to 2**24, so a count is divided, compared and subtracted as an integer, and
only what is left (a position within a phase, a fraction of a period) becomes a float. Counts may also be
floats, for example a fractional number of epochs; then the same operations are done on floats.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._precision import concrete

MAX_STEPS = 2**31 - 1  # the largest value of optax's int32 counters

Number: TypeAlias = float | jax.Array
"""A Python number, or a tracer of the default float type."""


def as_real(value: Any) -> jax.Array:
    """Returns `value` as an array of the default float type, never weakly typed."""
    return jnp.asarray(value, jnp.result_type(float))


def as_number(value: Any) -> Number:
    """Returns a concrete scalar as a Python float, which no later step rounds before it must, or a tracer."""
    known = concrete(value)
    return as_real(value) if known is None else known


def as_count(count: Any) -> jax.Array:
    """Returns a count as an array of the default integer or float type, at least 0.

    Raises:
        TypeError: If `count` is neither an integer nor a float.
    """
    if not isinstance(count, jax.Array):
        count = np.asarray(count)
    if jnp.issubdtype(count.dtype, jnp.floating):
        return jnp.maximum(as_real(count), 0.0)
    if not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"A count must be an integer or a float, got an array of type {count.dtype}.")
    dtype = jnp.result_type(int)
    if jnp.iinfo(count.dtype).max > jnp.iinfo(dtype).max:
        count = count.clip(max=jnp.iinfo(dtype).max)  # saturates, as optax's counters do; a cast would wrap
    return jnp.maximum(jnp.asarray(count, dtype), 0)


def whole_steps(position: Number) -> Number:
    """Returns the number of whole steps before a position in the run: 0 for one before its beginning."""
    if isinstance(position, jax.Array):
        return jnp.maximum(jnp.floor(position), 0.0)
    return max(math.floor(position), 0)


def steps_since(position: Number, count: jax.Array) -> jax.Array:
    """Returns `count - position` with the right sign at any count, for a `position` between two steps too."""
    whole = whole_steps(position)
    fraction = position - whole
    # The difference of integers is exact and the fraction below 1, so rounding never changes the sign; and
    # neither integer is negative, so their difference fits even at the last int32.
    return as_real(count - jnp.asarray(whole, count.dtype)) - as_real(fraction)


def power(base: Number, steps: jax.Array, per: int = 1) -> jax.Array:
    """Returns `base ** (steps / per)` to a few rounding errors, however many the steps.

    A float32 base is off by up to 6e-8, which the exponent multiplies: 0.999 ** 1000 would be off by 1e-5.
    So the whole part of the exponent is taken by its binary digits, from a table of `base ** 2**k` made in
    float64 (for a traced base in its own precision), and only the fraction is left to `jnp.power`.
    """
    whole = (steps // per).astype(jnp.result_type(int))
    bits = jnp.iinfo(whole.dtype).bits - 1
    places = 2.0 ** np.arange(bits)
    if isinstance(base, jax.Array):
        table = jnp.power(as_real(base), as_real(places))
    else:
        with np.errstate(over="ignore", under="ignore"):  # entries past the range belong to digits that are 0
            table = as_real(np.power(base, places).astype(jnp.result_type(float)))
    digits = (whole[..., None] >> jnp.arange(bits, dtype=whole.dtype)) & 1
    result = jnp.prod(jnp.where(digits == 1, table, 1.0), axis=-1)
    if per == 1 and jnp.issubdtype(steps.dtype, jnp.integer):
        return result
    return result * jnp.power(as_real(base), as_real(steps % per) / per)
