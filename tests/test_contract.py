"""The ten contracts of every transformation, on every case of the registry.

1. Pure and traceable. 2. Fixed state. 3. float32 at least. 4. Hyperparameters may be traced. 5. Degenerate
input. 6. Extra arguments. 7. Sharding. 8. Resume. 9. Low precision tracks float32. 10. What an unusual
gradient leaves behind is what is documented.

Exceptions are declared in `cases.py` with their reasons. Here one that is declared and not needed fails.
"""

import copy
import dataclasses
import functools
import inspect
import math
import pickle
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tracking
from cases import CASES, Case, mixed_params, random_gradients
from jax.sharding import NamedSharding, PartitionSpec
from lossy import Lossy
from saving import spec

import adaptive_optax as ao
from adaptive_optax._core.paths import paths_and_leaves
from adaptive_optax.transforms.direction import bound_of


def parametrised(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


all_cases = parametrised(CASES)
traceable = parametrised([case for case in CASES if not case.not_traceable])


def assert_close(actual, expected, case: Case):
    """Trees equal to float32 rounding; with a lossy storage but for 1 % of the values, those to two levels.

    Sums of terms with both signs may cancel, so the tree's largest value sets the absolute tolerance.
    """
    actual, expected = jax.tree.map(np.asarray, (actual, expected))
    floats = [x for x in jax.tree.leaves(expected) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
    largest = max((float(np.max(np.abs(x))) for x in floats), default=0.0)

    def leaf(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jnp.issubdtype(a.dtype, jnp.integer):
            atol = 1 if case.rounding and a.dtype in (jnp.int8, jnp.uint8) else 0
            np.testing.assert_allclose(a.astype(int), b.astype(int), rtol=0, atol=atol)
            return np.sum(a != b), a.size
        wide = jnp.promote_types(a.dtype, jnp.float32)
        a, b = a.astype(wide), b.astype(wide)
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=(1e-6 + 2 * case.rounding) * largest)
        return np.sum(~np.isclose(a, b, rtol=2e-6, atol=1e-6 * largest)), a.size

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    differing, size = np.sum(
        [leaf(a, b) for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)]
        or [(0, 0)],
        axis=0,
    )
    assert differing <= (max(2, 0.01 * size) if case.rounding else 0)


def run(tx, params, gradients, state=None, *, period=1):
    """Takes a step of `period` calls for each gradient; returns the updates of the last call of each."""
    state = tx.init(params) if state is None else state
    updates = []
    for g in gradients:
        for _ in range(period):
            u, state = tx.update(g, state, params)
        updates.append(u)
    return updates, state


def jitted(tx):
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def several_gradients(params, n=3):
    return [random_gradients(params, seed) for seed in range(n)]


class Stepper(NamedTuple):
    """A case on `mixed_params`, whose step is compiled once for all tests that take such steps.

    Attributes:
        init: Returns a fresh state.
        step: The jitted update, of gradients and a state, a copy of which is donated; plain where it cannot
            be traced.
        traces: Grows by one whenever the step is traced.
    """

    init: Any
    step: Any
    traces: list


def case_of(name: str) -> Case:
    (case,) = (case for case in CASES if case.name == name)
    return case


@functools.cache
def stepper(name: str) -> Stepper:
    case = case_of(name)
    tx, params, traces = case.make(), mixed_params(), []

    def step(gradients, state):
        traces.append(None)
        return tx.update(gradients, state, params)

    jitted_step = jax.jit(step, donate_argnums=1)

    def donating(gradients, state):
        return jitted_step(gradients, jax.tree.map(jnp.copy, state))

    return Stepper(lambda: tx.init(params), step if case.not_traceable else donating, traces)


class Outcome(NamedTuple):
    """The updates of every step, and the states before the first and after each."""

    updates: list
    states: list

    def at(self, step):
        """The update of the unusual coordinate."""
        return float(self.updates[step]["block"]["kernel"][0, 0])


@functools.cache
def eager_run(name: str) -> Outcome:
    """Three steps without jit, on `mixed_params`."""
    tx, params = case_of(name).make(), mixed_params()
    updates, states = [], [tx.init(params)]
    for g in several_gradients(params):
        u, state = tx.update(g, states[-1], params)
        updates.append(u)
        states.append(state)
    return Outcome(updates, states)


def test_the_registry_has_every_public_factory():
    def builds_a_transformation(value):
        if not inspect.isfunction(value):
            return False
        returned = typing.get_type_hints(value).get("return")
        return inspect.isclass(returned) and issubclass(returned, optax.GradientTransformationExtraArgs)

    public = {name for name, value in vars(ao).items() if builds_a_transformation(value)}
    assert public == {case.factory for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


@all_cases
def test_exceptions_have_reasons(case):
    """Every field of a case that exempts it is a sentence; a flag would be True."""
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    plain = {"name", "factory", "make", "sweep", "arguments", "period", "given_to_update"}
    for name, value in fields.items():
        if name not in plain and value not in ("", None):  # which exempt from nothing
            reason = value if isinstance(value, str) else value.reason
            assert isinstance(reason, str) and " " in reason, name


# 1. Pure and traceable.


@traceable
def test_jit_vmap_scan_and_cond_give_what_eager_gives(case):
    tx, params = case.make(), mixed_params()
    gradients = several_gradients(params)
    expected, (*_, expected_state) = eager_run(case.name)

    def body(state, g):
        def leave(g, state):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), expected[0]), state

        def take(g, state):
            return tx.update(g, state, params)

        is_finite = jnp.isfinite(sum(jnp.sum(jnp.abs(x)).astype(jnp.float32) for x in jax.tree.leaves(g)))
        updates, state = jax.lax.cond(is_finite, take, leave, g, state)
        return state, updates

    @jax.jit
    def traced(batch_of_gradients):
        return jax.vmap(lambda gradients: jax.lax.scan(body, tx.init(params), gradients))(batch_of_gradients)

    in_time = jax.tree.map(lambda *x: np.stack(x), *gradients)
    states, updates = jax.tree.map(np.asarray, traced(jax.tree.map(lambda x: np.stack([-2 * x, x]), in_time)))
    for i, u in enumerate(expected):
        assert_close(jax.tree.map(lambda x, i=i: x[1, i], updates), u, case)
    assert_close(jax.tree.map(lambda x: x[1], states), expected_state, case)


