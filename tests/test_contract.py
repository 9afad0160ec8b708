"""The eight contracts of every transformation, on every case of the registry."""

import copy
import inspect
import pickle
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case, mixed_params, random_gradients
from jax.sharding import NamedSharding, PartitionSpec
from lossy import Lossy
from saving import spec

import adaptive_optax as ao
from adaptive_optax.transforms.direction import bound_of


def parametrised(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


all_cases = parametrised(CASES)
traceable = parametrised([case for case in CASES if not case.not_traceable])


def assert_close(actual, expected, case: Case):
    """Trees equal to float32 rounding; with a lossy storage but for 1 % of the values, those to two levels.

    Sums of terms with both signs may cancel, so the tree's largest value sets the absolute tolerance.
    """
    floats = [x for x in jax.tree.leaves(expected) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
    largest = max((float(jnp.max(jnp.abs(x))) for x in floats), default=0.0)

    def leaf(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jnp.integer):
            atol = 1 if case.rounding and a.dtype in (jnp.int8, jnp.uint8) else 0
            np.testing.assert_allclose(np.asarray(a, int), np.asarray(b, int), rtol=0, atol=atol)
            return np.sum(np.asarray(a) != np.asarray(b)), a.size
        wide = jnp.promote_types(a.dtype, jnp.float32)
        a, b = np.asarray(a.astype(wide)), np.asarray(b.astype(wide))
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=(1e-6 + 2 * case.rounding) * largest)
        return np.sum(~np.isclose(a, b, rtol=2e-6, atol=1e-6 * largest)), a.size

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    differing, size = np.sum(
        [leaf(a, b) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)]
        or [(0, 0)],
        axis=0,
    )
    assert differing <= (max(2, 0.01 * size) if case.rounding else 0)


def run(tx, params, gradients, state=None):
    state = tx.init(params) if state is None else state
    updates = []
    for g in gradients:
        u, state = tx.update(g, state, params)
        updates.append(u)
    return updates, state


def several_gradients(params, n=3):
    return [random_gradients(params, seed) for seed in range(n)]


def test_the_registry_has_every_public_factory():
    def builds_a_transformation(value):
        if not inspect.isfunction(value):
            return False
        returned = typing.get_type_hints(value).get("return")
        return inspect.isclass(returned) and issubclass(returned, optax.GradientTransformationExtraArgs)

    public = {name for name, value in vars(ao).items() if builds_a_transformation(value)}
    assert public == {case.factory for case in CASES}


# 1. Pure and traceable.


@traceable
def test_jit_vmap_scan_and_cond_give_what_eager_gives(case):
    tx, params = case.make(), mixed_params()
    gradients = several_gradients(params)
    expected, expected_state = run(tx, params, gradients)

    def body(state, g):
        abstract, _ = jax.eval_shape(tx.update, g, state, params)

        def leave(g, state):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract), state

        def take(g, state):
            return tx.update(g, state, params)

        is_finite = jnp.isfinite(sum(jnp.sum(jnp.abs(x)).astype(jnp.float32) for x in jax.tree.leaves(g)))
        updates, state = jax.lax.cond(is_finite, take, leave, g, state)
        return state, updates

    @jax.jit
    def traced(batch_of_gradients):
        return jax.vmap(lambda gradients: jax.lax.scan(body, tx.init(params), gradients))(batch_of_gradients)

    in_time = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    states, updates = traced(jax.tree.map(lambda x: jnp.stack([-2 * x, x]), in_time))
    for i, u in enumerate(expected):
        assert_close(jax.tree.map(lambda x, i=i: x[1, i], updates), u, case)
    assert_close(jax.tree.map(lambda x: x[1], states), expected_state, case)


@traceable
def test_donation_and_abstract_evaluation(case):
    tx, params = case.make(), mixed_params()
    (gradients,) = several_gradients(params, 1)
    state = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    assert spec(abstract) == spec(state)
    (expected,), expected_state = run(tx, params, [gradients])
    donated = jax.tree.map(lambda x: x + jnp.zeros_like(x), state)
    updates, new_state = jax.jit(tx.update, donate_argnums=1)(gradients, donated, params)
    abstract_updates, abstract_state = jax.eval_shape(tx.update, gradients, abstract, params)
    assert spec(updates) == spec(abstract_updates) and spec(new_state) == spec(abstract_state)
    assert_close(updates, expected, case)
    assert_close(new_state, expected_state, case)


