r"""8-bit moments: a code per value and a scale per block, rounded without bias.

The values of a block share a float32 scale, their largest magnitude. Each value is stored as the code of the
map entry just below or just above value / scale, chosen at random so that the expectation is right.
`blocks.py` defines the blocks.

The first moment's map is signed and uniform within each decade: entries
$10^{i-6}(0.1 + 0.9 (j+1) / 2^i)$ for $i = 0 \dots 6$, $j = 0 \dots 2^i - 1$, their
negatives, and 0. It is the dynamic map of Dettmers et al. 2022 with each entry at the end of its cell instead
of the middle. The scale itself is thus an entry on both sides, and the code is a concave, piecewise linear
function of the value, so no look-up table is needed.

The second moment is stored as its root r on a logarithmic map: with n = 255 - c for codes
$c = 1 \dots 255$, $r = r_{max} 2^{-d}$, where d grows by 3/128 per code up to n = 148 and by 5/32
per code beyond that, to 20 octaves. Most values of a block lie in the upper part, so the noise of rounding,
which is proportional to the root of the distance between entries, is smaller there. There is no entry 0
(code 0 is reserved for blocks of zeros), because a second moment rounded to 0 next to a non-zero first moment
would give an unbounded step. Smaller values are raised to $10^{-6} r_{max}$, which makes their steps
too short, not too long.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive_optax._core.checks import check_integer
from adaptive_optax._core.coordinates import places
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.random_bits import as_uniform, random_bits
from adaptive_optax._core.sharding import traced_sharding
from adaptive_optax._core.states import unwrapped
from adaptive_optax._core.trees import Count, Moment, Params, PyTree, by_leaf
from adaptive_optax._core.values import known_scalar
from adaptive_optax.moments.blocks import (
    SHORT_AXIS,
    block_extents,
    extents_of,
    grid,
    split_into_blocks,
    spread_blocks,
)
from adaptive_optax.moments.storage import Role, Storage, zeros

FORMAT = 2  # saved with the state, so that later versions can decode it
# 1: the same maps, but blocks only along the last axis. The scales' shapes determine a leaf's blocks.
READABLE = (1, 2)
# The upper and lower part of the second moment's map, in octaves of v (two octaves of v are one of its root).
# The numbers are sums of few powers of two, so that products with codes are exact.
_UPPER_CODES = 148
_UPPER, _LOWER = 3 / 64, 5 / 16
_OFFSET = _UPPER_CODES * (_LOWER - _UPPER)


class Int8Moment(NamedTuple):
    """A moment as stored by `Int8`.

    Attributes:
        codes: Tree of int8 (signed) or uint8 (second moment) codes in the moment's shapes; leaves that are
            not compressed are stored here unchanged.
        scale: Tree of float32 scales (float64 if the moment is), with one axis of blocks for each axis of the
            moment; a scalar 1 for leaves that are not compressed.
        format: The version of the format, int32 scalar.
        block_size: The maximum number of values in a block.
    """

    codes: PyTree
    scale: PyTree
    format: jax.Array
    block_size: Count

    def decoded(self) -> PyTree:
        """Returns the values, as `dense` does.

        Raises:
            ValueError: If the moment was written by a version whose maps this version does not know.
        """
        known, size = map(known_scalar, (self.format, self.block_size))
        if known is not None and known not in READABLE:
            formats = " or ".join(map(str, READABLE))
            raise ValueError(f"moment must be an Int8Moment of format {formats}, got format {int(known)}.")
        return _decode(unwrapped(self.block_size) if size is None else int(size), self.codes, self.scale)

    def encode_like(self, values: PyTree, *, count: Count, role: Role) -> Int8Moment:
        """Encodes values like this moment, with the same leaves compressed."""
        known = known_scalar(self.block_size)
        size = unwrapped(self.block_size) if known is None else int(known)
        return _encoded(self, values, size, count, role)

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
    """Keeps a moment in 8 bits per value.

    Use it to shrink Adam's state from 8 bytes per parameter to about 2. The step is computed from float32
    values before they are encoded. Codes are rounded stochastically and without bias, so a slow average moves
    even if a step is a fraction of the gap between codes. `scale_by_adam` keeps the decoded second moment at
    or above $m^2 / A^2$, so its bound (`adam_bound`) holds despite rounding.

    Leaves with fewer than `min_size` values and complex leaves are not compressed: they stay float32
    (float64, complex). The moment's repr lists them, and `state_bytes` counts them. The choice depends on the
    global shape, never on a shard's shape.

    Blocks run along the last axis; a remainder is a block as well. If the last axis is shorter than 64, as in
    an attention kernel (features, heads, 32), a block also takes 2, 4, 8, ... neighbours along the longest
    other axis, until it holds half of `block_size`. Here that is (4, 1, 32), one head of four features, so
    both the features and the heads can be sharded.

    Encoding and decoding need no communication if each shard holds whole blocks: the last axis unsharded or
    sharded in multiples of the block size, and the longest axis, if blocks extend along it, in multiples of
    that extent. Otherwise values are gathered.

    Args:
        block_size: The maximum number of values that share a scale, at least 16.
        min_size: The minimum number of values for a leaf to be compressed, at least 1.

    Raises:
        ValueError: If an argument is out of range; at update, if the state has another format or block size.

    State cost: 1 byte per value and 4 per block, or 1.016 bytes per value at the default, at most 1.063 if
    the last axis is shorter than a block, not counting remainders.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_adam(mu_storage="int8", nu_storage=ao.Int8())
        >>> state = tx.init({"kernel": jnp.ones((512, 512)), "bias": jnp.ones(512)})
        >>> state.nu
        Int8Moment(262,144 values of 1 leaves as uint8; not compressed: 'bias' float32[512])
        >>> ao.state_bytes(state.nu)
        268300

    Source: block-wise dynamic quantisation, Dettmers et al. 2022, "8-bit optimizers via block-wise
    quantization", section 2; a map without zero for the second moment as in Li et al. 2023, "Memory efficient
    optimizers with 4-bit states"; the unbiased maps and the floor are derived for this library.
    """

    block_size: int = 256
    min_size: int = 4096

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, "[16, 2147483647]")
        check_integer("min_size", self.min_size, "[1, inf)")

    def init(self, params_like: Params, role: Role) -> Moment:
        """Returns codes and scales of zero."""
        code = jnp.int8 if role == "mu" else jnp.uint8

        def codes(x):
            return x.astype(code) if self._compresses(x) else x

        def scale(x):
            # A reduction of the leaf, so that it gets the leaf's sharding.
            return _largest(x, block_extents(x.shape, self.block_size)) if self._compresses(x) else _one(x)

        values = zeros(params_like, role)
        return Int8Moment(
            jax.tree.map(codes, values),
            jax.tree.map(scale, values),
            jnp.full((), FORMAT, jnp.int32),
            jnp.full((), self.block_size, jnp.int32),
        )

    def decode(self, moment: Moment, *, lower: Callable[[], PyTree] | None = None) -> PyTree:
        """Returns the values, floored by `lower`."""
        self._check(moment)
        values = _decode(self.block_size, moment.codes, moment.scale)
        return values if lower is None else jax.tree.map(jnp.maximum, values, lower())

    def encode(self, moment: Moment, values: PyTree, *, count: Count, role: Role) -> Moment:
        """Rounds the values to codes."""
        return _encoded(moment, values, self.block_size, count, role)

    def _compresses(self, x: Any) -> bool:
        if jnp.iscomplexobj(x) or x.ndim == 0 or x.size < self.min_size:
            return False
        values = math.prod(block_extents(x.shape, self.block_size))
        return values >= min(SHORT_AXIS, self.block_size // 2)

    def _check(self, moment: Any) -> None:
        if not isinstance(moment, Int8Moment):
            raise ValueError(
                f"A moment of {self} must be an Int8Moment, got a {type(moment).__name__}, which is another "
                "format. Convert the state with convert_storage."
            )
        scales = dict(paths_and_leaves(moment.scale))
        for path, x in paths_and_leaves(moment.codes):
            compresses = self._compresses(x)
            wanted = grid(x.shape, block_extents(x.shape, self.block_size)) if compresses else ()
            if scales[path].shape != wanted or _is_code(x) != compresses:
                raise ValueError(
                    f"{path!r} of the state was not stored by {self}. Convert the state with convert_storage."
                )


@by_leaf(like="codes")
def _decode(block_size: Any, codes: jax.Array, scale: jax.Array) -> jax.Array:
    if not _is_code(codes):
        return codes
    scale = spread_blocks(scale, codes, block_size)
    code = codes.astype(scale.dtype)
    if codes.dtype == jnp.int8:
        return jnp.sign(code) * _signed_entry(jnp.abs(code)) * scale
    return _root_entry(code) * jnp.square(scale)


def _encoded(moment: Any, values: PyTree, block_size: Any, count: Count, role: Role) -> Int8Moment:
    step = count, role, block_size
    codes, scale = _encode(step, moment.codes, moment.scale, values, places(values))
    return moment._replace(codes=codes, scale=scale)


@by_leaf(like=("old", "old_scale"))
def _encode(
    step: tuple[jax.Array, Role, Any], old: jax.Array, old_scale: jax.Array, x: jax.Array, place: Any
) -> tuple[jax.Array, jax.Array]:
    count, role, block_size = step
    if not _is_code(old):
        return x.astype(old.dtype), _one(x)
    extents = extents_of(x.shape, old_scale.shape, block_size)
    if isinstance(extents[-1], int):
        largest = _largest(x, extents)
    else:  # of a moment whose storage is not known here
        rows = _largest(x, (*extents[:-1], 1))
        block = jnp.arange(x.shape[-1]) // extents[-1]
        largest = jnp.zeros(old_scale.shape, x.dtype).at[..., block].max(rows)
    # The inverse is 0 for a block of zeros; a block that is not finite, or nearly so, shows in its scale.
    # Multiply by a number computed once per block: XLA would keep the quotients of all values in memory.
    inverse = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
    inverse = spread_blocks(inverse, x, block_size)
    bits = random_bits(x.shape, count, place, role, sharding=traced_sharding(x))
    uniform = as_uniform(bits).astype(x.dtype)
    if role == "mu":
        return _signed_code(x * inverse, uniform).astype(jnp.int8), largest
    code = jnp.where(inverse > 0, _root_code(x * inverse, uniform), 0)
    return code.astype(jnp.uint8), jnp.sqrt(largest)


def _largest(x: jax.Array, extents: tuple[int, ...]) -> jax.Array:
    """The largest magnitude in each block, 0 where it is too small to divide by."""
    blocks, within = split_into_blocks(x, extents)
    # Not max(|x|): XLA reduces that form at a tenth of the speed on a CPU.
    largest = jnp.maximum(jnp.max(blocks, axis=within), -jnp.min(blocks, axis=within))
    return jnp.where(largest < jnp.finfo(x.dtype).tiny, 0, largest)


def _one(x: jax.Array) -> jax.Array:
    return jnp.ones((), x.real.dtype)


class _Decade(NamedTuple):
    """A piece of the signed map: its largest entry, that entry's code, and the spacing of its entries."""

    top: float
    last: float
    width: float


