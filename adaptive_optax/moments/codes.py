"""The two maps of `Int8`: how a block of values becomes 8-bit codes and a header, and back.

Both maps take the bits of a float as a number. For x = 2^k (1 + f) that is, but for an offset and a factor,
k + f: a logarithm with linear pieces between powers of two. It needs no transcendental function.

A header holds the scale of a block, its largest magnitude rounded up, above some bits that tell how its codes
are spaced. It is uint16 for float32, uint32 for float64.

First moments are rounded with *subtractive dither*: a number u that decoding knows as well is added before
rounding and subtracted after it. The error is then uniform whatever the value is, so it has no bias and half
the variance that rounding up or down at random has on average. The map is linear except at powers of
two, where `_without_kinks` corrects what is rounded. Code -128 is an exact 0.

Second moments are rounded up or down at random (`antithetic_uniform`), to floats whose bits are evenly spaced
below the scale. Code 0 is an exact 0. No other value comes out as 0: a second moment of 0 beside a first
moment that is not would give an unbounded step. A block whose values span more than 59 octaves has its
smallest ones raised, which makes their steps too short, not too long.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_optax.moments.blocks import reduce_blocks, spread_blocks

_SIDE = 127  # codes on either side of 0 in the signed map
_ZERO = -128  # its code of an exact 0
_SIGNED_MARGIN = 36  # octaves above the smallest normal number below which a value is taken as 0
_TYPICAL, _CURVATURE = 1.5, 1 / 3  # found by trial

_TOP = 255  # the code of the lattice's entry at or just above the scale
_LATTICE_MARGIN = 1  # as `_SIGNED_MARGIN`


class _Layout(NamedTuple):
    """The bits of a float dtype."""

    integer: Any  # the dtype of integers with as many bits
    mantissa: int
    one: int  # the bits of 1
    infinite: int  # the bits of inf
    smallest: int  # the bits of the smallest normal number


def _layout(dtype: Any) -> _Layout:
    integer = np.int64 if jnp.finfo(dtype).bits == 64 else np.int32
    numbers = np.array([1, np.inf, jnp.finfo(dtype).tiny], dtype).view(integer)
    return _Layout(integer, jnp.finfo(dtype).nmant, *map(int, numbers))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, _layout(x.dtype).integer)


def _from_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float64 if bits.dtype == np.int64 else jnp.float32)


# --- Headers ------------------------------------------------------------------------------------------------


def header_dtype(dtype: Any) -> Any:
    """The dtype of the headers of values of a dtype; the header of a block of zeros is 0."""
    return np.uint32 if jnp.finfo(dtype).bits == 64 else np.uint16


def decoded_dtype(header: jax.Array) -> Any:
    """The dtype of the values with these headers."""
    return jnp.float64 if header.dtype == np.uint32 else jnp.float32


class _Header(NamedTuple):
    """How a header is divided: a scale above the index of a choice, how the codes are spaced.

    A choice is one of (1, 1 + 2^-d, 1 + 2 2^-d, ..., 2, 2 (1 + 2^-d), ...) times the first, for d digits.

    Attributes:
        scale_digits: The binary digits of the scale behind the leading one.
        digits: Those of a choice.
        first: The first choice, as an exponent of 2. The others reach over eight octaves.
    """

    scale_digits: int
    digits: int
    first: int

    @property
    def largest_index(self) -> int:
        return (8 << self.digits) - 1

    def of(self, largest: jax.Array, index: jax.Array, dtype: Any) -> jax.Array:
        """The headers of blocks, from the bits of their largest magnitude and the index of the choice."""
        layout = _layout(dtype)
        dropped, shift = layout.mantissa - self.scale_digits, 3 + self.digits
        scale = jnp.minimum((largest + (2**dropped - 1)) >> dropped, (layout.infinite >> dropped) - 1)
        header = jnp.where(largest == 0, 0, (scale << shift) + index)
        # The bits of a NaN, from which less can be taken than to infinity.
        not_finite = (jnp.iinfo(layout.integer).max >> dropped) << shift
        return jnp.where(largest >= layout.infinite, not_finite, header).astype(header_dtype(dtype))

    def scale_bits(self, header: jax.Array) -> jax.Array:
        """The bits of the scale: those of 0 for a block of zeros, of a NaN where a value was not finite."""
        layout = _layout(decoded_dtype(header))
        return header.astype(layout.integer) >> (3 + self.digits) << (layout.mantissa - self.scale_digits)

    def index(self, x: jax.Array, *, up: bool) -> jax.Array:
        """The index of the choice next to x: the nearest, or the next above."""
        layout = _layout(x.dtype)
        dropped = layout.mantissa - self.digits
        found = (_bits(x) + (2**dropped - 1 if up else 2 ** (dropped - 1))) >> dropped
        return jnp.clip(found - self._first_bits(layout), 0, self.largest_index)

    def choice(self, header: jax.Array) -> jax.Array:
        """The choice that headers hold."""
        layout = _layout(decoded_dtype(header))
        index = header.astype(layout.integer) & self.largest_index
        return _from_bits((index + self._first_bits(layout)) << (layout.mantissa - self.digits))

    def _first_bits(self, layout: _Layout) -> int:
        return (layout.one >> (layout.mantissa - self.digits)) + (self.first << self.digits)


_SIGNED = _Header(scale_digits=4, digits=1, first=-3)  # the choice is the curvature, log2(1 + g)
_SQUARES = _Header(scale_digits=2, digits=3, first=-10)  # the choice is the spacing in octaves


# --- First moments ------------------------------------------------------------------------------------------


class _Curve(NamedTuple):
    """The signed map of each block.

    Attributes:
        gain: 64 g over the scale; a magnitude is multiplied by g over the scale before 1 is added.
        per_gain: The scale over 8 g. With these factors both are normal numbers for every scale.
        spacing: The bits between two codes.
    """

    gain: jax.Array
    per_gain: jax.Array
    spacing: jax.Array


def _curve(header: jax.Array) -> _Curve:
    layout = _layout(decoded_dtype(header))
    span = _SIGNED.choice(header) * 2.0**layout.mantissa
    g = _from_bits(layout.one + span.astype(layout.integer)) - 1
    scale = _from_bits(_SIGNED.scale_bits(header))
    # Divisions come last: XLA computes them once per block, and what is cheap once per value.
    return _Curve(64 * g / jnp.where(scale == 0, 1, scale), scale / (8 * g), span / _SIDE)


def encode_signed(
    x: jax.Array, blocks: tuple[int, ...], block_size: Any, uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns int8 codes and headers.

    Args:
        x: float32 or float64.
        blocks: The number of blocks along each axis.
        block_size: As in `spread_blocks`.
        uniform: Numbers in (0, 1) like x, float32 or wider, which decoding must be given again.
    """
    layout = _layout(x.dtype)
    magnitude = jnp.abs(x)
    bits = _bits(magnitude)
    counts = bits >= layout.smallest + (_SIGNED_MARGIN << layout.mantissa)  # smaller ones are taken as 0
    index, largest = _curvature(bits, counts, blocks, block_size, layout)
    header = _SIGNED.of(largest, index, x.dtype)
    curve = _curve(header)
    offset = _bits(1 + magnitude * spread_blocks(curve.gain, x, block_size) / 64) - layout.one
    y = _without_kinks(offset, spread_blocks(1 / curve.spacing, x, block_size), layout)
    code = jnp.clip(jnp.floor(jnp.where(x < 0, -y, y) + uniform), -_SIDE, _SIDE)
    return jnp.where(counts, code, _ZERO).astype(jnp.int8), header