# 2. Fixed state.


@traceable
def test_the_state_keeps_its_types_and_a_step_is_traced_once(case):
    tx, params = case.make(), mixed_params()
    state, traces = tx.init(params), []

    @jax.jit
    def step(gradients, state):
        traces.append(None)
        return tx.update(gradients, state, params)[1]

    start = spec(state)
    assert not any(weak for _, _, weak in start[1])
    for gradients in several_gradients(params):
        state = step(gradients, state)
        assert spec(state) == start
    assert len(traces) == 1


@all_cases
def test_states_are_named_tuples_of_arrays(case):
    def walk(node):
        if isinstance(node, dict):
            children = list(node.values())
        elif isinstance(node, tuple):
            children = list(node)
        else:
            assert node is None or isinstance(node, jax.Array), node
            children = []
        for child in children:
            walk(child)

    walk(case.make().init(mixed_params()))


# 3. float32 at least.


@all_cases
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_low_precision_leaves_have_float32_updates_and_state(case, dtypes):
    tx = case.make()
    params = {"a": jnp.ones(3, dtypes[0]), "b": jnp.ones((2, 2), jnp.float32)}
    gradients = {"a": jnp.full(3, 0.5, dtypes[1]), "b": jnp.ones((2, 2), jnp.float32)}
    (updates, zero_updates), state = run(tx, params, [gradients, jax.tree.map(jnp.zeros_like, gradients)])
    assert {u.dtype for u in jax.tree.leaves((updates, zero_updates))} == {jnp.dtype("float32")}
    assert all(bool(jnp.all(jnp.isfinite(u))) for u in jax.tree.leaves((updates, zero_updates)))
    if not case.rounding:
        kinds = {x.dtype for x in jax.tree.leaves(state)}
        assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32"), jnp.dtype("bool")}
    assert optax.apply_updates(params, updates)["a"].dtype == params["a"].dtype


@traceable
def test_float64_parameters_have_float64_updates_and_state(case, x64):
    tx = case.make()
    params = {"a": jnp.full(3, 1.0, jnp.float64), "b": jnp.ones(2, jnp.float32)}
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert (updates["a"].dtype, updates["b"].dtype) == (jnp.float64, jnp.float32)
    assert spec(new_state) == spec(state)
    if not case.rounding and case.scalars_follow:
        scalars = [x for x in jax.tree.leaves(state) if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.floating)]
        assert {x.dtype for x in scalars} <= {jnp.dtype("float64")}


@traceable
def test_strict_dtype_promotion(case):
    tx, params = case.make(), mixed_params()
    (gradients,) = several_gradients(params, 1)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(tx.update, gradients, jax.eval_shape(tx.init, params), params)


# 4. Hyperparameters may be traced.


@parametrised([case for case in CASES if case.sweep])
def test_a_sweep_is_a_vmap(case):
    params = mixed_params()
    gradients = several_gradients(params, 2)

    @jax.jit
    @jax.vmap
    def swept(values):
        updates, _ = run(case.make(**values), params, gradients)
        return updates

    names = list(case.sweep)
    rows = [dict(zip(names, [case.sweep[n][i] for n in names], strict=True)) for i in (0, 1)]
    together = swept({n: jnp.asarray(case.sweep[n]) for n in names})
    for i, row in enumerate(rows):
        expected, _ = run(case.make(**{n: jnp.float32(v) for n, v in row.items()}), params, gradients)
        # As float32 scalars, so that both have the same 1 - b: a Python number has a more exact one.
        for a, b in zip(together, expected, strict=True):
            assert_close(jax.tree.map(lambda x, i=i: x[i], a), b, case)


# 5. Degenerate input.


def assert_finite(tree):
    for x in jax.tree.leaves(tree):
        assert bool(jnp.all(jnp.isfinite(x)))


@all_cases
def test_zero_gradients(case):
    tx, params = case.make(), mixed_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = run(tx, params, [zeros, zeros])
    assert case.zero_moves or not any(jnp.any(u != 0) for u in jax.tree.leaves(updates))
    (later,), state = run(tx, params, [random_gradients(params, 1)], state)
    assert_finite((updates, later, state))
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(later) if u.size)