@traceable
def test_donation_and_abstract_evaluation(case):
    tx, params = case.make(), mixed_params()
    (gradients,) = several_gradients(params, 1)
    expected = eager_run(case.name)
    abstract = jax.eval_shape(tx.init, params)
    assert spec(abstract) == spec(expected.states[0])
    init, step, _ = stepper(case.name)
    updates, new_state = step(gradients, init())
    abstract_updates, abstract_state = jax.eval_shape(tx.update, gradients, abstract, params)
    assert spec(updates) == spec(abstract_updates) and spec(new_state) == spec(abstract_state)
    assert_close(updates, expected.updates[0], case)
    assert_close(new_state, expected.states[1], case)


@parametrised([case for case in CASES if case.not_traceable])
def test_what_is_declared_not_traceable_is_not(case):
    tx, params = case.make(), mixed_params()
    with pytest.raises(RuntimeError):
        jax.jit(tx.update)(params, tx.init(params), params)


@all_cases
def test_a_fresh_state_shares_no_buffer_with_the_parameters_or_in_itself(case):
    # One buffer cannot be donated twice.
    params = mixed_params()
    leaves = [x for x in jax.tree.leaves((params, case.make().init(params))) if x.size]
    places = [x.unsafe_buffer_pointer() for x in leaves]
    assert len(set(places)) == len(places)


# 2. Fixed state.


@traceable
def test_the_state_keeps_its_types_and_a_step_is_traced_once(case):
    init, step, traces = stepper(case.name)
    state = init()
    start = spec(state)
    assert not any(weak for _, _, weak in start[1])
    first, *later = several_gradients(mixed_params())
    _, state = step(first, state)  # traced here, or by a test before this one
    before = len(traces)
    assert before and spec(state) == start
    for gradients in later:
        _, state = step(gradients, state)
        assert spec(state) == start
    assert len(traces) == before


class Held(NamedTuple):
    """A container of parameters that no state has of itself."""

    leaf: Any
    inside: Any


