"""Rounding to fewer bits, to nearest and stochastically, and the random bits that the latter takes.

The bits come from an integer hash of where a value stands and which step it is. They need no key in a state,
are the same on any sharding and after any restart, and cost a few integer operations a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

# The multipliers of a 32-bit finaliser with low bias (Wellons 2018, "lowbias32").
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_GOLDEN = 0x9E3779B9
_PARAMETER = 0x85EBCA6B  # tells parameters from moments of the same leaf


def _shifted_xor(x: jax.Array, by: int) -> jax.Array:
    return x ^ jax.lax.shift_right_logical(x, np.uint32(by))


def _finalise(x: jax.Array, between: Any = 0) -> jax.Array:
    """Mixes all bits of x into each; `between` is xored in halfway."""
    x = _shifted_xor(x, 16) * np.uint32(_FIRST)
    x = _shifted_xor(x ^ between, 15) * np.uint32(_SECOND)
    return _shifted_xor(x, 16)


def random_bits(
    shape: tuple[int, ...], count: jax.Array, leaf: Any, role: Literal["mu", "nu", "parameter"], seed: int = 0
) -> jax.Array:
    """Returns 16 random bits for each coordinate of an array, as uint32.

    Args:
        shape: The array's shape; the global one where it is sharded.
        count: The number of the step.
        leaf: The array's number in its tree, an int or an integer scalar.
        role: What they are for. The two moments take a half each of one and the same hash.
        seed: Tells apart uses that share all of the above.
    """
    count = count.astype(jnp.uint32)
    seed += _PARAMETER if role == "parameter" else 0
    place = jnp.asarray(leaf, jnp.uint32) * np.uint32(_GOLDEN) + np.uint32(seed % 2**32)
    stream = _finalise(place ^ _finalise(count + np.uint32(_GOLDEN)))
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
    # Entering twice, the stream permutes the coordinates' bits rather than shift them along.
    bits = _finalise(index + stream, _finalise(stream))
    return jax.lax.shift_right_logical(bits, np.uint32(16)) if role == "nu" else bits & np.uint32(0xFFFF)


def as_uniform(bits: jax.Array) -> jax.Array:
    """Returns 16 random bits as float32 in (0, 1), on the midpoints of 2**16 cells."""
    return (bits.astype(jnp.float32) + 0.5) * np.float32(2.0**-16)


def is_low_precision(x: Any) -> bool:
    """Says whether a leaf has fewer bits than the float32 in which it is computed."""
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32


def round_to_nearest(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns float32 values rounded to what `dtype` can hold, still as float32.

    Not by casting there and back, which XLA may take out.
    """
    limits = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, limits.nexp, limits.nmant)
    return _below_normal(x, limits, jnp.round, rounded)


def round_stochastically(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
    """Returns float32 values rounded to a neighbour in `dtype`, still as float32, unbiased.

    A value that `dtype` holds stays. Finite values stay finite: beyond the largest number they become it.

    Args:
        x: float32.
        dtype: bfloat16 or float16.
        bits: 16 random bits for each value.
    """
    limits = jnp.finfo(dtype)
    dropped = 23 - limits.nmant
    kept = np.uint32(2**32 - 2**dropped)
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.lax.shift_right_logical(bits, np.uint32(16 - dropped))
    rounded = jax.lax.bitcast_convert_type((pattern + noise) & kept, jnp.float32)

    def whole(steps):
        below = jnp.floor(steps)  # not floor(steps + uniform), a sum that rounds up to the next step
        return jnp.where(as_uniform(bits) < steps - below, below + 1, below)

    rounded = _below_normal(x, limits, whole, rounded)
    largest = float(limits.max)
    return jnp.where(jnp.isfinite(x), jnp.clip(rounded, -largest, largest), x)


def _below_normal(x: jax.Array, limits: Any, whole: Callable[[jax.Array], jax.Array], rounded: Any) -> Any:
    """Rounds what is below the smallest normal number of a narrower range to its even grid by `whole`."""
    if limits.minexp <= -126:  # bfloat16's range is float32's
        return rounded
    spacing = float(limits.smallest_subnormal)
    magnitude = whole(jnp.abs(x) / spacing) * spacing
    return jnp.where(jnp.abs(x) < float(limits.tiny), jnp.copysign(magnitude, x), rounded)