@all_cases
def test_tiny_and_huge_gradients(case):
    tx = case.make()
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.complex64)}
    largest = 1e15 if case.shares else 1e18
    for scale in (1e-30, 1e-20, 1e-10, 1e10, largest):
        gradients = jax.tree.map(lambda x, scale=scale: x * scale, random_gradients(params, 0))
        updates, state = run(tx, params, [gradients, gradients])
        assert_finite((updates, state))
        # A gradient of ordinary size afterwards is not swallowed for ever.
        (later,), state = run(tx, params, [random_gradients(params, 1)], state)
        assert_finite((later, state))


@all_cases
def test_trees_without_leaves_or_with_one_array(case):
    tx = case.make()
    for params in ({}, None, {"a": None, "b": optax.MaskedNode()}, jnp.zeros((0, 3)), jnp.ones(())):
        updates, state = tx.update(params, tx.init(params), {} if params is None else params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert_finite((updates, state))


@all_cases
def test_non_finite_gradients_are_not_hidden(case):
    tx, params = case.make(), {"a": jnp.ones(3)}
    if case.raises_at_nan:
        with pytest.raises(AssertionError, match="'a'"):
            tx.update({"a": jnp.array([1.0, jnp.nan, 1.0])}, tx.init(params), params)
        return
    updates, _ = tx.update({"a": jnp.array([1.0, jnp.nan, 1.0])}, tx.init(params), params)
    assert jnp.isnan(updates["a"][1]) != bool(case.hides_nan)


@all_cases
def test_an_integer_leaf_is_refused_by_path(case):
    with pytest.raises(ValueError, match="'block/steps'.*int32"):
        case.make().init({"block": {"steps": jnp.ones(2, jnp.int32)}})


# 6. Extra arguments.


@all_cases
def test_unknown_extra_arguments_are_ignored(case):
    tx, params = case.make(), mixed_params()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    (gradients,) = several_gradients(params, 1)
    expected = tx.update(gradients, tx.init(params), params)
    actual = tx.update(gradients, tx.init(params), params, value=1.0, nobody_knows=object())
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# 7. Sharding.


@pytest.mark.filterwarnings("ignore:.*[Dd]onat.*")
@traceable
def test_a_sharded_step_equals_the_unsharded_one(case):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = {
        "a": NamedSharding(mesh, PartitionSpec("x")),
        "b": NamedSharding(mesh, PartitionSpec(None, "x")),
    }
    params = {"a": jnp.linspace(-1, 1, 16), "b": jnp.linspace(-2, 1, 48).reshape(3, 16)}
    gradients = random_gradients(params, 0)
    tx = case.make()
    (expected,), expected_state = run(tx, params, [gradients])
    params, gradients = jax.device_put((params, gradients), (shardings, shardings))
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(gradients, state, params)
    assert_close(updates, expected, case)
    assert_close(new_state, expected_state, case)
    for name in ("a", "b"):
        assert updates[name].sharding.is_equivalent_to(shardings[name], updates[name].ndim)
    if case.rounding:
        return
    by_shape = {params[name].shape: shardings[name] for name in params}
    for moments in (state, new_state):
        for x in jax.tree.leaves(moments):
            if x.shape in by_shape:
                assert x.sharding.is_equivalent_to(by_shape[x.shape], x.ndim)


# 8. Resume.


@traceable
def test_a_restored_state_continues_bit_for_bit(case):
    tx, params = case.make(), mixed_params()
    gradients = several_gradients(params, 4)
    step = jax.jit(lambda g, state: tx.update(g, state, params))
    state = tx.init(params)
    for g in gradients[:2]:
        _, state = step(g, state)
    saved = pickle.dumps([np.asarray(x) for x in jax.tree.leaves(state)])
    for g in gradients[2:]:
        expected, state = step(g, state)
    restored = jax.tree.unflatten(
        jax.tree.structure(tx.init(params)), [jnp.asarray(x) for x in pickle.loads(saved)]
    )
    for g in gradients[2:]:
        updates, restored = step(g, restored)
    jax.tree.map(np.testing.assert_array_equal, (updates, restored), (expected, state))


def test_the_lossy_storage_is_asked_for_a_floor():
    Lossy.floors_called.clear()
    tx, params = ao.scale_by_adam(nu_storage=Lossy()), {"a": jnp.ones(3)}
    tx.update(params, tx.init(params))
    assert Lossy.floors_called == ["decode"]


@pytest.mark.parametrize("granularity", [ao.Coordinate(), ao.Tensor(), ao.Global(), ao.Axis(0)], ids=str)
@pytest.mark.parametrize("lossy", ["mu_storage", "nu_storage"])
def test_the_floor_keeps_adams_bound_in_a_lossy_storage(granularity, lossy):
    # A spike in one coordinate rounds the others' second moments to zero; then the gradients stop.
    tx = ao.scale_by_adam(granularity=granularity, **{lossy: Lossy()})
    gradients = np.zeros((60, 4, 2), np.float32)
    gradients[:20] = 1e-4 * np.random.default_rng(0).normal(size=(20, 4, 2))
    gradients[20, 0, 0] = 1.0

    def body(state, g):
        u, state = tx.update(g, state)
        return state, (granularity.pool(jnp.square(u)), bound_of(tx).max_ratio(state))

    _, (pooled, bound) = jax.lax.scan(body, tx.init(jnp.zeros((4, 2))), jnp.asarray(gradients))
    largest = np.max(np.asarray(pooled).reshape(60, -1), axis=1)
    assert np.all(largest <= np.square(bound) * (1 + 2e-5))
    assert np.any(largest > 0.5 * np.square(bound))


# Composition: everything is an ordinary optax transformation.


@traceable
def test_it_lives_in_masked_and_partition(case):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    (gradients,) = several_gradients(params, 1)
    alone, _ = run(case.make(), {"a": params["a"]}, [{"a": gradients["a"]}])
    for tx in (
        optax.masked(case.make(), {"a": True, "b": False}),
        optax.partition({"x": case.make(), "y": optax.set_to_zero()}, {"a": "x", "b": "y"}),
    ):
        (updates,), _ = run(tx, params, [gradients])
        assert_close({"a": updates["a"]}, alone[0], case)


@traceable
def test_it_lives_in_multi_steps(case):
    params = {"a": jnp.ones((2, 3))}
    gradients = several_gradients(params, 2)
    mean = jax.tree.map(lambda *g: sum(g) / 2, *gradients)
    (expected,), _ = run(case.make(), params, [mean])
    (_, updates), _ = run(optax.MultiSteps(case.make(), 2), params, gradients)
    assert_close(updates, expected, case)


@parametrised([case for case in CASES if case.sweep])
def test_its_hyperparameters_can_be_injected(case):
    params = {"a": jnp.ones((2, 3))}
    gradients = several_gradients(params, 2)
    numbers = {name: values[0] for name, values in case.sweep.items()}
    others = {name: value for name, value in case.arguments.items() if name not in numbers}
    inject = optax.inject_hyperparams(getattr(ao, case.factory), static_args=tuple(others))
    injected = inject(**others, **numbers)
    updates, state = run(injected, params, gradients)
    as_float32 = {name: jnp.float32(value) for name, value in numbers.items()}
    expected, _ = run(case.make(**as_float32), params, gradients)
    assert_close(updates[1], expected[1], case)
    assert set(numbers) <= set(state.hyperparams)


@all_cases
def test_copies_and_passes_through_a_tree_work(case):
    tx = case.make()
    params = {"a": jnp.ones(3)}
    expected = tx.update(params, tx.init(params), params)
    for other in (copy.copy(tx), copy.deepcopy(tx), jax.tree.map(lambda x: x, tx), tx._replace(init=tx.init)):
        assert bound_of(other) == bound_of(tx)
        jax.tree.map(
            np.testing.assert_array_equal, other.update(params, other.init(params), params), expected
        )


@traceable
def test_tree_map_params_finds_what_is_like_the_parameters(case):
    tx, params = case.make(), mixed_params()
    state = tx.init(params)
    marked = optax.tree_map_params(tx, lambda x: jnp.full_like(x, 7), state)
    assert jax.tree.structure(marked) == jax.tree.structure(state)


def test_masks_and_patterns_of_the_whole_tree_hold_for_a_part_of_it():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    for tx in (
        ao.adamw(0.1, mask={"a": True, "b": False}),
        ao.adamw(0.1, mask=lambda params: {"a": True, "b": False}),
        ao.adam(0.1, granularity=ao.Labels.by_path({"a": 0, "b": 1})),
    ):
        for whole in (
            optax.partition({"x": tx, "y": ao.sgd(0.1)}, {"a": "x", "b": "y"}),
            optax.masked(tx, {"a": True, "b": False}),
        ):
            updates, _ = whole.update(params, whole.init(params), params)
            assert updates["a"].shape == (2,)
        optax.tree_map_params(tx, lambda x: x, tx.init(params))
