"""`verified`: silent on everything that is right, and precise about what is wrong.

One compiled run a case carries a verified transformation and the bare one side by side over a sequence; right
and corrupted runs share it.
"""

import functools
import inspect
import re
import textwrap
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference.adam import extremal_sequence

import adaptive_optax as ao
from adaptive_optax._core.described import described
from adaptive_optax._core.transformation import transformation as made
from adaptive_optax.transforms.direction import bound_of

STEPS = 120
PARAMS = {"dense": {"bias": np.ones(4, np.float32), "kernel": np.ones((3, 4), np.float32)}}
ONE_LABEL = ao.Labels(lambda path, leaf: "all")

GRANULARITIES = {
    "coordinate": ao.Coordinate(),
    "axis": ao.Axis(1),  # the bias has none
    "axes, sum": ao.Axis(0, -1, reduce="sum"),
    "tensor": ao.Tensor(),
    "tensor, sum": ao.Tensor("sum"),
    "one label": ONE_LABEL,
    "labels, sum": ao.Labels.by_path({"bias": "biases"}, default="rest", reduce="sum"),
    "global": ao.Global(),
    "global, sum": ao.Global("sum"),
}


def falling(count):
    """From 0.98 down to 0.7: a decay of the second moment that moves."""
    return 0.98 - 0.28 * count / 200.0


def rising(count):
    """From 0.4 up to 0.8, below the root of `falling`."""
    return 0.4 + 0.4 * count / 200.0


# name: (arguments of scale_by_adam, whether the extremal sequence attains the bound: not with a large eps)
ADAM = {f"adam, {name}": ({"granularity": value}, True) for name, value in GRANULARITIES.items()} | {
    "nadam": ({"nesterov": True}, True),
    "nadam, amsgrad, uncorrected, tensor": (
        {"nesterov": True, "amsgrad": True, "bias_correction": False, "granularity": "tensor"},
        True,
    ),
    "amsgrad, nesterov, one label": ({"amsgrad": True, "nesterov": True, "granularity": ONE_LABEL}, True),
    "tensorflow, axis": ({"eps_form": "tensorflow", "granularity": ao.Axis(0)}, True),
    "eps under the root": ({"eps_root": 1.0, "amsgrad": True}, False),
    "schedules": ({"b1": rising, "b2": falling, "eps": lambda count: 1e-6 / (1.0 + count)}, True),
    "schedules, nesterov, global": (
        {"b1": rising, "b2": falling, "nesterov": True, "granularity": "global"},
        True,
    ),
    "equal decays": ({"b1": 0.95, "b2": 0.95, "eps": 0.0}, True),
    "bfloat16 first moment": ({"mu_dtype": "bfloat16"}, False),
}
RMS = {f"rms, {name}": {"granularity": value} for name, value in GRANULARITIES.items()} | {
    "rms, corrected, beside": {"bias_correction": True, "eps_in_sqrt": False, "granularity": "tensor"},
    "rms, initial scale": {"initial_scale": 1.0, "decay": 0.99},
    "rms, schedule": {"decay": falling, "bias_correction": True},
    "centred": {"centered": True, "eps": 0.0},
    "centred, corrected, one label": {"centered": True, "bias_correction": True, "granularity": ONE_LABEL},
}


def arguments_of(name):
    return ADAM[name][0] if name in ADAM else RMS[name]


@functools.cache
def transformation(name):
    factory = ao.scale_by_adam if name in ADAM else ao.scale_by_rms
    return factory(**arguments_of(name))


def checked_run(tx):
    """Compiles (state, gradients of `STEPS` steps) -> (directions, final state), verified and bare."""
    verified = ao.verified(tx)

    @functools.partial(chex.chexify, async_check=False)
    @jax.jit
    def run(state, gradients):
        def body(states, gradient):
            updates, verified_state = verified.update(gradient, states[0])
            bare_updates, bare_state = tx.update(gradient, states[1])
            return (verified_state, bare_state), (updates, bare_updates)

        (verified_state, bare_state), (updates, bare_updates) = jax.lax.scan(body, (state, state), gradients)
        return (updates, verified_state), (bare_updates, bare_state)

    return run


