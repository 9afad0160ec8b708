"""When a sum of squares can be trusted: it has neither overflowed nor lost squares that are flushed to 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def is_safe(sum_of_squares: jax.Array, size: Any) -> jax.Array:
    """Whether a sum of squares of unscaled values is accurate; otherwise the values have to be scaled.

    Squares below the smallest normal number are flushed to 0. Together they are less than the rounding error
    of any sum above `lowest`. Below it they may matter, and so may overflow.

    Args:
        sum_of_squares: The sum.
        size: The number of values in it.
    """
    limits = jnp.finfo(sum_of_squares.dtype)
    lowest = float(limits.tiny) / float(limits.eps) * size
    return (sum_of_squares >= lowest) & (sum_of_squares < jnp.inf)


def root_of_squares(
    sum_of_squares: Callable[[Any, Any], jax.Array], arrays: Any, size: int, dtype: Any
) -> jax.Array:
    """Returns the root of a sum of squares, right from 1e-30 to 1e30 in float32. Inf and NaN propagate.

    A sum that overflows or underflows is repeated with scaled values. That is a loop, so that the program
    contains the sum, and on several devices the all-reduce, only once.

    Args:
        sum_of_squares: Returns the sum, given a factor by which to scale the values before they are squared,
            and the arrays.
        arrays: The values, a tree.
        size: The number of values.
        dtype: The dtype of the sum.
    """
    shift = 2.0**80 if dtype == jnp.float32 else 2.0**600

    def scaled_root(arrays):
        """The root in units of 1 / factor, and the factor."""

        def attempt(state):
            tries, _, total = state
            scaling = jnp.where(jnp.isinf(total), jnp.asarray(1 / shift, dtype), jnp.asarray(shift, dtype))
            factor = jnp.where(tries == 0, jnp.ones((), dtype), scaling)
            return tries + 1, factor, sum_of_squares(factor, arrays)

        def is_unfinished(state):
            tries, _, total = state
            return (tries == 0) | ((tries == 1) & ~(is_safe(total, size) | jnp.isnan(total)))

        start = jnp.zeros((), jnp.int32), jnp.ones((), dtype), jnp.zeros((), dtype)
        _, factor, total = jax.lax.while_loop(is_unfinished, attempt, start)
        return jnp.sqrt(total), factor

    @jax.custom_jvp
    def root(arrays):
        found, factor = scaled_root(arrays)
        return found / factor

    @root.defjvp
    def _(primals, tangents):
        found, factor = scaled_root(*primals)
        _, change = jax.jvp(lambda arrays: sum_of_squares(factor, arrays), primals, tangents)
        slope = change / (2 * jnp.where(found > 0, found, 1)) / factor
        return found / factor, slope

    return root(arrays)
