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


def root_of_squares(sum_of_squares: Callable[[Any], jax.Array], size: int) -> jax.Array:
    """Returns the root of a sum of squares, right from 1e-30 to 1e30 in float32. Inf and NaN propagate.

    Args:
        sum_of_squares: Returns the sum, given a factor by which to scale the values before they are squared.
        size: The number of values.
    """
    plain = sum_of_squares(1.0)
    dtype = plain.dtype
    shift = 2.0**80 if dtype == jnp.float32 else 2.0**600

    def scaled_root():
        factor = jnp.where(jnp.isinf(plain), jnp.asarray(1 / shift, dtype), jnp.asarray(shift, dtype))
        return jnp.sqrt(sum_of_squares(factor)) / factor

    return jax.lax.cond(is_safe(plain, size) | jnp.isnan(plain), lambda: jnp.sqrt(plain), scaled_root)