@functools.cache
def compiled(name):
    return checked_run(transformation(name))


def normal(rng, sizes):
    """Normal numbers, as large as the given sizes, one a step."""
    return jax.tree.map(
        lambda x: (rng.standard_normal((len(sizes), *x.shape)).T * sizes).T.astype(np.float32), PARAMS
    )


def along(sizes):
    """A fixed direction times the given sizes, one a step, then zeros up to `STEPS` steps."""
    rng = np.random.default_rng(0)
    sizes = np.concatenate([sizes, np.zeros(STEPS - len(sizes))])

    def leaf(x):
        direction = rng.uniform(1, 2, x.shape) * rng.choice([-1, 1], x.shape)
        return np.multiply.outer(sizes, direction).astype(np.float32)

    return jax.tree.map(leaf, PARAMS)


def extremal(name, steps):
    """The sizes that drive the last direction to its bound: growing for Adam, one spike for RMSprop."""
    arguments = arguments_of(name)
    if name in RMS:
        return np.concatenate([np.zeros(steps - 1), [1e3]])
    b1, b2 = (
        [value(count) for count in range(steps)] if callable(value) else value
        for value in (arguments.get("b1", 0.9), arguments.get("b2", 0.999))
    )
    variants = {key: arguments[key] for key in ("bias_correction", "nesterov") if key in arguments}
    return 1e3 * extremal_sequence(b1, b2, steps, **variants)


def sequences(name):
    rng = np.random.default_rng(7)
    growth = extremal(name, STEPS + 1)
    return {
        "random": normal(rng, np.ones(STEPS)),
        "heavy tails": normal(rng, 10.0 ** rng.uniform(-6, 6, STEPS)),
        "extremal": along(growth[:STEPS]),
        "extremal to the end": along(extremal(name, STEPS)),
        "spike then zeros": along([0.0, 0.0, 1e4]),
        "spike": along([1e-3] * 50 + [1e4] + [1e-3] * 60),
        "constant": along(np.ones(STEPS)),
        "zeros": along(np.zeros(STEPS)),
    }


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)
    assert jax.tree.structure(left) == jax.tree.structure(right)


def same_to_rounding(left, right):
    """The two are compiled in one run, where fusions may differ; they are the same eagerly."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6 * np.abs(y).max()), left, right
    )
    assert jax.tree.structure(left) == jax.tree.structure(right)


@pytest.mark.parametrize("name", [*ADAM, *RMS])
def test_no_false_alarm_and_the_same_results(name):
    state = transformation(name).init(PARAMS)
    same(ao.verified(transformation(name)).init(PARAMS), state)
    for gradients in sequences(name).values():
        (updates, final), bare = compiled(name)(state, gradients)
        same_to_rounding((updates, final), bare)
        assert final.count == STEPS and all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


# --- What is wrong with the gradients or the moments --------------------------------------------------------


def alarm(run, state, gradients, *fragments):
    """Asserts that the run fails, in the words of `verified`, with every fragment in the message."""
    with pytest.raises(AssertionError) as raised:
        run(state, gradients)
    message = re.search(r"(verified: .*?)(\. \[failed at|$)", str(raised.value), re.DOTALL).group(1)
    assert all(fragment in message for fragment in fragments), message


def at_kernel(name, moment, function):
    """Changes the second moment of the kernel's group only."""
    granularity = arguments_of(name).get("granularity", "coordinate")
    if granularity == "global" or isinstance(granularity, ao.Global):
        return function(moment)
    if isinstance(granularity, ao.Labels):
        return moment.at[-1].set(function(moment[-1]))  # the bias comes first
    return moment | {"dense": moment["dense"] | {"kernel": function(moment["dense"]["kernel"])}}


def first_leaf_of_the_kernels_group(name):
    return "'dense/bias'" if "global" in name or "one label" in name else "'dense/kernel'"


