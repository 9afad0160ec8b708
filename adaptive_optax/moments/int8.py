"""8-bit moments: a code for each value and a header for each block, rounded without bias.

`blocks.py` defines the blocks, `codes.py` the two maps.
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
from adaptive_optax._core.random_bits import antithetic_uniform, as_uniform, random_bits
from adaptive_optax._core.sharding import traced_sharding
from adaptive_optax._core.states import unwrapped
from adaptive_optax._core.trees import Count, Moment, Params, PyTree, by_leaf
from adaptive_optax._core.values import known_scalar
from adaptive_optax.moments.blocks import SHORT_AXIS, block_extents, grid, reduce_blocks
from adaptive_optax.moments.codes import (
    decode_signed,
    decode_squares,
    decoded_dtype,
    encode_signed,
    encode_squares,
    header_dtype,
)
from adaptive_optax.moments.int8_before import FORMATS, decode_before
from adaptive_optax.moments.storage import Role, Storage, zeros

FORMAT = 3  # saved with the state, so that later versions can decode it
READABLE = (*FORMATS, FORMAT)


class Int8Moment(NamedTuple):
    """A moment as stored by `Int8`.

    Attributes:
        codes: Tree of int8 (signed) or uint8 (second moment) codes in the moment's shapes; leaves that are
            not compressed are stored here unchanged.
        scale: Tree of headers, uint16 (uint32 for float64), which hold the scale of a block and the spacing
            of its codes, with one axis of blocks for each axis of the moment; a scalar 1 for leaves that are
            not compressed.
        format: The version of the format, int32 scalar.
        block_size: The maximum number of values in a block.
        count: The count with which the codes were written, which decoding needs; None for second moments.
    """

    codes: PyTree
    scale: PyTree
    format: jax.Array
    block_size: Count
    count: Count | None = None

    def decoded(self) -> PyTree:
        """Returns the values, as `dense` does.

        Raises:
            ValueError: If the moment was written by a version whose maps this version does not know.
        """
        known, size = map(known_scalar, (self.format, self.block_size))
        if known is not None and known not in READABLE:
            formats = f"{', '.join(map(str, FORMATS))} or {FORMAT}"
            raise ValueError(f"moment must be an Int8Moment of format {formats}, got format {int(known)}.")
        return self._values(unwrapped(self.block_size) if size is None else int(size))

    def _values(self, block_size: Any) -> PyTree:
        count = None if self.count is None else unwrapped(self.count)
        return _decode((count, block_size), self.codes, self.scale, places(self.codes))

    def encode_like(self, values: PyTree, *, count: Count, role: Role) -> Int8Moment:
        """Encodes values like this moment, with the same leaves compressed.

        Raises:
            ValueError: If the moment has an earlier format.
        """
        if any(map(_is_before, jax.tree.leaves(self.codes), jax.tree.leaves(self.scale))):
            raise ValueError(
                "A moment of format 2 or earlier can be read but not written. Convert the state with "
                "convert_storage."
            )
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


def _is_before(codes: Any, scale: Any) -> bool:
    """Whether a leaf is compressed in an earlier format, with float scales instead of headers."""
    return _is_code(codes) and jnp.issubdtype(scale.dtype, jnp.floating)


@dataclasses.dataclass(frozen=True)
class Int8(Storage):
    r"""Keeps a moment in 8 bits per value.

    Use it to shrink Adam's state from 8 bytes per parameter to 2.13. The step is computed from float32 values
    before they are encoded. Rounding has no bias, so a slow average moves even if a step is a fraction of the
    gap between codes, and its noise is small: first moments are dithered, and second moments are rounded up
    or down by numbers that are opposite in every two steps. After 200 steps of Adam with independent
    gradients the direction is off by 1.3 % (RMS) if the gradients of a block are of one size, by 3 % if
    their sizes spread over a decade, and by 10 % over four decades. A coordinate whose gradients are a
    thousand times smaller than those of most of its block is noisier. Gradients that come only every second
    or fourth step can shift a second moment with a decay of 0.99 by up to 1 %, because of the pairs. A value
    that is not finite makes its whole block NaN. Derivatives with respect to earlier gradients do not pass
    through stored codes. `scale_by_adam` keeps the decoded
    second moment at or above $m^2 / A^2$, so its bound (`adam_bound`) holds despite rounding.

    With a block's scale s, its largest magnitude rounded up to a few binary digits,
    $\ell(2^k (1 + f)) = k + f$, and u uniform in (0, 1), hashed from the coordinate and the count,

    $$
    \begin{aligned}
    y &= 127\, \ell(1 + g |m| / s) / \ell(1 + g), & c &= \lfloor \pm y + u \rfloor,
      & \hat y &= c - u + \tfrac{1}{2} \\
    z &= (\ell(v) - \ell(s)) / \Delta + 255, & c &= \lfloor z \rfloor \text{ or } \lceil z \rceil.
    \end{aligned}
    $$

    g is chosen so that the smaller values of a block keep their digits, and $\Delta$ by the range of the
    block's values. A first moment below $2^{-90}$ or a second one below $2^{-125}$ is taken as 0, and 0 stays
    0. Decoding a first moment needs the count of the step that wrote it, which the moment keeps. The second
    moment's rate of change is off by half of the share by which it changes in a step, 0.05 % with a decay of
    0.999; its limit is not.

    Leaves with fewer than `min_size` values and complex leaves are not compressed: they stay float32
    (float64, complex). The moment's repr lists them, and `state_bytes` counts them. The choice depends on the
    global shape, never on a shard's shape.

    Blocks run along the last axis; a remainder is a block as well. If the last axis is shorter than 64 and
    than half a block, a block also takes 2, 4, 8, ... neighbours along the longest other axis, as many as it
    has room for: (8, 1, 4) of an attention kernel (features, heads, 4).

    Encoding and decoding need no communication if each shard holds whole blocks: the last axis unsharded or
    sharded in multiples of the block size, and the longest axis, if blocks extend along it, in multiples of
    that extent. Otherwise values are gathered. A first moment that was written inside `jax.shard_map` without
    `global_coordinates` can only be read in the same way; elsewhere it is off by up to a code.

    Args:
        block_size: The maximum number of values that share a scale, at least 16.
        min_size: The minimum number of values for a leaf to be compressed, at least 1.

    Raises:
        ValueError: If an argument is out of range; at update, if the state has another format or block size.

    State cost: 1 byte per value and 2 per block (4 in float64), or 1.063 bytes per value at the default, at
    most 1.125 if the last axis is shorter than a block, not counting remainders.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_adam(mu_storage="int8", nu_storage=ao.Int8())
        >>> state = tx.init({"kernel": jnp.ones((512, 512)), "bias": jnp.ones(512)})
        >>> state.nu
        Int8Moment(262,144 values of 1 leaves as uint8; not compressed: 'bias' float32[512])
        >>> ao.state_bytes(state.nu)
        280588

    Source: block-wise quantisation as in Dettmers et al. 2022, "8-bit optimizers via block-wise
    quantization", section 2.1; subtractive dither, Lipshitz et al. 1992, "Quantization and dither: a
    theoretical survey", section 4; the logarithmic map with linear pieces is that of telephony (ITU-T G.711).
    The choice of g and $\Delta$, the correction at powers of two and the floor are derived for this library.
    """

    block_size: int = 32
    min_size: int = 4096

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, "[16, 2147483647]")
        check_integer("min_size", self.min_size, "[1, inf)")
        for name in ("block_size", "min_size"):  # an array could not be hashed
            object.__setattr__(self, name, int(getattr(self, name)))

    def init(self, params_like: Params, role: Role) -> Moment:
        """Returns codes and scales of zero."""
        code = jnp.int8 if role == "mu" else jnp.uint8

        def codes(x):
            return x.astype(code) if self._compresses(x) else x

        def scale(x):
            # A reduction of the leaf, so that it gets the leaf's sharding.
            if not self._compresses(x):
                return _one(x)
            blocks = grid(x.shape, block_extents(x.shape, self.block_size))
            (largest,) = reduce_blocks(blocks, self.block_size, maxima=[x.astype(jnp.int32)])
            return largest.astype(header_dtype(x.dtype))

        values = zeros(params_like, role)
        return Int8Moment(
            jax.tree.map(codes, values),
            jax.tree.map(scale, values),
            jnp.full((), FORMAT, jnp.int32),
            jnp.full((), self.block_size, jnp.int32),
            jnp.zeros((), jnp.int32) if role == "mu" else None,
        )

    def decode(self, moment: Moment, *, lower: Callable[[], PyTree] | None = None) -> PyTree:
        """Returns the values, floored by `lower`."""
        self._check(moment)
        values = moment._values(self.block_size)
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
            scale = scales[path]
            if scale.shape != wanted or _is_code(x) != compresses or _is_before(x, scale):
                raise ValueError(
                    f"{path!r} of the state was not stored by {self}. Convert the state with convert_storage."
                )


@by_leaf(like="codes")
def _decode(step: tuple[Any, jax.Array | None], codes: jax.Array, scale: jax.Array, place: Any) -> jax.Array:
    count, block_size = step
    if not _is_code(codes):
        return codes
    if _is_before(codes, scale):
        return decode_before(codes, scale, block_size)
    if codes.dtype == jnp.uint8:
        return decode_squares(codes, scale, block_size)
    return decode_signed(codes, scale, block_size, _dither(codes, count, place, decoded_dtype(scale)))


def _dither(x: jax.Array, count: Any, place: Any, dtype: Any) -> jax.Array:
    bits = random_bits(x.shape, count, place, "mu", sharding=traced_sharding(x))
    return as_uniform(bits).astype(dtype)


def _encoded(moment: Any, values: PyTree, block_size: Any, count: Count, role: Role) -> Int8Moment:
    step = count, role, block_size
    codes, scale = _encode(step, moment.codes, moment.scale, values, places(values))
    return moment._replace(codes=codes, scale=scale, count=None if role == "nu" else count)


@by_leaf(like=("old", "old_scale"))
def _encode(
    step: tuple[jax.Array, Role, Any], old: jax.Array, old_scale: jax.Array, x: jax.Array, place: Any
) -> tuple[jax.Array, jax.Array]:
    count, role, block_size = step
    if not _is_code(old):
        return x.astype(old.dtype), _one(x)
    if role == "mu":
        return encode_signed(x, old_scale.shape, block_size, _dither(x, count, place, x.dtype))
    uniform = antithetic_uniform(x.shape, count, place, sharding=traced_sharding(x)).astype(x.dtype)
    return encode_squares(x, old_scale.shape, block_size, uniform)


def _one(x: jax.Array) -> jax.Array:
    return jnp.ones((), x.real.dtype)