_DECADES = [_Decade(10.0 ** (i - 6), 2.0 ** (i + 1) - 1, 0.9 * 10.0 ** (i - 6) / 2**i) for i in range(7)]
_DECADES[0] = _DECADES[0]._replace(width=1e-6)  # from the entry 0


def _signed_entry(code: jax.Array) -> jax.Array:
    """The map's entry for a code in 0 .. 127: convex, so it is the maximum of its pieces."""
    pieces = [top - (last - code) * width for top, last, width in _DECADES]
    return _reduce(jnp.maximum, pieces)


def _signed_code(ratio: jax.Array, uniform: jax.Array) -> jax.Array:
    """The code of a value divided by its block's largest, rounded up where `uniform` is high."""
    magnitude = jnp.abs(ratio)
    pieces = [last - (top - magnitude) * (1 / width) for top, last, width in _DECADES]
    code = jnp.floor(_reduce(jnp.minimum, pieces) + uniform)
    return jnp.sign(ratio) * jnp.minimum(code, 127)  # an inexact division may exceed it


def _root_entry(code: jax.Array) -> jax.Array:
    """The square of the map's entry for a code in 1 .. 255: the depth is the maximum of two lines."""
    n = 255 - code
    return jnp.exp2(-jnp.maximum(n * _UPPER, n * _LOWER - _OFFSET))


def _root_code(ratio: jax.Array, uniform: jax.Array) -> jax.Array:
    """The code of a second moment divided by its block's largest, rounded up where `uniform` is low."""
    # Avoids the logarithm of 0; the entry of the lowest code is far above the smallest number.
    depth = -jnp.log2(jnp.maximum(ratio, float(jnp.finfo(ratio.dtype).tiny)))
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