@pytest.mark.parametrize("name", [name for name, (_, attains) in ADAM.items() if attains])
def test_a_second_moment_that_is_too_small(name):
    # Up to the step before the bound is attained; then nu is 0.1 % too small, and with it the bound exceeded
    # by up to 0.05 %, which the rounding slack of 1e-5 does not cover.
    run, tx = compiled(name), transformation(name)
    sizes = extremal(name, STEPS + 1)
    (_, state), _ = run(tx.init(PARAMS), along(sizes[:STEPS]))
    last = along(sizes[STEPS:])
    run(state, last)
    shrunk = state._replace(nu=at_kernel(name, state.nu, lambda v: v * 0.999))
    if state.nu_max is not None:
        shrunk = shrunk._replace(nu_max=at_kernel(name, state.nu_max, lambda v: v * 0.999))
    alarm(run, shrunk, last, f"direction of {first_leaf_of_the_kernels_group(name)} exceeds its bound")


@pytest.mark.parametrize("name", [name for name in RMS if "centred" not in name])
def test_a_second_moment_below_zero(name):
    # nu = decay nu + (1 - decay) q is positive after the step, so that only the bound can show it. It is
    # the newest gradient's: without a first moment, nothing less wrong lets a direction exceed its bound.
    run, tx = compiled(name), transformation(name)
    state = tx.init(PARAMS)
    spike = along([1e3])
    run(state, spike)
    below = state._replace(nu=at_kernel(name, state.nu, lambda v: 0.0 * v - 100.0))
    alarm(run, below, spike, f"direction of {first_leaf_of_the_kernels_group(name)} exceeds its bound")


@pytest.mark.parametrize("name", ["nadam", "tensorflow, axis"])
def test_a_first_step_that_is_a_tenth_longer(name):
    # The first gradient alone makes nu, and the direction is as long as it can be: here nu is less by 1.1**2.
    run, tx = compiled(name), transformation(name)
    state, gradients = tx.init(PARAMS), along([1e3])
    run(state, gradients)
    _, after = tx.update(jax.tree.map(lambda g: g[0], gradients), state)
    less = state._replace(nu=jax.tree.map(lambda v: (1 / 1.1**2 - 1) / 0.999 * v, after.nu))
    alarm(run, less, gradients, "direction of 'dense/bias' exceeds its bound")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["adam, coordinate", "adam, labels, sum", "rms, axis", "rms, global", "centred"]
)
def test_gradients_that_are_not_finite(name, value):
    gradients = along(np.ones(STEPS))
    gradients["dense"]["kernel"][57, 1, 2] = value
    # An infinite norm leaves 0 of the finite leaves; a NaN spreads to the first one.
    leaf = first_leaf_of_the_kernels_group(name) if np.isnan(value) else "'dense/kernel'"
    alarm(compiled(name), transformation(name).init(PARAMS), gradients, f"update of {leaf} is not finite")


@pytest.mark.parametrize("name", ["adam, tensor", "centred"])
def test_a_first_moment_that_is_not_finite(name):
    state = transformation(name).init(PARAMS)
    state.mu["dense"]["kernel"] = state.mu["dense"]["kernel"].at[0, 1].set(np.nan)
    alarm(compiled(name), state, along(np.ones(STEPS)), "update of 'dense/kernel' is not finite")


def test_a_negative_second_moment_that_shows_nowhere_else():
    # eps_root and nu_max keep the direction finite and within its bound.
    name = "eps under the root"
    state = transformation(name).init(PARAMS)
    wrong = state._replace(nu=at_kernel(name, state.nu, lambda v: v - 1e-3))
    alarm(compiled(name), wrong, along(np.zeros(STEPS)), "second moment 'nu' of 'dense/kernel' is negative")
    gradients = along(np.full(STEPS, 100.0))  # nu is positive again at once
    compiled(name)(wrong, gradients)


# --- What is wrong with the inner transformation ------------------------------------------------------------

SMALL = {"a": {"w": jnp.ones(3)}, "b": jnp.ones(2)}


def inner(update, init=lambda params: {"m": jax.tree.map(jnp.zeros_like, params)}):
    """A transformation from `update(gradients, state) -> (updates, state)`."""
    return optax.GradientTransformation(init, lambda updates, state, params=None: update(updates, state))


def with_w(tree, function):
    return {"a": {"w": function(tree["a"]["w"])}, "b": tree["b"]}


