"""Where the values of a leaf lie in it: what random bits for stochastic rounding are hashed from."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from adaptive_optax._core.paths import paths_and_leaves

_SPECS: contextvars.ContextVar[Mapping[str, PartitionSpec] | None] = contextvars.ContextVar(
    "global_coordinates", default=None
)


@contextlib.contextmanager
def global_coordinates(specs: Any) -> Iterator[None]:
    """Inside `jax.shard_map`, makes random bits belong to global coordinates instead of a shard's own.

    Stochastic rounding hashes the coordinates of a value. Under `jax.jit` these are global on any mesh.
    Inside `jax.shard_map` an array is a shard and does not know where it lies, so all shards would round
    alike. With this around `update`, the bits are those of an unsharded run:

    ```python
    def step(params, state, gradients):  # inside jax.shard_map
        with ao.global_coordinates(specs):
            updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state
    ```

    Args:
        specs: A tree of `PartitionSpec` like the parameters: how `shard_map` splits them, `PartitionSpec()`
            for a parameter that is whole. Shards must be of equal size, as those of `shard_map` are.

    Raises:
        ValueError: If a leaf is no `PartitionSpec`; while tracing, if a spec has more entries than its leaf
            has axes, or the leaf of a parameter with axes is missing.

    Examples:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp
        >>> tx = ao.stochastic_rounding()
        >>> mesh, specs = jax.make_mesh((1,), ("data",)), {"w": jax.P("data")}
        >>> split = jax.NamedSharding(mesh, specs["w"])
        >>> params = {"w": jax.device_put(jnp.ones(8, jnp.bfloat16), split)}
        >>> def updated(params):
        ...     steps = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3), params)
        ...     with ao.global_coordinates(specs):
        ...         return tx.update(steps, tx.init(params), params)[0]
        >>> sharded = jax.shard_map(updated, mesh=mesh, in_specs=(specs,), out_specs=specs)(params)
        >>> sharded["w"].shape
        (8,)
    """
    found = dict(paths_and_leaves(specs, masked=True))
    for path, spec in found.items():
        if not isinstance(spec, PartitionSpec):
            raise ValueError(f"specs must be a tree of PartitionSpec, got {spec!r} at {path!r}.")
    token = _SPECS.set(found)
    try:
        yield
    finally:
        _SPECS.reset(token)


def places(tree: Any) -> Any:
    """Returns a tree of what `coordinates` needs to know about each leaf, besides its shape.

    That is its index in the tree, which gives each leaf its own random bits. Inside `global_coordinates` it
    is a vector: the index, the coordinate of the shard's corner, and the global stride of each axis.
    """
    specs, treedef = _SPECS.get(), jax.tree.structure(tree)
    if specs is None:
        return treedef.unflatten(range(treedef.num_leaves))
    for path, x in paths_and_leaves(tree):
        if path and x.ndim and path not in specs:
            raise ValueError(
                f"specs must have a leaf for every parameter, and has none for {path!r}: use PartitionSpec() "
                "if it is whole."
            )
    pairs = enumerate(paths_and_leaves(tree))
    return treedef.unflatten([_place(i, path, x.shape, specs.get(path)) for i, (path, x) in pairs])


def _place(index: int, path: str, shape: tuple[int, ...], spec: PartitionSpec | None) -> jax.Array:
    axes = [None] * len(shape) if spec is None else [*spec, *[None] * (len(shape) - len(spec))]
    if len(axes) > len(shape):
        raise ValueError(f"specs has {spec} for {path!r}, which has {len(shape)} axes.")
    # Sizes stay Python integers: those of a large leaf's axes may exceed 32 bits when multiplied.
    names = [() if name is None else name for name in axes]
    try:
        whole = [n * jax.lax.axis_size(name) if name else n for n, name in zip(shape, names, strict=True)]
    except NameError as error:
        raise ValueError(
            f"specs has {spec} for {path!r}, whose axes must be those of the jax.shard_map around it."
        ) from error
    strides = [math.prod(whole[axis + 1 :]) % 2**32 for axis in range(len(shape))]
    corner = jnp.zeros((), jnp.uint32)
    for n, name, stride in zip(shape, names, strides, strict=True):
        if name:
            along = jax.lax.axis_index(name).astype(jnp.uint32) * np.uint32(n)
            corner = corner + along * np.uint32(stride)
    return jnp.stack([jnp.uint32(index), corner, *map(jnp.uint32, strides)])


def coordinates(
    shape: tuple[int, ...], place: Any, sharding: NamedSharding | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the index of a leaf, uint32, and the row-major position of each of its values, modulo 2**32."""
    place = jnp.asarray(place, jnp.uint32)
    is_shard = place.ndim > 0
    position = jnp.zeros(shape, jnp.uint32, out_sharding=sharding)
    for axis in range(len(shape)):
        stride = place[2 + axis] if is_shard else np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        position = position + along * stride
    return (place[0], position + place[1]) if is_shard else (place, position)