@all_cases
def test_states_are_named_tuples_of_arrays(case):
    # Moments have the parameters' containers. Else there are NamedTuples, tuples and dictionaries with names.
    kernel = {"kernel": jnp.ones((2, 80))}
    params = Held(leaf=jnp.ones(3), inside=[kernel, jnp.ones((), jnp.bfloat16)])
    state = case.make().init(params)
    arrays = []

    def walk(node):
        if isinstance(node, jax.Array):
            assert jnp.issubdtype(node.dtype, jnp.number) or node.dtype == jnp.bool_, node  # no PRNG keys
            assert not node.weak_type
            arrays.append(node)
        elif type(node) is dict:
            assert all(type(key) is str for key in node)
            for child in node.values():
                walk(child)
        elif isinstance(node, tuple):
            assert type(node) is tuple or isinstance(node, Held) or type(node).__doc__, type(node)
            assert type(node) is tuple or hasattr(node, "_fields"), type(node)
            for child in node:
                walk(child)
        elif type(node) is list:  # a part of the parameters' tree
            assert len(node) == 2 and type(node[0]) in (dict, optax.MaskedNode)
            for child in node:
                walk(child)
        else:
            assert node is None, node

    walk(state)
    assert len(arrays) == len(jax.tree.leaves(state))  # nothing is hidden in a node that is not walked


# 3. float32 at least.


@all_cases
@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_low_precision_leaves_have_float32_updates_and_state(case, dtypes):
    tx = case.make()
    params = {"a": jnp.ones(3, dtypes[0]), "b": jnp.ones((2, 2), jnp.float32)}
    gradients = {"a": jnp.full(3, 0.5, dtypes[1]), "b": jnp.ones((2, 2), jnp.float32)}
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    (updates, zero_updates), state = run(tx, params, [gradients, zeros], period=case.period)
    found = {u.dtype for u in jax.tree.leaves((updates, zero_updates))}
    assert (found == {jnp.dtype("float32")}) != bool(case.updates_dtype)
    assert_finite((updates, zero_updates))
    if not case.rounding:
        kinds = {x.dtype for x in jax.tree.leaves(state)}
        assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32"), jnp.dtype("bool")}
    assert optax.apply_updates(params, updates)["a"].dtype == params["a"].dtype


@parametrised([case for case in CASES if case.rounds])
def test_what_is_declared_rounded_is(case):
    """Either something in the state has few bits, or the sums of parameters and updates have."""
    tx, params = case.make(), {"a": jnp.ones(3, jnp.bfloat16), "kernel": jnp.ones((2, 80), jnp.bfloat16)}
    (updates,), state = run(
        tx, params, [jax.tree.map(lambda x: jnp.full_like(x, 0.123, jnp.float32), params)]
    )
    is_kept_in_few = any(x.dtype.itemsize < 4 and x.dtype != bool for x in jax.tree.leaves(state))
    sums = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u.astype(jnp.float32), params, updates)
    lands = all(bool(jnp.all(x == x.astype(jnp.bfloat16))) for x in jax.tree.leaves(sums))
    assert is_kept_in_few or lands


@traceable
def test_float64_parameters_have_float64_updates_and_state(case, x64):
    tx = case.make()
    params = {"a": jnp.full(3, 1.0, jnp.float64), "b": jnp.ones(2, jnp.float32)}
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert (updates["a"].dtype, updates["b"].dtype) == (jnp.float64, jnp.float32)
    assert spec(new_state) == spec(state)
    if not case.rounding:
        scalars = [x for x in jax.tree.leaves(state) if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.floating)]
        assert ({x.dtype for x in scalars} <= {jnp.dtype("float64")}) != bool(case.own_scalars)


@traceable
def test_strict_dtype_promotion(case):
    tx, params = case.make(), mixed_params()
    (gradients,) = several_gradients(params, 1)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(tx.update, gradients, jax.eval_shape(tx.init, params), params)


@traceable
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_strict_dtype_promotion_where_parameters_and_gradients_differ(case, dtype, x64):
    params = {"a": jnp.ones(3, dtype), "kernel": jnp.ones((2, 80), dtype)}
    tx = case.make()
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(tx.init, params)
        for kind in (dtype, "float32"):
            gradients = jax.tree.map(lambda x, kind=kind: jax.ShapeDtypeStruct(x.shape, kind), params)
            _, new_state = jax.eval_shape(tx.update, gradients, state, params)
            assert spec(new_state) == spec(state)