WRONG_TYPES = {
    "bfloat16 update": (
        inner(lambda g, s: (with_w(g, lambda x: x.astype(jnp.bfloat16)), s)),
        "verified: the update of 'a/w' must be float32 or wider, got bfloat16.",
    ),
    "bfloat16 state": (
        inner(lambda g, s: (g, {"m": with_w(s["m"], lambda x: x.astype(jnp.bfloat16))})),
        "verified: the state 'm/a/w' changed from float32 to bfloat16.",
    ),
    "integer state": (
        inner(lambda g, s: (g, {"m": with_w(s["m"], lambda x: x.astype(jnp.int32))})),
        "verified: the state 'm/a/w' changed from float32 to int32.",
    ),
}
WRONG_TREES = {
    "shape of an update": (
        inner(lambda g, s: (with_w(g, lambda x: x[:1]), s)),
        "'a/w' has shape (1,) in the updates and (3,) in the gradients.",
    ),
    "shape of the state": (
        inner(lambda g, s: (g, {"m": with_w(s["m"], lambda x: x[None])})),
        "'m/a/w' has shape (1, 3) in the new state and (3,) in the state.",
    ),
    "no update of a leaf": (inner(lambda g, s: ({"a": g["a"]}, s)), "the leaf 'b' of "),
    "an update of nothing": (inner(lambda g, s: (g | {"c": g["b"]}, s)), "the leaf 'c' of "),
    "another leaf in the state": (inner(lambda g, s: (g, s | {"n": jnp.ones(())})), "the leaf 'n' of "),
    "a leaf less in the state": (inner(lambda g, s: (g, {"m": {"a": s["m"]["a"]}})), "the leaf 'm/b' of "),
}
CONTAINERS = {
    "state": inner(lambda g, s: (g, {"m": list(s["m"])})),
    "updates": inner(lambda g, s: (list(g), s)),
}


@pytest.mark.parametrize("kind", WRONG_TYPES)
def test_types_that_drift(kind):
    broken, sentence = WRONG_TYPES[kind]
    tx = ao.verified(broken)
    with pytest.raises(AssertionError, match=re.escape(sentence)):
        jax.eval_shape(tx.update, SMALL, tx.init(SMALL))


@pytest.mark.parametrize("kind", WRONG_TREES)
def test_trees_that_change(kind):
    broken, fragment = WRONG_TREES[kind]
    tx = ao.verified(broken)
    with pytest.raises(AssertionError, match=r"^verified: .*" + re.escape(fragment)):
        jax.eval_shape(tx.update, SMALL, tx.init(SMALL))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_that_change(kind):
    tx, params = ao.verified(CONTAINERS[kind]), (jnp.ones(3), jnp.ones(2))
    with pytest.raises(AssertionError, match=rf"^verified: the {kind} changed from PyTreeDef\(.*, .*\) to "):
        jax.eval_shape(tx.update, params, tx.init(params))


def overflowing(g, s):
    return g, {"m": with_w(s["m"], lambda x: x.at[1].set(jnp.inf))}


def counting(by):
    return lambda g, s: (g, s | {"count": s["count"] + by})


def started(params):
    return {"count": jnp.zeros((), jnp.int32)}


WRONG_VALUES = {
    "state": (inner(overflowing), "the state 'm/a/w' is no longer finite"),
    "update": (inner(lambda g, s: (with_w(g, lambda x: x / 0), s)), "the update of 'a/w' is not finite"),
    "count stays": (inner(counting(0), started), "'count' did not grow by one"),
    "count skips": (inner(counting(2), started), "'count' did not grow by one"),
    "count falls": (inner(counting(-1), started), "'count' did not grow by one"),
    "count in a chain": (
        optax.chain(optax.identity(), inner(counting(0), started)),
        "'1/count' did not grow",
    ),
}


@pytest.mark.parametrize("kind", WRONG_VALUES)
def test_values_that_go_wrong(kind):
    broken, sentence = WRONG_VALUES[kind]
    tx = ao.verified(broken)
    with pytest.raises(AssertionError, match=re.escape("verified: " + sentence)):
        tx.update(SMALL, tx.init(SMALL))