def decode_signed(code: jax.Array, header: jax.Array, block_size: Any, uniform: jax.Array) -> jax.Array:
    """Returns the values."""
    dtype = decoded_dtype(header)
    layout, curve = _layout(dtype), _curve(header)
    y = code.astype(dtype) - (uniform - 0.5)
    offset = (jnp.abs(y) * spread_blocks(curve.spacing, code, block_size)).astype(layout.integer)
    value = (8 * _from_bits(layout.one + offset) - 8) * spread_blocks(curve.per_gain, code, block_size)
    return jnp.where(code == _ZERO, 0, jnp.where(y < 0, -value, value))


def _curvature(
    bits: jax.Array, counts: jax.Array, blocks: tuple[int, ...], block_size: Any, layout: _Layout
) -> tuple[jax.Array, jax.Array]:
    """Returns the index of log2(1 + g) for each block, and the bits of its largest value.

    A step divides a first moment by a typical magnitude of its own, so that what counts are relative errors.
    The more small values there are, and the smaller the smallest is, the more codes are near 0.
    """
    dtype = jnp.float64 if layout.integer is np.int64 else jnp.float32
    width = 8 * layout.integer().itemsize
    most = 2 ** len(blocks) * math.prod(bits.shape) / math.prod(blocks)  # at least the values in a block
    # Octaves above 1 are taken to as many binary digits as their sum has room for.
    dropped = layout.mantissa - (int(width - 1 - math.log2(most)) - (width - 2 - layout.mantissa))
    octaves = jnp.where(counts, (bits - layout.one + 2 ** (dropped - 1)) >> dropped, 0)
    largest, least, total, number = reduce_blocks(
        blocks,
        block_size,
        maxima=_extremes(bits, counts, layout),
        sums=[octaves, counts.astype(layout.integer)],
    )
    number = jnp.maximum(number, 1).astype(dtype)
    mean = total.astype(dtype) * 2.0**dropped / number
    depths = (largest - layout.one).astype(dtype) - mean, (largest - layout.infinite + least).astype(dtype)
    deepest = 100 * 2.0**layout.mantissa
    typical, smallest = (
        _from_bits(layout.one + (0.75 * jnp.clip(x, 0, deepest)).astype(layout.integer)) for x in depths
    )
    weight = _bits(_TYPICAL * typical + smallest / number) - layout.one
    curvature = _CURVATURE * jnp.square(weight.astype(dtype) * 2.0**-layout.mantissa)
    return _SIGNED.index(curvature, up=False), largest


