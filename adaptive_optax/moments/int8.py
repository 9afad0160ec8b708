r"""8-bit moments: a code for every value and a scale for every block, rounded without bias.

A block of values along the last axis shares a float32 scale, its largest magnitude; each value is the code of
the map entry below or above value / scale, chosen at random so that its expectation is right.

The first moment's map is signed, and even within decades: entries :math:`10^{i-6}(0.1 + 0.9 (j+1) / 2^i)`
for :math:`i = 0 \dots 6`, :math:`j = 0 \dots 2^i - 1`, their negatives, and 0. It is the dynamic map of
Dettmers et al. 2022 with each entry at the end of its cell instead of the middle: the scale itself is an
entry on both sides, and a code is a concave, piecewise linear function of the value: no table is looked up.

The second moment is kept as its root r on a logarithmic map: with n = 255 - c for codes
:math:`c = 1 \dots 255`, :math:`r = r_{max} 2^{-d}`, where d grows by 3/128 a code up to n = 148 and by 5/32 a
code beyond, to 20 octaves. Most values of a block lie in the upper part, where the roundings' noise, which
goes with the root of the distance between entries, is thus smaller. There is no entry 0 (code 0 is for blocks
of zeros), because a second moment that is rounded to 0 under a first moment that is not makes a step without
bound. Values under :math:`10^{-6} r_{max}` become that: their steps are too short, not too long.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive_optax._checks import check_integer
from adaptive_optax._paths import paths_and_leaves
from adaptive_optax._rounding import as_uniform, random_bits
from adaptive_optax._trees import by_leaf, leaf_numbers
from adaptive_optax.moments.storage import Role, Storage, zeros

FORMAT = 1  # of the two maps above, so that a saved state says how it is to be read
_SHORTEST_AXIS = 64
# The second moment's map, in octaves of v, two of which are one of its root: an upper and a lower part.
# Sums of few powers of two, so that products with codes are exact.
_UPPER_CODES = 148
_UPPER, _LOWER = 3 / 64, 5 / 16
_OFFSET = _UPPER_CODES * (_LOWER - _UPPER)


class Int8Moment(NamedTuple):
    """A moment as `Int8` keeps it.

    Attributes:
        codes: Tree of int8 (signed) or uint8 (second moment) codes in the moment's shapes; leaves that are
            not compressed stand here as they are.
        scale: Tree of float32 scales (float64 where the moment is), one for every block of the last axis; a
            scalar 1 for leaves that are not compressed.
        format: The version of the maps, int32 scalar.
        block_size: Values in a block, int32 scalar.
    """

    codes: Any
    scale: Any
    format: jax.Array
    block_size: jax.Array

    def __repr__(self) -> str:
        compressed, others = [], []
        for path, x in paths_and_leaves(self.codes):
            (compressed if _is_code(x) else others).append((path, x))
        values = sum(math.prod(x.shape) for _, x in compressed)
        kept = ", ".join(f"{path!r} {x.dtype}{list(x.shape)}" for path, x in others)
        return (
            f"Int8Moment({values:,} values of {len(compressed)} leaves as {compressed[0][1].dtype}"
            if compressed
            else "Int8Moment(no leaf compressed"
        ) + f"; not compressed: {kept or 'none'})"


def _is_code(x: Any) -> bool:
    return x.dtype in (jnp.int8, jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Int8(Storage):
    """Keeps a moment in 8 bits a value.

    Use it to shrink Adam's state from 8 bytes a parameter to about 2. The step is computed from float32
    values before they are encoded; code rounding is stochastic and unbiased, so a slow average moves although
    a step is a fraction of the gap between codes. `scale_by_adam` holds the decoded second moment at or above
    m^2 / A^2, so its bound (`adam_bound`) holds whatever was rounded.

    What is not compressed stays float32 (float64, complex): leaves with fewer than `min_size` values, with a
    last axis under 64, and complex ones. The moment's repr lists them, and `state_bytes` counts them. The
    choice falls on the global shape, never on a shard's.

    Blocks run along the last axis; a rest that does not fill a block is one too. Where the last axis is not
    sharded, or in multiples of the block size, encoding and decoding need no communication; otherwise XLA
    gathers.

    Args:
        block_size: Values that share a scale, at least 16.
        min_size: The number of values from which a leaf is compressed, at least 1.

    Raises:
        ValueError: If an argument is out of range; when updating, if the state has another format or block
            size.

    State cost: 1 byte a value and 4 a block: 1.016 bytes a value at the default.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_adam(mu_storage="int8", nu_storage=ao.Int8())
        >>> state = tx.init({"kernel": jnp.ones((512, 512)), "bias": jnp.ones(512)})
        >>> state.nu
        Int8Moment(262,144 values of 1 leaves as uint8; not compressed: 'bias' float32[512])
        >>> ao.state_bytes(state.nu)
        268300

    Source: block-wise dynamic quantisation, Dettmers et al. 2022, "8-bit optimizers via block-wise
    quantization", section 2; no zero for the second moment, Li et al. 2023, "Memory efficient optimizers with
    4-bit states"; the unbiased maps and the floor are derived for this library.
    """

    block_size: int = 256
    min_size: int = 4096

    def __post_init__(self):
        check_integer("block_size", self.block_size, "[16, 2147483647]")
        check_integer("min_size", self.min_size, "[1, inf)")

    def init(self, params_like: Any, role: Role) -> Any:
        """Returns codes and scales of zero."""
        code = jnp.int8 if role == "mu" else jnp.uint8

        def codes(x):
            return x.astype(code) if self._compresses(x) else x

        def scale(x):
            # A reduction of the leaf, so that it is sharded like it.
            return self.largest(x) if self._compresses(x) else jnp.ones((), x.real.dtype)

        values = zeros(params_like, role)
        return Int8Moment(
            jax.tree.map(codes, values),
            jax.tree.map(scale, values),
            jnp.full((), FORMAT, jnp.int32),
            jnp.full((), self.block_size, jnp.int32),
        )

    def decode(self, moment: Any, *, lower: Callable[[], Any] | None = None) -> Any:
        """Returns the values, floored by `lower`."""
        self._check(moment)
        values = decoded(moment, self.block_size)
        return values if lower is None else jax.tree.map(jnp.maximum, values, lower())

    def encode(self, moment: Any, values: Any, *, count: jax.Array, role: Role) -> Any:
        """Rounds the values to codes."""
        step = count, role, self
        codes, scale = _encode(step, moment.codes, moment.scale, values, leaf_numbers(values))
        return moment._replace(codes=codes, scale=scale)

    def _compresses(self, x: Any) -> bool:
        real = not jnp.iscomplexobj(x)
        return real and x.ndim > 0 and x.shape[-1] >= _SHORTEST_AXIS and x.size >= self.min_size

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest magnitude in each block, 0 where it is too small to divide by."""
        size = min(self.block_size, x.shape[-1])
        padding = -x.shape[-1] % size
        if padding:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        blocks = x.reshape(*x.shape[:-1], -1, size)
        # Not the largest of |x|, a form in which XLA reduces at a tenth of the speed on a CPU.
        largest = jnp.maximum(jnp.max(blocks, axis=-1), -jnp.min(blocks, axis=-1))
        return jnp.where(largest < jnp.finfo(x.dtype).tiny, 0, largest)

    def _check(self, moment: Any) -> None:
        if not isinstance(moment, Int8Moment):
            raise ValueError(
                f"A moment of {self} must be an Int8Moment, got a {type(moment).__name__}: it was kept in "
                "another format. Move the state with convert_storage."
            )
        scales = dict(paths_and_leaves(moment.scale))
        for path, x in paths_and_leaves(moment.codes):
            blocks = scales[path].shape[-1:]
            wanted = (-(-x.shape[-1] // self.block_size),) if self._compresses(x) else ()
            if blocks != wanted or _is_code(x) != self._compresses(x):
                raise ValueError(
                    f"{path!r} of the state was not kept with {self}. Move the state with convert_storage."
                )


def decoded(moment: Int8Moment, block_size: Any) -> Any:
    """Returns the values of a moment whose block size is known, or a traced scalar."""
    (values,) = _decode(block_size, moment.codes, moment.scale)
    return values


@by_leaf(results=1)
def _decode(block_size: Any, codes: jax.Array, scale: jax.Array) -> tuple[jax.Array]:
    if not _is_code(codes):
        return (codes,)
    scale = spread_blocks(scale, codes.shape, block_size)
    code = codes.astype(scale.dtype)
    if codes.dtype == jnp.int8:
        return (jnp.sign(code) * _signed_entry(jnp.abs(code)) * scale,)
    return (_root_entry(code) * jnp.square(scale),)


@by_leaf(results=2)
def _encode(
    step: tuple[jax.Array, Role, Int8], old: jax.Array, _: jax.Array, x: jax.Array, number: Any
) -> tuple[jax.Array, jax.Array]:
    count, role, storage = step  # the old scale is an argument as the new one has its place in the tree
    if not _is_code(old):
        return x.astype(old.dtype), jnp.ones((), x.real.dtype)
    largest = storage.largest(x)
    # 0 for a block of zeros, and one that is not finite or near that, which its scale tells. Products with
    # what is known once a block: XLA keeps the quotients of all values in memory.
    inverse = jnp.where(largest > 0, 1 / largest, 0)
    inverse = spread_blocks(inverse, x.shape, storage.block_size)
    uniform = as_uniform(random_bits(x.shape, count, number, role)).astype(x.dtype)
    if role == "mu":
        return _signed_code(x * inverse, uniform).astype(jnp.int8), largest
    code = jnp.where(inverse > 0, _root_code(x * inverse, uniform), 0)
    return code.astype(jnp.uint8), jnp.sqrt(largest)


def spread_blocks(per_block: jax.Array, shape: tuple[int, ...], block_size: Any) -> jax.Array:
    """Lays the blocks' values along the last axis of an array of the given shape."""
    if isinstance(block_size, int):
        if block_size >= shape[-1]:
            return jnp.broadcast_to(per_block, shape)
        return jnp.repeat(per_block, block_size, axis=-1)[..., : shape[-1]]
    return jnp.take(per_block, jnp.arange(shape[-1]) // block_size, axis=-1)


class _Decade(NamedTuple):
    """A piece of the signed map: its largest entry, the code of that, and the distance of its entries."""

    top: float
    last: float
    width: float


_DECADES = [_Decade(10.0 ** (i - 6), 2.0 ** (i + 1) - 1, 0.9 * 10.0 ** (i - 6) / 2**i) for i in range(7)]
_DECADES[0] = _DECADES[0]._replace(width=1e-6)  # from the entry 0


def _signed_entry(code: jax.Array) -> jax.Array:
    """The map's entry for a code in 0 .. 127: convex, the largest of its pieces."""
    pieces = [top - (last - code) * width for top, last, width in _DECADES]
    return _reduce(jnp.maximum, pieces)


def _signed_code(ratio: jax.Array, uniform: jax.Array) -> jax.Array:
    """The code of a value over its block's largest, rounded up where `uniform` is high."""
    magnitude = jnp.abs(ratio)
    pieces = [last - (top - magnitude) * (1 / width) for top, last, width in _DECADES]
    code = jnp.floor(_reduce(jnp.minimum, pieces) + uniform)
    return jnp.sign(ratio) * jnp.minimum(code, 127)  # beyond it where a division is not rounded correctly


def _root_entry(code: jax.Array) -> jax.Array:
    """The square of the map's entry for a code in 1 .. 255: the depth is the larger of two lines."""
    n = 255 - code
    return jnp.exp2(-jnp.maximum(n * _UPPER, n * _LOWER - _OFFSET))


def _root_code(ratio: jax.Array, uniform: jax.Array) -> jax.Array:
    """The code of a second moment over its block's largest, rounded up where `uniform` is low."""
    depth = -jnp.log2(ratio)
    n = jnp.minimum(depth * (1 / _UPPER), (depth + _OFFSET) * (1 / _LOWER))
    below = jnp.clip(jnp.floor(255 - n), 1, 255)
    entry = _root_entry(below)
    gap = jnp.where(below >= 255 - _UPPER_CODES, 2.0**_UPPER - 1, 2.0**_LOWER - 1)
    above = uniform * (entry * gap) < ratio - entry
    return jnp.minimum(jnp.where(above, below + 1, below), 255)


def _reduce(f: Callable[[Any, Any], Any], values: list[Any]) -> Any:
    result = values[0]
    for value in values[1:]:
        result = f(result, value)
    return result
