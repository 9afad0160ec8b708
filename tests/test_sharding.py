"""state_sharding on meshes of eight devices, and random bits by global coordinates inside shard_map."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import adaptive_optax as ao
from adaptive_optax._core.paths import paths_and_leaves

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
SHAPES = {"steps": (16, 512), "kernel": (8, 8, 64), "bias": (512,), "scale": ()}
LAYOUTS = {
    # Every parameter over all devices, along its longest axis.
    "fully sharded": {
        "steps": PartitionSpec(None, ("data", "model")),
        "kernel": PartitionSpec(("data", "model")),
        "bias": PartitionSpec(("data", "model")),
        "scale": PartitionSpec(),
    },
    "tensor parallel": {
        "steps": PartitionSpec("data", "model"),
        "kernel": PartitionSpec(None, "model", None),
        "bias": PartitionSpec("model"),
        "scale": PartitionSpec(),
    },
}
SIZES = {"data": 2, "model": 4}


def mesh_of(kind):
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(kind,) * 2)


def abstract_params(mesh, layout):
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, LAYOUTS[layout][name]))
        for name, shape in SHAPES.items()
    }


def expected_spec(path, shape, layout):
    """A leaf at the place of a parameter keeps the axes that it has in full, and Int8's scales its blocks."""
    *parts, name = path.split("/")
    if name not in SHAPES or len(shape) != len(SHAPES[name]):
        return PartitionSpec()
    full, spec = SHAPES[name], LAYOUTS[layout][name]
    names = [*spec, *[None] * (len(shape) - len(spec))]

    def keeps(axis, size, whole):
        if axis is None or size == whole:
            return axis
        shards = np.prod([SIZES[part] for part in ((axis,) if isinstance(axis, str) else axis)])
        # Whole blocks of 32 values on every shard.
        return axis if "scale" in parts and size > 1 and size % shards == 0 else None

    return PartitionSpec(*map(keeps, names, shape, full))


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_state_is_sharded_like_its_parameters(kind, layout):
    mesh = mesh_of(kind)
    params = abstract_params(mesh, layout)
    for case in CASES:
        tx = case.make()
        found = ao.state_sharding(tx, params)
        state = jax.eval_shape(tx.init, params)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for (path, x), sharding in zip(paths_and_leaves(state), jax.tree.leaves(found), strict=True):
            assert sharding.mesh == mesh
            expected = NamedSharding(mesh, expected_spec(path, x.shape, layout))
            assert sharding.is_equivalent_to(expected, x.ndim), (case.name, path, x.shape, sharding.spec)
            sharding.shard_shape(x.shape)  # raises if an axis cannot be split


@KINDS
@pytest.mark.parametrize(
    "tx",
    {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), ao.adamw(1e-3), optax.ema(0.9)),
        "accumulation": optax.MultiSteps(optax.adam(1e-3), 4),
        "masked": optax.masked(optax.adam(1e-3), {name: name != "bias" for name in SHAPES}),
        "averages": optax.contrib.schedule_free_adamw(1e-3),
        "signs": optax.lion(1e-3),
    }.values(),
)  # fmt: skip
def test_states_of_optax_are_created_on_their_devices(kind, tx):
    mesh = mesh_of(kind)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS["tensor parallel"].items()}
    params = jax.device_put({name: jnp.ones(shape) for name, shape in SHAPES.items()}, shardings)
    placed = ao.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=placed)(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(shardings, placed))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        for (path, x), sharding in zip(paths_and_leaves(state), jax.tree.leaves(placed), strict=True):
            expected = NamedSharding(mesh, expected_spec(path, x.shape, "tensor parallel"))
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
            assert sharding.is_equivalent_to(expected, x.ndim), (path, sharding)
        params, state = step(params, state)
    assert step._cache_size() == 1


def test_shards_that_do_not_hold_whole_blocks_share_their_scales():
    mesh = mesh_of(AxisType.Auto)
    split = NamedSharding(mesh, PartitionSpec(None, ("data", "model")))
    params = {"w": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=split)}  # 16 values on each device
    found = ao.state_sharding(ao.scale_by_adam(mu_storage="int8"), params)
    assert found.mu.codes["w"].spec == PartitionSpec(None, ("data", "model"))
    assert found.mu.scale["w"].is_fully_replicated


