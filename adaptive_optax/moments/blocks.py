"""Blocks of neighbouring values that share a scale, as boxes that tile an array.

A box runs along the last axis. If that axis is short, the box also extends by a power of two along the
longest other axis. Shards then hold whole boxes more often than if the last axes were flattened, where a box
would span heads. An array with one value per box has the same rank as the tiled array, so it can be sharded
in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from adaptive_optax._core.sharding import sharding_in_type, shards_along, with_spec

SHORT_AXIS = 64  # a last axis at least this long needs no other: values far apart should not share a scale


def block_extents(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """Returns the extents of a block along the axes of an array, which must have at least one."""
    extents = [1] * len(shape)
    extents[-1] = min(shape[-1], block_size)
    if shape[-1] >= SHORT_AXIS:
        return tuple(extents)
    others = sorted(range(len(shape) - 1), key=lambda axis: (shape[axis], axis), reverse=True)
    for axis in others:
        room = min(block_size // max(1, math.prod(extents)), shape[axis])
        extents[axis] = 1 << (max(1, room).bit_length() - 1)
    return tuple(extents)


def grid(shape: tuple[int, ...], extents: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the number of blocks along each axis."""
    return tuple(-(-size // extent) for size, extent in zip(shape, extents, strict=True))


def _power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`."""
    return 1 << max(0, least - 1).bit_length()


def extents_of(shape: tuple[int, ...], blocks: tuple[int, ...], block_size: Any) -> tuple[Any, ...]:
    """Returns the extents of the blocks of an array from the number of blocks along each axis.

    Along the last axis the extent is `block_size`, which may be traced, or the whole axis. Along any other
    axis it is the power of two that gives this number of blocks.
    """
    extents = [_power_of_two(-(-size // count)) for size, count in zip(shape[:-1], blocks[:-1], strict=True)]
    return (*extents, shape[-1] if blocks[-1] == 1 else block_size)


def split_into_blocks(x: jax.Array, extents: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Reshapes an array so that blocks have their own axes.

    Returns:
        The array, padded with zeros, and the axes within blocks.
    """
    counts = grid(x.shape, extents)
    split = _split(x, counts, extents)
    padding = [n * extent - size for n, extent, size in zip(counts, extents, x.shape, strict=True)]
    x = _resharded(x, split.merged)
    if any(padding):
        x = jnp.pad(x, [(0, n) for n in padding])
    return jnp.reshape(x, split.shape, out_sharding=split.sharding), split.within


def reduce_blocks(
    blocks: tuple[int, ...],
    block_size: Any,
    *,
    maxima: Sequence[jax.Array],
    sums: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """Returns the largest value of each block of some arrays, and the sum of each block of others.

    The arrays hold integers, and the largest is 0 at least. XLA fuses such reductions with what computes
    their arguments and vectorises them, which it does not for floats: their order of addition and their NaNs
    are in the way.

    Args:
        blocks: The number of blocks along each axis.
        block_size: As in `extents_of`.
        maxima: Arrays of one shape.
        sums: Arrays of the same shape.
    """
    arrays = [*maxima, *sums]
    extents = extents_of(arrays[0].shape, blocks, block_size)
    is_known = isinstance(extents[-1], int)
    static = extents if is_known else (*extents[:-1], 1)
    split = [split_into_blocks(x, static) for x in arrays]
    combine = [jnp.maximum] * len(maxima) + [jnp.add] * len(sums)
    found = jax.lax.reduce(
        tuple(x for x, _ in split),
        tuple(np.zeros((), x.dtype) for x in arrays),
        lambda a, b: tuple(f(x, y) for f, x, y in zip(combine, a, b, strict=True)),
        split[0][1],
    )
    if is_known:
        return list(found)
    index = jnp.arange(arrays[0].shape[-1]) // extents[-1]
    into = [jnp.zeros(blocks, x.dtype).at[..., index] for x in found]
    return [
        at.max(x) if f is jnp.maximum else at.add(x) for at, x, f in zip(into, found, combine, strict=True)
    ]


def spread_blocks(per_block: jax.Array, like: jax.Array, block_size: Any) -> jax.Array:
    """Broadcasts one value per block to all values of the block."""
    extents = extents_of(like.shape, per_block.shape, block_size)
    if not isinstance(extents[-1], int):
        index = jnp.arange(like.shape[-1]) // extents[-1]
        whole_row = (*per_block.shape[:-1], 1), (*extents[:-1], like.shape[-1])
        gathered = _split(like, *whole_row).per_block
        per_block = _resharded(per_block, gathered).at[..., index].get(out_sharding=gathered)
        extents = (*extents[:-1], 1)
    split = _split(like, per_block.shape, extents)
    per_block = jnp.expand_dims(_resharded(per_block, split.per_block), split.within)
    per_block = jnp.broadcast_to(per_block, split.shape, out_sharding=split.sharding)
    padded = [n * extent for n, extent in zip(split.counts, extents, strict=True)]
    values = jnp.reshape(per_block, padded, out_sharding=split.merged)
    if values.shape != like.shape:
        values = values[tuple(slice(size) for size in like.shape)]
    return _resharded(values, sharding_in_type(like))


class _Split(NamedTuple):
    """The shape and sharding of an array whose blocks have axes of their own; None if types have no sharding.

    Attributes:
        counts: The number of blocks along each axis of the array.
        shape: The shape. An axis along which blocks extend becomes two: the blocks, and the values within.
        within: The axes within blocks.
        sharding: The sharding of this shape.
        merged: The sharding of the array from which splitting it needs no communication.
        per_block: The sharding of an array with one value per block.
    """

    counts: tuple[int, ...]
    shape: tuple[int, ...]
    within: tuple[int, ...]
    sharding: NamedSharding | None
    merged: NamedSharding | None
    per_block: NamedSharding | None


def _split(like: jax.Array, counts: tuple[int, ...], extents: tuple[int, ...]) -> _Split:
    given = sharding_in_type(like)
    shape, within = [], []
    split, merged, per_block = [], [], []
    for axis, (count, extent) in enumerate(zip(counts, extents, strict=True)):
        names = None if given is None else given.spec[axis]
        is_whole = count * extent == like.shape[axis] and count % shards_along(given, axis) == 0
        shape.append(count)
        if extent == 1:
            split.append(names)
            merged.append(names)
            per_block.append(names)
            continue
        within.append(len(shape))
        shape.append(extent)
        if count == 1:  # the axis within the block is the whole axis of the array
            split += [None, names]
            merged.append(names)
            per_block.append(None)
        else:  # blocks that straddle shards are gathered
            names = names if is_whole else None
            split += [names, None]
            merged.append(names)
            per_block.append(names)
    return _Split(
        counts,
        tuple(shape),
        tuple(within),
        *(with_spec(given, spec) for spec in (split, merged, per_block)),
    )


def _resharded(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    return x if sharding is None else jax.sharding.reshard(x, sharding)
