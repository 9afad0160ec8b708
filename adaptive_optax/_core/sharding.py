"""Shardings that are part of an array's type, as on a mesh with `Explicit` axes, JAX's default.

On such a mesh an operation whose result could be sharded in several ways needs to be told which one. On
`Auto` axes XLA chooses, and the functions here return None or do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


def sharding_in_type(x: Any) -> NamedSharding | None:
    """Returns the sharding in an array's type, or None if its type names no mesh axis."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    if not isinstance(sharding, NamedSharding) or all(axes is None for axes in sharding.spec):
        return None
    if isinstance(x, Tracer) or not isinstance(x.sharding, NamedSharding):
        return sharding
    # With concrete devices, which an array outside `jax.set_mesh` has.
    return NamedSharding(x.sharding.mesh, sharding.spec)


def traced_sharding(x: Any) -> NamedSharding | None:
    """Returns `sharding_in_type` of a tracer, for arrays created from scratch; None for a concrete array."""
    return sharding_in_type(x) if isinstance(x, Tracer) else None


def with_spec(sharding: NamedSharding | None, spec: Sequence[Any]) -> NamedSharding | None:
    """Returns a sharding on the same mesh, None for None."""
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*spec))


def replicated_like(x: Any) -> NamedSharding | None:
    """Returns the fully replicated sharding on x's mesh, or None if x's type has no sharding."""
    return with_spec(sharding_in_type(x), ())


def shards_along(sharding: NamedSharding | None, axis: int) -> int:
    """Returns the number of shards along an axis."""
    if sharding is None:
        return 1
    names = sharding.spec[axis]
    names = names if isinstance(names, tuple) else () if names is None else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def shapes_of(f: Callable[[Any], Any], tree: Any) -> Any:
    """Returns the result of `jax.eval_shape`, with shardings on the devices of the tree.

    `jax.eval_shape` returns shardings on an abstract mesh, with which arrays can only be created inside
    `jax.set_mesh`.
    """
    result = jax.eval_shape(f, tree)
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(tree)]
    meshes = [
        s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, jax.sharding.Mesh)
    ]

    def placed(x):
        abstract = x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None
        mesh = next((mesh for mesh in meshes if mesh.abstract_mesh == abstract), None)
        if mesh is None:
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

    return jax.tree.map(placed, result)