def _extremes(bits: jax.Array, counts: jax.Array, layout: _Layout) -> list[jax.Array]:
    """Arrays whose maxima are the largest bits that count, and how far the least are below infinity."""
    return [jnp.where(counts, bits, 0), jnp.where(counts, layout.infinite - bits, 0)]


def _without_kinks(offset: jax.Array, per_spacing: jax.Array, layout: _Layout) -> jax.Array:
    """Returns y for which decoding has the right expectation, from the bits above those of 1.

    Decoding is linear in y with a slope that doubles at every power of two. Averaged over y - 1/2 .. y + 1/2
    a value a distance t from such a place, in units of the slope below it, comes out as
    t^2 / 2 + 3 t / 2 + 1 / 8 for |t| < 1/2. This is solved for t.
    """
    dtype = per_spacing.dtype
    half = 2 ** (layout.mantissa - 1)
    above = ((offset + half) & (2 * half - 1)) - half  # the nearest power of two is this far below
    distance = above.astype(dtype) * per_spacing
    value = jnp.where(distance < 0, distance, 2 * distance)
    solved = jnp.sqrt(jnp.maximum(2 + 2 * value, 0)) - 1.5
    near = (jnp.abs(distance) < 0.5) & (offset >= half)  # 1 itself is no such place
    return offset.astype(dtype) * per_spacing + jnp.where(near, solved - distance, 0)


# --- Second moments -----------------------------------------------------------------------------------------


class _Lattice(NamedTuple):
    """The entries of each block: floats with the bits lowest + code * spacing."""

    lowest: jax.Array
    spacing: jax.Array


def _lattice(header: jax.Array) -> _Lattice:
    layout = _layout(decoded_dtype(header))
    spacing = (_SQUARES.choice(header) * 2.0**layout.mantissa).astype(layout.integer)
    # Not below 0, whose bits are those of no number. It is so only where the scale is that small.
    return _Lattice(jnp.maximum(_SQUARES.scale_bits(header) - _TOP * spacing, 0), spacing)


def encode_squares(
    x: jax.Array, blocks: tuple[int, ...], block_size: Any, uniform: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns uint8 codes and headers; arguments as for `encode_signed`, but x must not be negative."""
    layout = _layout(x.dtype)
    bits = _bits(x)
    counts = bits >= layout.smallest + (_LATTICE_MARGIN << layout.mantissa)
    largest, least = reduce_blocks(blocks, block_size, maxima=_extremes(bits, counts, layout))
    dropped = layout.mantissa - _SQUARES.scale_digits
    span = (((largest >> dropped) + 1) << dropped) - (layout.infinite - least)
    spacing = span.astype(x.dtype) * (2.0**-layout.mantissa / (_TOP - 1))
    header = _SQUARES.of(largest, _SQUARES.index(spacing, up=True), x.dtype)
    lattice = _lattice(header)
    lowest, spacing = (spread_blocks(each, x, block_size) for each in lattice)
    per_spacing = spread_blocks(1 / lattice.spacing.astype(x.dtype), x, block_size)
    code = jnp.clip(jnp.floor((bits - lowest).astype(x.dtype) * per_spacing), 1, _TOP).astype(layout.integer)
    entry, next_entry = (_from_bits(lowest + n * spacing) for n in (code, code + 1))
    rises = uniform * (next_entry - entry) < x - entry
    code = jnp.minimum(code + rises.astype(code.dtype), _TOP)
    return jnp.where(counts, code, 0).astype(jnp.uint8), header


def decode_squares(code: jax.Array, header: jax.Array, block_size: Any) -> jax.Array:
    """Returns the values."""
    lattice = _lattice(header)
    lowest, spacing = (spread_blocks(each, code, block_size) for each in lattice)
    return _from_bits(jnp.where(code == 0, 0, lowest + code.astype(lowest.dtype) * spacing))