@pytest.mark.parametrize("name", ["rms, global"])
def test_a_direction_that_does_not_count(name):
    right = transformation(name)

    def update(updates, state, params=None, **extra_args):
        updates, new_state = right.update(updates, state, params, **extra_args)
        return updates, new_state._replace(count=state.count)

    run = checked_run(described(made("scaled", right.init, update), bound_of(right)))
    alarm(run, right.init(PARAMS), along(np.ones(STEPS)), "'count' did not grow by one")


def test_a_direction_that_forgets_to_divide():
    # The mistake that the bound is there for: mu corrected, nu not; factor 2 is above every slack.
    right = ao.scale_by_adam()

    def update(updates, state, params=None, **extra_args):
        updates, state = right.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u: u / jnp.sqrt(state.nu_weight), updates), state

    tx = ao.verified(described(made("scaled", right.init, update), bound_of(right)))
    with pytest.raises(AssertionError, match="the direction of 'a/w' exceeds its bound"):
        tx.update(SMALL, tx.init(SMALL))


def test_what_was_not_finite_before_is_no_alarm():
    tx = ao.verified(inner(lambda g, s: (g, s)))
    state = tx.init(with_w(SMALL, lambda x: x))
    state["m"]["a"]["w"] = jnp.array([jnp.inf, jnp.nan, 0.0])
    _, kept = tx.update(SMALL, state)
    np.testing.assert_array_equal(kept["m"]["a"]["w"], state["m"]["a"]["w"])


NAN = with_w(SMALL, lambda x: x * jnp.nan)
LAST = jnp.full((), np.iinfo(np.int32).max, jnp.int32)


def test_counts_that_are_none():
    # A parameter of that name; and the last count there is, at which counters stay.
    named = ao.verified(ao.trace(0.9))
    params = {"count": jnp.ones(3)}
    state = named.init(params)
    for _ in range(2):
        _, state = named.update(params, state)
    last = inner(
        lambda g, s: (g, {"count": optax.safe_increment(s["count"])}), lambda params: {"count": LAST}
    )
    tx = ao.verified(last)
    _, state = tx.update(SMALL, tx.init(SMALL))
    assert state["count"] == LAST


@pytest.mark.parametrize(("b1", "b2"), [(0.9999, 0.9999), (0.99, 0.9)])
def test_long_runs(b1, b2):
    # The bound of equal decays is 1, which constant gradients attain; that of b1**2 >= b2 grows for ever.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        tx = ao.scale_by_adam(b1, b2, eps=0.0)
    state = tx.init(jnp.ones(2))
    (updates, _), _ = checked_run(tx)(state, np.ones((4000, 2), np.float32))
    np.testing.assert_allclose(updates, np.ones((4000, 2)), rtol=1e-4)


# --- How it is used -----------------------------------------------------------------------------------------


def test_eagerly_and_in_a_chain():
    tx = optax.chain(ao.clip_by_global_norm(1.0), ao.verified(ao.scale_by_adam()), optax.scale(-0.1))
    bare = optax.chain(ao.clip_by_global_norm(1.0), ao.scale_by_adam(), optax.scale(-0.1))
    state = tx.init(SMALL)
    same(state, bare.init(SMALL))
    for _ in range(2):
        updates, next_state = tx.update(SMALL, state)
        same((updates, next_state), bare.update(SMALL, state))
        state = next_state
    assert ao.get_hyperparams(state)["b1"] == jnp.float32(0.9)
    with pytest.raises(AssertionError, match="verified: the update of 'a/w' is not finite"):
        tx.update(NAN, state)


def test_inside_accumulation():
    tx = optax.MultiSteps(ao.verified(ao.sgd(0.1)), 2)
    step = chex.chexify(jax.jit(tx.update))
    state = tx.init(SMALL)
    for _ in range(3):
        updates, state = step(SMALL, state)
    step.wait_checks()
    same(updates, jax.tree.map(jnp.zeros_like, SMALL))
    with pytest.raises(AssertionError, match="verified: the update of 'a/w' is not finite"):
        step(NAN, state)
        step.wait_checks()