# 4. Hyperparameters may be traced.


@parametrised([case for case in CASES if case.sweep])
def test_a_sweep_is_a_vmap(case):
    params = mixed_params()
    gradients = several_gradients(params, 2)

    @jax.jit
    @jax.vmap
    def swept(values):
        updates, state = run(case.make(**values), params, gradients)
        return [*updates, state]

    names = list(case.sweep)
    rows = [dict(zip(names, [case.sweep[n][i] for n in names], strict=True)) for i in (0, 1)]
    together = jax.tree.map(np.asarray, swept({n: jnp.asarray(case.sweep[n]) for n in names}))
    alone = []
    for i, row in enumerate(rows):
        # As float32 scalars, so that both have the same 1 - b: a Python number has a more exact one.
        updates, state = run(case.make(**{n: jnp.float32(v) for n, v in row.items()}), params, gradients)
        expected = [*updates, state]
        for a, b in zip(together, expected, strict=True):
            assert_close(jax.tree.map(lambda x, i=i: x[i], a), b, case)
        alone.append(jax.tree.leaves(expected))
    assert not all(map(np.array_equal, *alone))  # or the sweep would prove nothing


# 5. Degenerate input.


def all_finite(tree):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(jax.tree.map(np.asarray, tree)))


def is_moving(updates):
    return any(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates))


def assert_finite(tree):
    assert all_finite(tree)


@all_cases
def test_zero_gradients(case):
    params = mixed_params()
    zeros = jax.tree.map(jnp.zeros_like, params)
    seen = outcome(case, [zeros, zeros, random_gradients(params, 1)])
    *updates, later = seen.updates
    assert is_moving(updates) == bool(case.zero_moves)
    assert_finite((seen.updates, seen.states[-1]))
    assert all(map(is_moving, [u for u in jax.tree.leaves(later) if u.size]))


@traceable
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jitted", "eager"])
def test_nans_and_infinities_can_be_debugged(case, wrap):
    # Without jit the flags stop at every intermediate value.
    tx, params = case.make(), {"a": jnp.ones((2, 64)), "b": jnp.ones(3)}
    with jax.debug_nans(True), jax.debug_infs(True):
        state = wrap(tx.init)(params)
        step = wrap(tx.update)
        for gradients in (jax.tree.map(jnp.zeros_like, params), random_gradients(params, 0)):
            for _ in range(case.period):
                _, state = step(gradients, state, params)


@all_cases
def test_tiny_and_huge_gradients(case):
    tx = case.make()
    params = {"a": jnp.ones((2, 500)), "b": jnp.ones(3, jnp.complex64)}
    ordinary = random_gradients(params, 0)

    def scaled(scale):
        return jax.tree.map(lambda x: x * scale, ordinary)

    if not case.not_traceable:
        tx = jitted(tx)
    for scale in (1e-30, 1e-20, 1e-10, 1e10, 1e15 if case.shares else 1e18):
        updates, state = run(tx, params, [scaled(scale)] * 2, period=case.period)
        assert_finite((updates, state))
        # A gradient of ordinary size afterwards is not swallowed for ever.
        (later,), state = run(tx, params, [random_gradients(params, 1)], state, period=case.period)
        assert_finite((later, state))
    if case.shares:  # a thousand of 1e18 are too many
        _, state = run(tx, params, [scaled(1e18)], period=case.period)
        assert not all_finite(state)


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
    gradients = {"a": jnp.array([1.0, jnp.nan, 1.0])}
    if case.after_nan.kind == "raises":
        with pytest.raises(AssertionError, match="'a'"):
            tx.update(gradients, tx.init(params), params)
        return
    (updates,), _ = run(tx, params, [gradients], period=case.period)
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
    seen = eager_run(case.name)
    expected = seen.updates[0], seen.states[1]
    actual = tx.update(gradients, seen.states[0], params, value=1.0, nobody_knows=object())
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# 7. Sharding.


AXES = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}
SPECS = {
    "first": PartitionSpec("x"),
    "last": PartitionSpec(None, "x"),
    "both": PartitionSpec("x", "y"),
    "whole": PartitionSpec(),
}