def test_the_memory_of_lbfgs_is_split_like_the_parameters():
    mesh = mesh_of(AxisType.Auto)
    params = abstract_params(mesh, "tensor parallel")
    found = ao.state_sharding(optax.lbfgs(), params)[0]
    assert found.diff_params_memory["steps"].spec == PartitionSpec(None, "data", "model")
    assert found.diff_updates_memory["bias"].spec == PartitionSpec(None, "model")


def test_the_memory_of_lbfgs_for_a_single_array():
    split = NamedSharding(mesh_of(AxisType.Auto), PartitionSpec("data"))
    found = ao.state_sharding(optax.lbfgs(), jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split))[0]
    assert found.diff_params_memory.spec == PartitionSpec(None, "data")


def test_a_parameter_whose_path_ends_like_a_field_of_the_state():
    mesh = mesh_of(AxisType.Auto)
    split, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    params = {
        "mu": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=split)},
        "w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=everywhere),
    }
    for tx in (ao.scale_by_adam(), optax.scale_by_adam()):
        found = ao.state_sharding(tx, params)
        for moment in (found.mu, found.nu):
            assert moment["w"].is_fully_replicated
            assert moment["mu"]["w"].is_equivalent_to(split, 2)


@KINDS
def test_inside_set_mesh(kind):
    mesh = mesh_of(kind)
    params, tx = abstract_params(mesh, "fully sharded"), ao.adamw(1e-3, granularity="tensor")
    outside = ao.state_sharding(tx, params)
    with jax.set_mesh(mesh):
        assert ao.state_sharding(tx, params) == outside
        ao.state_sharding(optax.adam(1e-3), params)


def test_a_state_for_thousands_of_devices_needs_none():
    mesh = AbstractMesh((64, 64), ("data", "model"))
    split = NamedSharding(mesh, PartitionSpec("data", "model"))
    params = {"w": jax.ShapeDtypeStruct((8192, 32768), jnp.bfloat16, sharding=split)}
    found = ao.state_sharding(ao.adamw(1e-3, mu_storage="int8", nu_storage="int8"), params)
    specs = {sharding.spec for sharding in jax.tree.leaves(found)}
    assert specs == {PartitionSpec("data", "model"), PartitionSpec()}


def test_an_nnx_model():
    mesh = mesh_of(AxisType.Auto)
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    split = NamedSharding(mesh, PartitionSpec("data", "model"))
    params = nnx.state(model, nnx.Param)
    params = jax.tree.map(lambda x: jax.device_put(x, split) if x.ndim == 2 else x, params)
    tx = ao.adam(1e-3)
    found = ao.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=found)(params)
    kernel = next(x for path, x in paths_and_leaves(state) if path.endswith("mu/kernel"))
    bias = next(x for path, x in paths_and_leaves(state) if path.endswith("mu/bias"))
    assert kernel.sharding == split and bias.sharding.is_fully_replicated


def test_what_is_refused():
    mesh = mesh_of(AxisType.Auto)
    split = NamedSharding(mesh, PartitionSpec("data"))
    with pytest.raises(ValueError, match="params must have a NamedSharding"):
        ao.state_sharding(ao.adam(0.1), {"w": np.ones(4)})
    with pytest.raises(ValueError, match=r"params\['w'\] of shape \(3,\) cannot be split"):
        ao.state_sharding(ao.adam(0.1), {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=split)})
    deep = NamedSharding(mesh, PartitionSpec(None, "data"))
    with pytest.raises(ValueError, match=r"params\['w'\] of shape \(4,\) cannot be split"):
        ao.state_sharding(
            ao.adam(0.1), {"w": types.SimpleNamespace(shape=(4,), dtype=jnp.float32, sharding=deep)}
        )
    other = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
    params = {n: jax.ShapeDtypeStruct((8,), jnp.float32, sharding=s) for n, s in (("a", split), ("b", other))}
    with pytest.raises(ValueError, match="params must be on one mesh: 'b'"):
        ao.state_sharding(ao.adam(0.1), params)
    with pytest.raises(ValueError, match="tx must be"):
        ao.state_sharding(lambda x: x, params)


WRAPPERS = {
    "reject_nonfinite": lambda: ao.reject_nonfinite(ao.adamw(0.1)),
    "dynamic_loss_scale": lambda: ao.dynamic_loss_scale(ao.adamw(0.1), init_scale=1.0),
    "dropped micro-batches": lambda: ao.accumulate_gradients(ao.adamw(0.1), 1, drop_nonfinite=True),
}