def test_plain_jit_says_what_to_write():
    tx = ao.verified(ao.scale_by_rms())
    state = tx.init(SMALL)
    scan = functools.partial(jax.lax.scan, lambda state, _: (tx.update(SMALL, state)[1], None), length=2)
    for call in (lambda: jax.jit(tx.update)(SMALL, state), lambda: scan(state)):
        with pytest.raises(RuntimeError) as raised:
            call()
        for words in ("chex.chexify(jax.jit(step))", "step.wait_checks()", "with nnx, split the model"):
            assert words in str(raised.value)
    with pytest.raises(AssertionError, match="float32 to bfloat16"):  # types need no chexify
        jax.jit(ao.verified(WRONG_TYPES["bfloat16 state"][0]).update)(SMALL, {"m": SMALL})


def test_arguments_pass_through():
    seen = {}

    def update(updates, state, params=None, *, value, **extra_args):
        seen.update(params=params, value=value, extra=extra_args)
        return jax.tree.map(lambda u: u * value, updates), state

    with_arguments = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = ao.verified(with_arguments)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    updates, _ = tx.update(SMALL, tx.init(SMALL), SMALL, value=2.0, another=3)
    assert seen == {"params": SMALL, "value": 2.0, "extra": {"another": 3}}
    np.testing.assert_array_equal(updates["b"], [2.0, 2.0])
    # An inner transformation that takes none is not given any; one that needs the parameters gets them.
    plain = ao.verified(optax.scale(2.0))
    same(plain.update(SMALL, plain.init(SMALL), SMALL, value=1.0)[0], jax.tree.map(lambda x: 2 * x, SMALL))
    decay = ao.verified(ao.add_decoupled_weight_decay(0.5))
    same(decay.update(SMALL, decay.init(SMALL), SMALL)[0], jax.tree.map(lambda x: 1.5 * x, SMALL))


EXAMPLES = inspect.getdoc(ao.verified).split("```python\n")[1].split("```")[0]
LINEN, NNX = textwrap.dedent(EXAMPLES).split("# nnx: ")
INPUTS = np.random.default_rng(3).standard_normal((16, 4)).astype(np.float32)
BATCH = (INPUTS, np.stack([INPUTS.sum(1), INPUTS[:, 0] - INPUTS[:, 1]], 1))
BAD_BATCH = (np.where(INPUTS > 2, np.nan, INPUTS), BATCH[1])


def checked_chain():
    return optax.chain(ao.verified(ao.scale_by_adam()), ao.scale_by_learning_rate(0.05))


def test_linen_example_of_the_docstring():
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), BATCH[0])["params"]

    def loss(params, batch):
        return jnp.mean((model.apply({"params": params}, batch[0]) - batch[1]) ** 2)

    names = {"chex": chex, "jax": jax, "optax": optax, "loss": loss, "tx": checked_chain()}
    exec(LINEN, names)
    step, opt_state = names["step"], names["tx"].init(params)
    before = loss(params, BATCH)
    for _ in range(40):
        params, opt_state = step(params, opt_state, BATCH)
    step.wait_checks()
    assert loss(params, BATCH) < 0.2 * before
    with pytest.raises(AssertionError, match="verified: the update of 'bias' is not finite"):
        step(params, opt_state, BAD_BATCH)
        step.wait_checks()


def test_nnx_example_of_the_docstring():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, checked_chain(), wrt=nnx.Param)

    def loss(model, batch):
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    names = {"chex": chex, "jax": jax, "nnx": nnx, "loss": loss, "model": model, "optimizer": optimizer}
    before, (first, last) = loss(model, BATCH), NNX.split("...\n")
    exec("# nnx: " + first, names)
    for _ in range(40):
        names["state"] = names["step"](names["state"], BATCH)
    exec(last, names)
    assert loss(model, BATCH) < 0.2 * before  # the objects outside were brought up to date
    assert ao.get_hyperparams(optimizer.opt_state)["learning_rate"] == jnp.float32(0.05)
    with pytest.raises(AssertionError, match="verified: the update of 'bias' is not finite"):
        names["step"](names["state"], BAD_BATCH)
        names["step"].wait_checks()
    with pytest.raises(RuntimeError, match="with nnx, split the model"):
        nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss)(model, BATCH)))(
            model, optimizer
        )
