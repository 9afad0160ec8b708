"""How an optimizer's state is sharded, given how the parameters are."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adaptive_optax._core.checks import check_transformation
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax._core.trees import Params, PyTree


def state_sharding(tx: optax.GradientTransformation | optax.MultiSteps, params: Params) -> PyTree:
    """Returns a sharding for every array of `tx.init(params)`, from those of the parameters.

    With it, the state is created where it belongs, the jitted step is compiled once, and a checkpoint is
    restored straight to its devices:

    ```python
    shardings = ao.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    ```

    and `jax.jit(step, out_shardings=(jax.tree.map(lambda x: x.sharding, params), shardings))`, since on a
    mesh with Auto axes the compiler may otherwise choose other shardings for what a step returns.

    Moments, accumulators and averages are sharded as their parameters are. A moment that is shared along
    axes keeps the sharding of the others. The scales of an Int8 moment are sharded like its codes along
    every axis where shards hold whole blocks. What belongs to no single parameter (counts, labels, the
    fields of telemetry) is on every device. The state of any other transformation is sharded as JAX infers
    it from `tx.init`, which for optax's is right too.

    It traces `tx.init` for a mesh whose axes are all `Explicit`, on which shardings are part of types.
    Nothing is computed or allocated.

    Args:
        tx: The transformation, usually the whole chain, or an `optax.MultiSteps`.
        params: The parameters: arrays, or `jax.ShapeDtypeStruct` with `sharding=`. The mesh may have Auto or
            Explicit axes. Leaves without a `NamedSharding` count as replicated.

    Returns:
        A tree of `NamedSharding` like `tx.init(params)`, on the mesh of the parameters.

    Raises:
        ValueError: If no parameter has a `NamedSharding`, they are on different meshes, an axis of
            a parameter cannot be split evenly.

    Examples:
        >>> import adaptive_optax as ao, jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("data",))
        >>> split = jax.NamedSharding(mesh, jax.P("data"))
        >>> params = {"w": jax.ShapeDtypeStruct((8, 256), jnp.float32, sharding=split)}
        >>> shardings = ao.state_sharding(ao.scale_by_adam(granularity=ao.Axis(-1)), params)
        >>> shardings.mu["w"].spec, shardings.nu["w"].spec, shardings.count.spec
        (P('data', None), P('data', None), P())
    """
    if not isinstance(tx, optax.MultiSteps):
        check_transformation("tx", tx)
    mesh = _mesh_of(params)
    typed = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def in_type(path, x):
        given = getattr(x, "sharding", None)
        spec = given.spec if isinstance(given, NamedSharding) else PartitionSpec()
        sharding = NamedSharding(typed, spec)
        try:
            sharding.shard_shape(x.shape)
        except ValueError as error:
            raise ValueError(f"params[{path!r}] of shape {x.shape} cannot be split by {spec}.") from error
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    leaves = [in_type(*pair) for pair in paths_and_leaves(params)]
    state = jax.eval_shape(tx.init, jax.tree.unflatten(jax.tree.structure(params), leaves))
    return jax.tree.map(lambda x: NamedSharding(mesh, getattr(x.sharding, "spec", PartitionSpec())), state)


def _mesh_of(params: Any) -> Mesh | AbstractMesh:
    meshes: list[Any] = []
    for path, x in paths_and_leaves(params):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            if meshes and sharding.mesh != meshes[0]:
                raise ValueError(
                    f"params must be on one mesh: {path!r} is on {sharding.mesh}, others on {meshes[0]}."
                )
            meshes.append(sharding.mesh)
    if not meshes:
        raise ValueError(
            "params must have a NamedSharding, as arrays placed by jax.device_put or as "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=...); none of the leaves has one."
        )
    return meshes[0]