@KINDS
@pytest.mark.parametrize("name", WRAPPERS)
def test_all_devices_reject_what_one_sees(name, kind):
    tx, mesh = WRAPPERS[name](), mesh_of(kind)
    layout = LAYOUTS["fully sharded"]
    params = {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, layout[name]))
        for name, shape in SHAPES.items()
    }
    shardings = ao.state_sharding(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    placed = jax.tree.map(lambda x: x.sharding, params)

    def step(params, state, bad):
        gradients = jax.tree.map(jnp.ones_like, params)
        bias = jnp.where(jnp.arange(SHAPES["bias"][0]) == 0, jnp.where(bad, jnp.nan, 1.0), 1.0)
        gradients["bias"] = jax.device_put(bias, placed["bias"])  # one coordinate, on one device
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, out_shardings=(placed, shardings))
    for bad in (True, False):
        after, state = step(params, state, bad)
        for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(after), strict=True):
            assert (np.asarray(old) == np.asarray(new)).all() == bad
            assert len({shard.device for shard in new.addressable_shards}) == 8
    found = ao.get_rejections(state)
    assert int(found.total) + int(found.dropped) == 1


# Inside shard_map.


SPLIT = {
    "w": PartitionSpec("data", "model"),
    "b": PartitionSpec(("data", "model")),
    "s": PartitionSpec(),
    "t": PartitionSpec(None, "data"),
}


def three_steps(tx, params, gradients):
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_specs_without_a_parameter_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((8, 8), jnp.bfloat16)}

    def rounded(params):
        with ao.global_coordinates({"W": PartitionSpec("data")}):
            tx = ao.stochastic_rounding()
            return tx.update(params, tx.init(params), params)[0]

    specs = {"w": PartitionSpec("data")}
    with pytest.raises(ValueError, match="specs must have a leaf for every parameter, and has none for 'w'"):
        jax.shard_map(rounded, mesh=mesh, in_specs=(specs,), out_specs=specs)(params)


@KINDS
@pytest.mark.parametrize("storage", ["bfloat16", ao.Int8(block_size=32, min_size=16)], ids=str)
def test_rounding_inside_shard_map_is_by_global_coordinate(kind, storage):
    mesh, rng = mesh_of(kind), np.random.default_rng(0)
    shapes = {"w": (8, 256), "b": (256,), "s": (3,), "t": (4, 128)}
    params = {k: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for k, shape in shapes.items()}
    gradients = jax.tree.map(lambda x: x.astype(jnp.float32) * 1e-3, params)
    # Coordinate by coordinate, apart from scales of blocks, of which every shard has whole ones.
    tx = optax.chain(ao.adam(1e-3, mu_storage=storage, nu_storage=storage), ao.stochastic_rounding(3))
    expected = jax.jit(functools.partial(three_steps, tx))(params, gradients)

    def run(params, gradients):
        with ao.global_coordinates(SPLIT):
            return three_steps(tx, params, gradients)

    shardings = {k: NamedSharding(mesh, spec) for k, spec in SPLIT.items()}
    placed = jax.device_put((params, gradients), (shardings, shardings))
    sharded = functools.partial(jax.shard_map, mesh=mesh, in_specs=(SPLIT, SPLIT), out_specs=SPLIT)
    found = jax.jit(sharded(run))(*placed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    alone = jax.jit(sharded(functools.partial(three_steps, tx)))(*placed)
    assert np.any(np.asarray(alone["w"]) != np.asarray(expected["w"]))


def test_specs_that_do_not_fit():
    for wrong in (3, None):
        message = f"specs must be a tree of PartitionSpec, got {wrong} at 'w'"
        with pytest.raises(ValueError, match=message), ao.global_coordinates({"w": wrong}):
            pass
    tx, params = ao.stochastic_rounding(), {"w": jnp.ones(4, jnp.bfloat16)}
    with (
        ao.global_coordinates({"w": PartitionSpec(None, "x")}),
        pytest.raises(ValueError, match="has 1 axes"),
    ):
        tx.update(params, tx.init(params), params)
    wrong = ao.global_coordinates({"w": PartitionSpec("x")})
    with wrong, pytest.raises(ValueError, match="must be those of the jax.shard_map around it"):
        tx.update(params, tx.init(params), params)
    tx.update(params, tx.init(params), params)
