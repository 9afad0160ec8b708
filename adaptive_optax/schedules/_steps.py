"""Arithmetic on step counts that stays exact where float32 does not: beyond 2**24 steps, and in high powers.

float32 represents all integers only up to 2**24. A count is therefore divided, compared and subtracted as an
integer, and only the remainder (a position within a phase, a fraction of a period) becomes a float. Counts
may also be floats, for example a fractional number of epochs; the same operations then use floats.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.values import static_value

MAX_STEPS = 2**31 - 1  # the largest value of optax's int32 counters

LONGEST_RATIO = 2**30  # the longest run whose steps `scaled_steps` divides exactly

Number: TypeAlias = float | jax.Array
"""A Python number, or a tracer of the default float type."""


def as_real(value: Any) -> jax.Array:
    """Returns `value` as an array of the default float type, never weakly typed."""
    return jnp.asarray(value, jnp.result_type(float))


def as_number(value: Any) -> Number:
    """Returns a concrete scalar as a Python float, so that it is rounded as late as possible, or a tracer."""
    known = static_value(value)
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
        count = count.clip(max=jnp.iinfo(dtype).max)  # saturates like optax's counters; a cast would wrap
    return jnp.maximum(jnp.asarray(count, dtype), 0)


def whole_steps(position: Number) -> Number:
    """Returns the number of whole steps before a position in the run; 0 if it is before the start."""
    if isinstance(position, jax.Array):
        return jnp.maximum(jnp.floor(position), 0.0)
    return max(math.floor(position), 0)


def steps_since(position: Number, count: jax.Array) -> jax.Array:
    """Returns `count - position` with the correct sign at any count, even if `position` is fractional."""
    whole = whole_steps(position)
    fraction = position - whole
    # The difference of integers is exact and the fraction is below 1, so rounding never changes the sign.
    # Neither integer is negative, so their difference fits even at the largest int32.
    return as_real(count - jnp.asarray(whole, count.dtype)) - as_real(fraction)


def scaled_steps(steps: jax.Array, numerator: int, denominator: int) -> tuple[jax.Array, jax.Array]:
    """Returns the integer part of `steps * numerator / denominator`, exact for integers, and the fraction.

    Both numbers are at most `LONGEST_RATIO`, and steps at most the denominator. The product has up to 60
    bits, more than an int32 has, so it is divided bit by bit as on paper.
    """
    if jnp.issubdtype(steps.dtype, jnp.floating):
        position = steps * (numerator / denominator)
        whole = jnp.floor(position)
        return whole, position - whole
    wide, rest = steps.astype(jnp.uint32), jnp.zeros_like(steps, jnp.uint32)
    whole = jnp.zeros_like(rest)
    for bit in reversed(range(LONGEST_RATIO.bit_length())):
        # Below 2 * denominator + numerator, which fits. A numerator above the denominator is divided, too.
        rest = 2 * rest + jnp.where((wide >> bit) & 1 == 1, jnp.uint32(numerator), jnp.uint32(0))
        whole = 2 * whole + rest // jnp.uint32(denominator)
        rest = rest % jnp.uint32(denominator)
    return whole.astype(steps.dtype), as_real(rest) / denominator


def power(base: Number, steps: jax.Array, per: int = 1) -> jax.Array:
    """Returns `base ** (steps / per)` to within a few rounding errors, for any number of steps.

    A float32 base has an error of up to 6e-8, which the exponent multiplies: 0.999 ** 1000 would be off by
    1e-5. The integer part of the exponent is therefore applied bit by bit, with a table of `base ** 2**k`
    computed in float64 (in its own precision for a traced base), and only the fraction uses `jnp.power`.
    """
    whole = (steps // per).astype(jnp.result_type(int))
    bits = jnp.iinfo(whole.dtype).bits - 1
    places = 2.0 ** np.arange(bits)
    if isinstance(base, jax.Array):
        table = jnp.power(as_real(base), as_real(places))
    else:
        with np.errstate(over="ignore", under="ignore"):  # entries that overflow belong to digits that are 0
            table = as_real(np.power(base, places).astype(jnp.result_type(float)))
    digits = (whole[..., None] >> jnp.arange(bits, dtype=whole.dtype)) & 1
    result = jnp.prod(jnp.where(digits == 1, table, 1.0), axis=-1)
    if per == 1 and jnp.issubdtype(steps.dtype, jnp.integer):
        return result
    return result * jnp.power(as_real(base), as_real(steps % per) / per)
