"""The maps of `Int8` up to format 2, for states that were saved with them. Nothing is written in them.

A block had a float scale, its largest magnitude, and the same map as all others. Signed codes were uniform
within each decade; second moments were stored as their roots on a logarithmic map of two parts.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive_optax.moments.blocks import spread_blocks

FORMATS = (1, 2)  # 1: blocks only along the last axis. The scales' shapes determine a leaf's blocks.


def decode_before(codes: jax.Array, scale: jax.Array, block_size: Any) -> jax.Array:
    """Returns the values of int8 codes (signed) or uint8 codes (second moments)."""
    scale = spread_blocks(scale, codes, block_size)
    code = codes.astype(scale.dtype)
    if codes.dtype == jnp.int8:
        return jnp.sign(code) * _signed_entry(jnp.abs(code)) * scale
    return _root_entry(code) * jnp.square(scale)


class _Decade(NamedTuple):
    """A piece of the signed map: its largest entry, that entry's code, and the spacing of its entries."""

    top: float
    last: float
    width: float


_DECADES = [_Decade(10.0 ** (i - 6), 2.0 ** (i + 1) - 1, 0.9 * 10.0 ** (i - 6) / 2**i) for i in range(7)]
_DECADES[0] = _DECADES[0]._replace(width=1e-6)  # from the entry 0


def _signed_entry(code: jax.Array) -> jax.Array:
    """The map's entry for a code in 0 .. 127: convex, so it is the maximum of its pieces."""
    return functools.reduce(jnp.maximum, [top - (last - code) * width for top, last, width in _DECADES])


# The upper and lower part of the second moment's map, in octaves of v.
_UPPER, _LOWER = 3 / 64, 5 / 16
_OFFSET = 148 * (_LOWER - _UPPER)


def _root_entry(code: jax.Array) -> jax.Array:
    """The square of the map's entry for a code in 1 .. 255: the depth is the maximum of two lines."""
    n = 255 - code
    return jnp.exp2(-jnp.maximum(n * _UPPER, n * _LOWER - _OFFSET))