@functools.cache
def whole_params():
    """Parameters that can be sharded as `SPECS` says, and gradients."""
    shapes = {"first": (16,), "last": (3, 16), "both": (4, 128), "whole": (2,)}
    params = {name: jnp.linspace(-1, 2, np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    return params, random_gradients(params, 0)


@functools.cache
def sharded_params(axes):
    """The same, sharded along any of their axes, the mesh and the shardings."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AXES[axes],) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return mesh, jax.device_put(whole_params(), (shardings, shardings)), shardings


@functools.cache
def unsharded_step(name: str):
    """The updates and the state after the first step on one device."""
    tx, (params, gradients) = case_of(name).make(), whole_params()
    return jax.jit(tx.update)(gradients, tx.init(params), params)


def shardings_of(state):
    return [(jax.typeof(x).sharding.spec, x.shape, x.dtype) for x in jax.tree.leaves(state)]


def expected_spec(path, shape, params):
    """How a leaf of the state is to be sharded.

    What stands at the place of a parameter and has its axes (a moment, a moment that is reduced along some
    axes, codes, scales of blocks) keeps the names of the axes that it has in full, or in blocks; everything
    else, scalars and vectors for leaves together, is on all devices.
    """
    *parts, name = path.split("/")
    if name not in params or len(shape) != params[name].ndim:
        return PartitionSpec()
    in_blocks = "scale" in parts
    names = [*SPECS[name], *[None] * len(shape)]
    sizes = zip(names, shape, params[name].shape, strict=False)
    return PartitionSpec(*(axis if n == size or (in_blocks and n > 1) else None for axis, n, size in sizes))


def step_of(tx):
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), updates, state

    return step


@pytest.mark.parametrize("axes", AXES)
@traceable
def test_a_sharded_step_equals_the_unsharded_one(case, axes):
    mesh, (params, gradients), shardings = sharded_params(axes)
    tx = case.make()
    expected, expected_state = unsharded_step(case.name)
    state = tx.init(params)  # outside of jax.set_mesh
    placed = ao.state_sharding(tx, params)
    start = jax.jit(tx.init, out_shardings=placed)(params)
    jax.tree.map(np.testing.assert_array_equal, start, state)
    with jax.set_mesh(mesh):
        step = jax.jit(step_of(tx), out_shardings=(shardings, shardings, placed))
        new_params, updates, new_state = step(gradients, start, params)
        step(gradients, new_state, new_params)
    assert step._cache_size() == 1
    for (path, x), sharding in zip(paths_and_leaves(start), jax.tree.leaves(placed), strict=True):
        expected_sharding = NamedSharding(mesh, expected_spec(path, x.shape, params))
        assert sharding.is_equivalent_to(expected_sharding, x.ndim), (path, sharding)
    assert_close(updates, expected, case)
    assert_close(new_state, expected_state, case)
    for tree in (updates, new_params):
        assert all(tree[name].sharding.is_equivalent_to(shardings[name], tree[name].ndim) for name in params)
    for path, x in paths_and_leaves(new_state):
        expected = NamedSharding(mesh, expected_spec(path, x.shape, params))
        assert x.sharding.is_equivalent_to(expected, x.ndim), (path, x.sharding)
    for path, x in paths_and_leaves(state):
        # Until the first step scalars, and reduced moments on auto axes, need not be bound to devices.
        param = params.get(path.split("/")[-1])
        if x.committed or (param is not None and x.ndim == param.ndim > 0 and axes == "explicit"):
            expected = NamedSharding(mesh, expected_spec(path, x.shape, params))
            assert x.sharding.is_equivalent_to(expected, x.ndim), (path, x.sharding)
        else:
            assert param is None or x.shape != param.shape, path


@traceable
def test_shardings_in_types_are_kept_by_a_step(case):
    mesh, (params, gradients), _ = sharded_params("explicit")
    tx = case.make()
    state = tx.init(params)
    kept = shardings_of(state)
    assert shardings_of(jax.eval_shape(step_of(tx), gradients, state, params)[2]) == kept
    with jax.set_mesh(mesh):
        assert shardings_of(tx.init(params)) == kept
        assert shardings_of(jax.eval_shape(tx.init, params)) == kept

        def body(carry, _):
            params, state = carry
            params, _, state = step_of(tx)(gradients, state, params)
            return (params, state), None

        # The scan itself refuses a carry whose sharding changes.
        (_, state), _ = jax.eval_shape(lambda carry: jax.lax.scan(body, carry, length=2), (params, state))
    assert shardings_of(state) == kept


# 8. Resume.


@traceable
def test_a_restored_state_continues_bit_for_bit(case):
    init, step, _ = stepper(case.name)
    gradients = several_gradients(mixed_params(), 4)
    state = init()
    for g in gradients[:2]:
        _, state = step(g, state)
    saved = pickle.dumps([np.asarray(x) for x in jax.tree.leaves(state)])
    for g in gradients[2:]:
        expected, state = step(g, state)
    restored = jax.tree.unflatten(jax.tree.structure(init()), [jnp.asarray(x) for x in pickle.loads(saved)])
    for g in gradients[2:]:
        updates, restored = step(g, restored)
    jax.tree.map(np.testing.assert_array_equal, (updates, restored), (expected, state))


# 9. Low precision tracks float32.


@parametrised([case for case in CASES if not (case.not_traceable or case.untracked)])
def test_a_thousand_steps_in_low_precision_track_float32(case):
    runs = tracking.runs_of(case)
    found = tracking.distances(case, runs)
    for run in runs[1:]:
        assert all(found[run.name][leaf] <= run.allowed[leaf] < math.inf for leaf in run.allowed), (
            run,
            found[run.name],
        )


@parametrised([case for case in CASES if case.untracked])
def test_what_is_declared_untracked_has_no_bound(case):
    assert any(math.isinf(x) for run in tracking.runs_of(case) for x in run.allowed.values())


# 10. What an unusual gradient leaves behind.

# What may change in the state at a rejected step.
COUNTERS = {"total", "in_a_row", "counts", "scale", "fin_steps"}
UNUSUAL = {"zero": 0.0, "spike": 1e20, "nan": float("nan")}
BEFORE = 3


def outcome(case, gradients):
    init, step, _ = stepper(case.name)
    updates, states = [], [init()]
    for g in gradients:
        state = states[-1]
        for _ in range(case.period):
            u, state = step(case.given_to_update(g, state), state)
        updates.append(u)
        states.append(state)
    return Outcome(updates, states)


@functools.cache
def usual_run(name: str) -> Outcome:
    """What ordinary gradients lead to."""
    return outcome(case_of(name), several_gradients(mixed_params(), BEFORE + 4))


def assert_identical(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("unusual", UNUSUAL)
@all_cases
def test_what_an_unusual_gradient_leaves_behind(case, unusual):
    declared = getattr(case, f"after_{unusual}")
    gradients = several_gradients(mixed_params(), BEFORE + 4)
    ordinary, later = gradients[BEFORE], gradients[BEFORE + 1 :]
    if unusual == "zero":
        one = jax.tree.map(jnp.zeros_like, ordinary)
    else:
        kernel = ordinary["block"]["kernel"].at[0, 0].set(UNUSUAL[unusual])
        one = ordinary | {"block": ordinary["block"] | {"kernel": kernel}}
    with_it = [*gradients[:BEFORE], one, *later]
    if declared.kind == "raises":
        with pytest.raises(AssertionError, match="block/kernel"):
            outcome(case, with_it)
        return
    seen = outcome(case, with_it)
    AFTERWARDS[declared.kind](case, gradients, seen)


def recovers(case, gradients, seen):
    assert_finite((seen.updates, seen.states))
    assert abs(seen.at(BEFORE)) < 1e15
    assert all(map(is_moving, seen.updates[BEFORE + 1 :]))


def passes(case, gradients, seen):
    assert not abs(seen.at(BEFORE)) < 1e15
    usual = usual_run(case.name)
    assert_identical(seen.updates[BEFORE + 1 :], usual.updates[BEFORE + 1 :])
    assert_identical(seen.states[-1], usual.states[-1])


def fades(case, gradients, seen):
    usual = usual_run(case.name)

    def distance(step):
        pairs = zip(*(jax.tree.leaves(run.states[step]) for run in (seen, usual)), strict=True)
        return max(
            float(np.max(np.abs(np.asarray(x) - np.asarray(y))))
            for x, y in pairs
            if jnp.issubdtype(x.dtype, jnp.floating) and x.size
        )

    assert_finite((seen.updates, seen.states))
    distances = [distance(step) for step in range(BEFORE + 1, len(seen.states))]
    assert all(0 < after < 0.95 * before for before, after in zip(distances, distances[1:], strict=False))


def kept(case, gradients, seen):
    usual = usual_run(case.name)
    assert not abs(seen.at(BEFORE)) < 1e15
    assert not any(map(all_finite, seen.states[BEFORE + 1 :]))
    assert_identical(seen.updates[BEFORE + 1 :], usual.updates[BEFORE + 1 :])


def stops(case, gradients, seen):
    assert not any(map(all_finite, seen.states[BEFORE + 1 :]))
    assert_finite(seen.updates)
    moves = [abs(seen.at(step)) for step in range(BEFORE + 1, len(seen.updates))]
    if not case.zero_moves:
        assert all(after <= 0.95 * before for before, after in zip(moves, moves[1:], strict=False))
    others_do_not_notice(case, gradients, seen)


def poisoned(case, gradients, seen):
    assert not any(map(all_finite, seen.states[BEFORE + 1 :]))
    if not case.hides_nan:
        assert all(math.isnan(seen.at(step)) for step in range(BEFORE, len(seen.updates)))
    others_do_not_notice(case, gradients, seen)


def others_do_not_notice(case, gradients, seen):
    if not case.shares:
        usual = usual_run(case.name)

        def others(updates):
            return [u for path, u in paths_and_leaves(updates) if path != "block/kernel"]

        assert_identical(list(map(others, seen.updates)), list(map(others, usual.updates)))


def rejects(case, gradients, seen):
    assert not is_moving(seen.updates[BEFORE])
    before, after = (dict(paths_and_leaves(seen.states[BEFORE + i])) for i in (0, 1))
    changed = {path for path, x in after.items() if not np.array_equal(x, before[path])}
    assert {path.split("/")[-1] for path in changed} <= COUNTERS
    without = outcome(case, gradients[:BEFORE] + gradients[BEFORE + 1 :])
    assert_identical(seen.updates[BEFORE + 1 :], without.updates[BEFORE:])


AFTERWARDS = {f.__name__: f for f in (recovers, passes, fades, kept, stops, poisoned, rejects)}


# What is particular to a lossy storage.


def test_the_lossy_storage_loses_small_values_as_its_relative_error_says():
    storage, values = Lossy(), jnp.array([1.0, 0.01])
    moment = storage.encode(storage.init(values, "nu"), values, count=jnp.int32(1), role="nu")
    assert storage.decode(moment).tolist() == [1.0, 0.0]
    assert math.isinf(storage.relative_error)


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
    alone, _ = run(case.make(), {"a": params["a"]}, [{"a": gradients["a"]}], period=case.period)
    for tx in (
        optax.masked(case.make(), {"a": True, "b": False}),
        optax.partition({"x": case.make(), "y": optax.set_to_zero()}, {"a": "x", "b": "y"}),
    ):
        (updates,), _ = run(tx, params, [gradients], period=case.period)
        assert_close({"a": updates["a"]}, alone[0], case)


@traceable
def test_it_lives_in_multi_steps(case):
    params = {"a": jnp.ones((2, 3))}
    gradients = several_gradients(params, 2)
    mean = jax.tree.map(lambda *g: sum(g) / 2, *gradients)
    (expected,), _ = run(case.make(), params, [mean], period=case.period)
    *_, updates = run(jitted(optax.MultiSteps(case.make(), 2)), params, gradients * case.period)[0]
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
    shapes = {path: x.shape for path, x in paths_and_leaves(params)}
    leaves = zip(paths_and_leaves(state), jax.tree.leaves(marked), strict=True)
    for (path, x), mark in leaves:
        own = next((param for param in shapes if path == param or path.endswith("/" + param)), None)
        if own is not None and x.shape == shapes[own]:
            assert bool(jnp.all(mark == 7)), path
        elif own is None:
            np.testing.assert_array_equal(mark, x, err_msg=path)


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
