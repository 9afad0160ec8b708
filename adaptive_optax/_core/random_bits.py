"""Rounding to fewer bits, to nearest and stochastically, and the random bits for the latter.

The bits are an integer hash of a value's position and the step. They need no key in the state, are the same
under any sharding and after a restart, and cost a few integer operations per value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax._core.coordinates import coordinates

# The multipliers of a 32-bit finaliser with low bias (Wellons 2018, "lowbias32").
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_GOLDEN = 0x9E3779B9
_PARAMETER = 0x85EBCA6B  # distinguishes parameters from moments of the same leaf
_PAIRS = 0xC2B2AE35  # and the numbers of pairs of steps from bits of the same leaf


def _shifted_xor(x: jax.Array, by: int) -> jax.Array:
    return x ^ jax.lax.shift_right_logical(x, np.uint32(by))


def _finalise(x: jax.Array, between: Any = 0) -> jax.Array:
    """Mixes all bits of x; `between` is xored in halfway."""
    x = _shifted_xor(x, 16) * np.uint32(_FIRST)
    x = _shifted_xor(x ^ between, 15) * np.uint32(_SECOND)
    return _shifted_xor(x, 16)


def random_bits(
    shape: tuple[int, ...],
    count: jax.Array,
    place: Any,
    role: Literal["mu", "nu", "parameter"],
    seed: int = 0,
    *,
    sharding: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
    """Returns 16 random bits for each coordinate of an array, as uint32.

    Args:
        shape: The array's shape; its global shape if it is sharded, a shard's inside `jax.shard_map`.
        count: The number of the step.
        place: The leaf's element of `places`.
        role: What the bits are for. The two moments use the two halves of the same hash.
        seed: Distinguishes uses that share all of the above.
        sharding: The sharding of the bits if it is part of the array's type (`traced_sharding`). Without it
            every device would draw all bits.
    """
    seed += _PARAMETER if role == "parameter" else 0
    bits = _hashed(shape, count.astype(jnp.uint32), place, seed, sharding)
    return jax.lax.shift_right_logical(bits, np.uint32(16)) if role == "nu" else bits & np.uint32(0xFFFF)


def _hashed(
    shape: tuple[int, ...],
    count: jax.Array,
    place: Any,
    seed: int,
    sharding: jax.sharding.NamedSharding | None,
) -> jax.Array:
    """32 bits for each coordinate."""
    leaf, position = coordinates(shape, place, sharding)
    salted = leaf * np.uint32(_GOLDEN) + np.uint32(seed % 2**32)
    stream = _finalise(salted ^ _finalise(count + np.uint32(_GOLDEN)))
    # Used twice, so that another stream permutes the bits of the coordinates instead of shifting them.
    return _finalise(position + stream, _finalise(stream))


def antithetic_uniform(
    shape: tuple[int, ...],
    count: jax.Array,
    place: Any,
    *,
    sharding: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
    """Returns a float32 number in (0, 1) for each coordinate of an array; the next step's is 1/2 away.

    A step with an odd count has the numbers of the step before, moved by 1/2 modulo 1. A slow average that is
    rounded up where the number is small strays less with such pairs than with independent numbers: where two
    steps would go over the same edge with a small probability p each, the two of them do so once or not at
    all. The other side of it is that the second step cannot tell whether the first one did. An average that
    falls or rises by a share r per step does so by r (1 + r / 2); its limit is the same.

    The arguments are those of `random_bits`.
    """
    count = count.astype(jnp.uint32)
    pair, is_second = jax.lax.shift_right_logical(count, np.uint32(1)), count & np.uint32(1)
    bits = _hashed(shape, pair, place, _PAIRS, sharding) + jax.lax.shift_left(is_second, np.uint32(31))
    upper = jax.lax.shift_right_logical(bits, np.uint32(9))
    return (upper.astype(jnp.int32).astype(jnp.float32) + 0.5) * np.float32(2.0**-23)


def as_uniform(bits: jax.Array) -> jax.Array:
    """Returns 16 random bits as float32 in (0, 1), at the midpoints of 2**16 cells."""
    return (bits.astype(jnp.float32) + 0.5) * np.float32(2.0**-16)


def is_low_precision(x: Any) -> bool:
    """Whether a leaf has fewer bits than float32, in which it is computed."""
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32


def round_to_nearest(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds float32 values to the nearest value in `dtype`; the result is still float32.

    A cast to `dtype` and back would not do, because XLA may remove it.
    """
    limits = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, limits.nexp, limits.nmant)
    return _below_normal(x, limits, jnp.round, rounded)


def round_stochastically(x: jax.Array, dtype: Any, bits: jax.Array) -> jax.Array:
    """Rounds float32 values to a neighbour in `dtype` without bias; the result is still float32.

    Values that `dtype` represents are unchanged. Finite values stay finite: they saturate at the largest
    number.

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
        below = jnp.floor(steps)  # not floor(steps + uniform), because that sum may round up
        return jnp.where(as_uniform(bits) < steps - below, below + 1, below)

    rounded = _below_normal(x, limits, whole, rounded)
    largest = float(limits.max)
    return jnp.where(jnp.isfinite(x), jnp.clip(rounded, -largest, largest), x)


def _below_normal(x: jax.Array, limits: Any, whole: Callable[[jax.Array], jax.Array], rounded: Any) -> Any:
    """Rounds values below the smallest normal number of a narrow dtype to its uniform grid, with `whole`."""
    if limits.minexp <= -126:  # bfloat16 has float32's range
        return rounded
    spacing = float(limits.smallest_subnormal)
    magnitude = whole(jnp.abs(x) / spacing) * spacing
    return jnp.where(jnp.abs(x) < float(limits.tiny), jnp.copysign(magnitude, x), rounded)
