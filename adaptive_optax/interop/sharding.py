"""How an optimizer's state is sharded, given how the parameters are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
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
    fields of telemetry), and what has another shape (Adafactor's factors), is on every device. The state of
    any other transformation is sharded as JAX infers it from `tx.init`; what has the shape of a parameter,
    or stacks arrays of that shape as L-BFGS's memory does, like that parameter.

    It traces `tx.init` for a mesh whose axes are all `Explicit`, on which shardings are part of types.
    Nothing is computed or allocated.

    Args:
        tx: The transformation, usually the whole chain, or an `optax.MultiSteps`.
        params: The parameters: arrays, or `jax.ShapeDtypeStruct` with `sharding=`. The mesh may have Auto or
            Explicit axes. Leaves without a `NamedSharding` count as replicated.

    Returns:
        A tree of `NamedSharding` like `tx.init(params)`, on the mesh of the parameters and in the default
        memory of its devices.

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
    typed = mesh.abstract_mesh.update(axis_types=(AxisType.Explicit,) * len(mesh.axis_names))

    def in_type(path, x):
        shape, spec = jnp.shape(x), _spec_of(x)
        sharding = NamedSharding(typed, spec)
        try:
            sharding.shard_shape(shape)
        except (ValueError, IndexError) as error:  # an uneven split; more axes than x has
            raise ValueError(f"params[{path!r}] of shape {shape} cannot be split by {spec}.") from error
        return jax.ShapeDtypeStruct(shape, jnp.result_type(x), sharding=sharding)

    known = dict(paths_and_leaves(params))
    leaves = [in_type(path, x) for path, x in known.items()]
    with jax.sharding.use_abstract_mesh(typed):
        state = jax.eval_shape(tx.init, jax.tree.unflatten(jax.tree.structure(params), leaves))

    def placed(path, x):
        spec = getattr(x.sharding, "spec", PartitionSpec())
        if all(name is None for name in spec):
            spec = _spec_of_copies(path, x.shape, known)
        return NamedSharding(mesh, spec)

    found = [placed(path, x) for path, x in paths_and_leaves(state)]
    return jax.tree.unflatten(jax.tree.structure(state), found)


def _spec_of(x: Any) -> PartitionSpec:
    sharding = getattr(x, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _spec_of_copies(path: str, shape: tuple[int, ...], params: dict[str, Any]) -> PartitionSpec:
    """The sharding of an array created from scratch: that of a parameter if it stacks copies of one."""
    parts = path.split("/")
    names = ("/".join(parts[i:]) for i in range(len(parts) + 1))
    fitting = [name for name in names if name in params and _stacks(shape, jnp.shape(params[name]))]
    if not fitting:
        return PartitionSpec()
    specs = [_spec_of(params[name]) for name in fitting]
    is_copy = shape == jnp.shape(params[fitting[0]])
    if is_copy and any(spec != specs[0] for spec in specs):
        return PartitionSpec()  # of the one that is replicated, whose path ends like the field's
    return PartitionSpec(*[None] * (len(shape) - jnp.ndim(params[fitting[0]])), *specs[0])


def _stacks(shape: tuple[int, ...], one: tuple[int, ...]) -> bool:
    """Whether an array has the shape of a parameter with axes, or of several."""
    return bool(one) and shape[-len(one) :] == one


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
