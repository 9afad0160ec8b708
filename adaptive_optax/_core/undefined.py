"""NaN for undefined values, without triggering `jax_debug_nans`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def nan_unless(defined: Any, value: Any) -> jax.Array:
    """Returns a value where it is defined, else NaN.

    States hold no NaN; this is for values derived from them. Under `jax_debug_nans` no compiled function can
    return a NaN, so while tracing the lowest finite number represents it; `or_nan` converts it back.
    """
    value = jnp.asarray(value)
    if isinstance(value, Tracer) or isinstance(defined, Tracer):
        if jax.config.jax_debug_nans:  # pyright: ignore[reportAttributeAccessIssue] (added at run time)
            return lowest_unless(defined, value)
        return jnp.where(defined, value, jnp.asarray(np.nan, value.dtype))
    with jax.debug_nans(False):
        return jnp.where(defined, value, jnp.asarray(np.nan, value.dtype))


def lowest_unless(defined: Any, value: jax.Array) -> jax.Array:
    """Returns a value where it is defined, else the lowest finite number, which `or_nan` converts to NaN."""
    return jnp.where(defined, value, jnp.asarray(jnp.finfo(value.dtype).min, value.dtype))


def or_nan(value: np.ndarray) -> np.ndarray:
    """Returns host values with NaN in place of the lowest finite number, which represented it."""
    return np.where(value == np.finfo(value.dtype).min, np.nan, value).astype(value.dtype)
