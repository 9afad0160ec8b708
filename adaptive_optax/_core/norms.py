"""When a sum of squares can be trusted: it has neither overflowed nor lost squares that are flushed to 0."""

from __future__ import annotations

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
