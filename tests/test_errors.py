"""Arguments that are refused, and the sentence that says so: the argument, its value, the accepted range."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import SCHEDULED, TREE, ones, refused, schedule

import adaptive_optax as ao

# --- Scalars ------------------------------------------------------------------------------------------------


# What every factory is called with; a row of a table overrides one argument.
VALID = {
    ao.scale_by_adam: {},
    ao.adam: {"learning_rate": 0.1},
    ao.adamw: {"learning_rate": 0.1},
    ao.scale_by_rms: {},
    ao.scale_by_global_rms: {},
    ao.rmsprop: {"learning_rate": 0.1},
    ao.global_rmsprop: {"learning_rate": 0.1},
    ao.sgd: {"learning_rate": 0.1},
    ao.trace: {"decay": 0.9},
    ao.scale_by_learning_rate: {"learning_rate": 0.1},
    ao.add_decoupled_weight_decay: {"weight_decay": 0.1},
    ao.clip_by_global_norm: {"max_norm": 1.0},
    ao.average_parameters: {},
    ao.adam_bound: {"b1": 0.9, "b2": 0.999},
    ao.exponential_decay: {"init_value": 0.1, "transition_steps": 10, "decay_rate": 0.5},
    ao.step_decay: {"init_value": 0.1, "factor": 0.5, "every": 10},
    ao.cyclical: {"base_value": 0.1, "peak_value": 0.2, "half_cycle": 10, "mode": "exp_range"},
    ao.warmup_stable_decay: {"peak_value": 0.1, "total_steps": 100, "warmup_steps": 10, "decay_steps": 10},
    ao.warmup_cosine: {"peak_value": 0.1, "total_steps": 100},
    ao.cosine_restarts: {"peak_value": 0.1, "first_period": 10},
    ao.inverse_sqrt: {"peak_value": 0.1, "warmup_steps": 10},
    ao.one_cycle: {"peak_value": 0.1, "total_steps": 100, "base_momentum": 0.0},
}
ADAM = {"b1": "[0, 1)", "b2": "[0, 1)", "eps": "[0, inf)"}  # with eps_root, which cannot be a schedule
RMS = {"decay": "[0, 1)", "eps": "[0, inf)"}
RATE = {"learning_rate": "[0, inf)"}
MOMENTUM = {"momentum": "[0, 1)"}
# The accepted range of every scalar argument that may be a schedule, and of those that may not.
SCHEDULABLE = {
    ao.scale_by_adam: ADAM,
    ao.adam: RATE | ADAM,
    ao.adamw: RATE | ADAM | {"weight_decay": "[0, inf)"},
    ao.scale_by_rms: RMS,
    ao.scale_by_global_rms: RMS,
    ao.rmsprop: RATE | RMS | MOMENTUM,
    ao.global_rmsprop: RATE | RMS | MOMENTUM,
    ao.sgd: RATE | MOMENTUM,
    ao.trace: {"decay": "[0, 1)"},
    ao.average_parameters: {"decay": "[0, 1)"},
    ao.scale_by_learning_rate: RATE,
    ao.add_decoupled_weight_decay: {"weight_decay": "[0, inf)"},
}
FIXED = {
    ao.scale_by_adam: {"eps_root": "[0, inf)"},
    ao.adam: {"eps_root": "[0, inf)"},
    ao.adamw: {"eps_root": "[0, inf)"},
    ao.scale_by_rms: {"initial_scale": "[0, inf)"},
    ao.scale_by_global_rms: {"initial_scale": "[0, inf)"},
    ao.rmsprop: {"initial_scale": "[0, inf)"},
    ao.global_rmsprop: {"initial_scale": "[0, inf)"},
    ao.clip_by_global_norm: {"max_norm": "(0, inf]"},
    ao.average_parameters: {"power": "[0, inf)"},
    ao.adam_bound: {"b1": "[0, 1)", "b2": "[0, 1)"},
    ao.exponential_decay: {"init_value": "[0, inf)", "decay_rate": "(0, inf)", "end_value": "[0, inf)"},
    ao.step_decay: {"init_value": "[0, inf)", "factor": "(0, inf)"},
    ao.cyclical: {"base_value": "[0, inf)", "peak_value": "[0, inf)", "gamma": "(0, 1]"},
    ao.warmup_stable_decay: {"peak_value": "[0, inf)"},
    ao.warmup_cosine: {"peak_value": "[0, inf)", "init_value": "[0, inf)", "end_value": "[0, inf)"},
    ao.cosine_restarts: {
        "peak_value": "[0, inf)",
        "init_value": "[0, inf)",
        "end_value": "[0, inf)",
        "peak_factor": "(0, inf)",
    },
    ao.inverse_sqrt: {"peak_value": "[0, inf)"},
    ao.one_cycle: {
        "peak_value": "[0, inf)",
        "pct_start": "(0, 1]",
        "div_factor": "[1, inf)",
        "final_div_factor": "(0, inf)",
        "max_momentum": "[0, 1)",
    },
}
SCALARS = [
    (factory, name, interval, may_be_schedule)
    for table, may_be_schedule in ((SCHEDULABLE, True), (FIXED, False))
    for factory, arguments in table.items()
    for name, interval in arguments.items()
]
OUTSIDE = {
    "[0, 1)": (-1.0, -1e-9, 1, 1.0, 1.5, 2, math.inf),
    "[0, inf)": (-1, -1e-9, -math.inf, math.inf),
    "(0, inf)": (0, -1.0, math.inf),
    "(0, inf]": (0, 0.0, -0.0, -1, -math.inf),
    "(0, 1]": (0.0, -0.5, 1.0 + 1e-9, math.inf),
    "[1, inf)": (1 - 1e-9, 0, -2.0, math.inf),
}
INSIDE = {
    "[0, 1)": (0, 0.0, 1 - 1e-7, np.float16(0.5)),  # 1 - 1e-9 is 1 where float32 keeps it
    "[0, inf)": (0, 1e30, np.int32(3), 1e-30),
    "(0, inf)": (1e-30, 1e30, np.uint8(1), 0.5),
    "(0, inf]": (1e-30, math.inf, np.float64(3.0), 2),
    "(0, 1]": (1e-30, 1, np.float32(1), 0.5),
    "[1, inf)": (1, 1e30, np.int64(7), 1.5),
}
# No number at all, or not one number; None is left out, which some arguments accept.
NO_NUMBER = (
    *("0.5", True, np.bool_(True), 0.5j, [0.5], (0.5,), {"a": 0.5}),
    *(np.full(1, 0.5), np.full((2, 3), 0.5), np.full(0, 0.5)),
)
JAX_NO_NUMBER = (True, [0.5, 0.5], [[0.5]], 0.5j)  # made into arrays inside the test, not at import


def each(rows):
    ids = [f"{factory.__name__}-{name}" for factory, name, *_ in rows]
    return pytest.mark.parametrize(("factory", "name", "interval", "may_be_schedule"), rows, ids=ids)


each_scalar = each(SCALARS)
each_traceable_scalar = each([row for row in SCALARS if row[0] is not ao.adam_bound])  # it returns a float


def expected(name, interval, may_be_schedule):
    """The beginning of the sentence: the argument's name and what it accepts."""
    return f"{name} must be a number in {interval}" + (
        " or a schedule of the step count, got " if may_be_schedule else ", got "
    )


@each_scalar
def test_scalars_out_of_range(factory, name, interval, may_be_schedule):
    for value in (*OUTSIDE[interval], math.nan):
        numbers = [value, np.float64(value), jnp.float32(value), jnp.bfloat16(value)]
        if abs(value - round(value, 3)) > 0:  # 1e-9 from an end, where the coarser types round onto it
            numbers = numbers[:2]
        for number in numbers:
            refused(
                lambda number=number: factory(**(VALID[factory] | {name: number})),
                expected(name, interval, may_be_schedule) + repr(number),
            )


@each_scalar
def test_scalars_that_are_no_number(factory, name, interval, may_be_schedule):
    for value in (*NO_NUMBER, *map(jnp.asarray, JAX_NO_NUMBER)):
        refused(
            lambda value=value: factory(**(VALID[factory] | {name: value})),
            expected(name, interval, may_be_schedule) + repr(value),
        )
    if not may_be_schedule:
        refused(
            lambda: factory(**(VALID[factory] | {name: schedule})), expected(name, interval, may_be_schedule)
        )


@each_scalar
def test_scalars_in_range(factory, name, interval, may_be_schedule):
    values = [*INSIDE[interval], jnp.float32(1.0 if interval[1] == "1" else 0.25)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # b1**2 >= b2, which has its own test
        for value in (*values, schedule) if may_be_schedule else values:
            factory(**(VALID[factory] | {name: value}))


@pytest.mark.parametrize("wrong", [-1, math.nan, "0.1", None, [0.1]], ids=repr)
def test_learning_rate_cannot_be_left_empty_or_wrong(wrong):
    for factory in (ao.adam, ao.adamw, ao.rmsprop, ao.global_rmsprop, ao.sgd, ao.scale_by_learning_rate):
        refused(
            lambda factory=factory: factory(wrong),
            "learning_rate must be a number in [0, inf) or a schedule of the step count",
            f"got {wrong!r}.",
        )


# What float32 makes of a number decides, not the number.
ROUNDED = {
    "a rate that is inf": (ao.adam, {"learning_rate": 1e300}, "1e+300, which is inf in float32."),
    "an integer rate": (ao.sgd, {"learning_rate": 10**39}, "which is inf in float32."),
    "an eps that is inf": (ao.scale_by_rms, {"eps": 1e39}, "1e+39, which is inf in float32."),
    "a norm that is 0": (ao.clip_by_global_norm, {"max_norm": 1e-50}, "1e-50, which is 0.0 in float32."),
    "a decay of schedules": (
        ao.exponential_decay,
        {"init_value": 0.1, "transition_steps": 3, "decay_rate": 1e-60},
        "1e-60, which is 0.0 in float32.",
    ),
    "a peak": (ao.one_cycle, {"peak_value": 1e39, "total_steps": 9}, "1e+39, which is inf in float32."),
}


@pytest.mark.parametrize("kind", ROUNDED)
def test_numbers_that_float32_puts_out_of_range(kind):
    factory, arguments, sentence = ROUNDED[kind]
    refused(lambda: factory(**arguments), "must be a number in ", sentence)


def test_a_rate_that_the_parameters_dtype_has_not(x64):
    tx = ao.sgd(1e300)  # float64 parameters have it
    assert tx.update(jnp.ones(1), tx.init(jnp.ones(1)))[0].dtype == jnp.float64
    refused(lambda: tx.init(jnp.ones(1, jnp.float32)), "must fit in float32, got 1e+300.")


def test_a_decay_is_as_near_to_one_as_double_precision_has_it():
    tx = ao.scale_by_adam(b1=0.0, b2=1 - 1e-9)
    state = tx.init(jnp.zeros(1))
    for _ in range(3):
        direction, state = tx.update(jnp.full(1, 2.0), state)
    np.testing.assert_allclose(direction, [1.0], rtol=1e-6)
    np.testing.assert_allclose(state.nu, [3 * 4e-9], rtol=1e-6)


CHECKED_SCHEDULES = {
    "learning_rate": ao.sgd,
    "b1": lambda value: ao.adam(0.1, b1=value),
    "b2": lambda value: ao.scale_by_adam(b2=value),
    "eps": lambda value: ao.scale_by_rms(eps=value),
    "decay": ao.trace,
    "momentum": lambda value: ao.sgd(0.1, value),
    "weight_decay": ao.add_decoupled_weight_decay,
}


@pytest.mark.parametrize("name", CHECKED_SCHEDULES)
def test_a_schedule_that_leaves_the_range_is_refused_where_that_is_known(name):
    tx = CHECKED_SCHEDULES[name](lambda count: -1.0 if count == 1 else 0.25)
    _, state = tx.update(ones(2), tx.init(ones(2)), ones(2))
    refused(
        lambda: tx.update(ones(2), state, ones(2)),
        f"{name} must be a number in [0, ",
        "got -1.0. From the schedule <function",
        "at count 1.",
    )
    wrong = CHECKED_SCHEDULES[name](lambda count: np.nan)
    refused(lambda: wrong.init(ones(2)), f"{name} must be a number in [0, ", "got nan. From the schedule")


# --- Everything else that is chosen at construction ---------------------------------------------------------


def bools(factory, *names, **others):
    return [
        (factory, others | {name: value}, (f"{name} must be True or False, got {value!r}.",))
        for name in names
        for value in (1, "yes", None)
    ]


EPS_FORM = "eps_form must be one of 'paper', 'tensorflow', got 'keras'."
REDUCE = "reduce must be one of 'mean', 'sum', got 'max'."
COUPLINGS = "must be one of 'learning_rate', 'schedule', 'independent', got 'lr'."
GRANULARITY = (
    "granularity must be Coordinate(), Axis(...), Tensor(), Labels(...), Global(), ByPath(...) or one of "
    "'coordinate', 'tensor', 'global', got "
)
BAD_DTYPES = (jnp.int8, int, bool, "int4", "half precision")


def dtypes(factory, name, **others):
    sentence = f"{name} must be None or a floating dtype, got "
    return [(factory, others | {name: dtype}, (sentence,)) for dtype in BAD_DTYPES]


CHOICES = [
    *bools(ao.scale_by_adam, "nesterov", "amsgrad", "bias_correction"),
    *bools(ao.adam, "nesterov", "amsgrad", "bias_correction"),
    *bools(ao.adamw, "nesterov", "amsgrad", "bias_correction"),
    *bools(ao.scale_by_rms, "eps_in_sqrt", "bias_correction", "centered"),
    *bools(ao.scale_by_global_rms, "eps_in_sqrt", "bias_correction", "centered"),
    *bools(ao.rmsprop, "eps_in_sqrt", "bias_correction", "centered"),
    *bools(ao.global_rmsprop, "eps_in_sqrt", "bias_correction", "centered"),
    *bools(ao.trace, "nesterov"),
    *bools(ao.scale_by_learning_rate, "flip_sign"),
    *bools(ao.adam_bound, "bias_correction"),
    *bools(ao.sgd, "nesterov", momentum=0.9),
    *bools(ao.rmsprop, "nesterov", momentum=0.9),
    *bools(ao.global_rmsprop, "nesterov", momentum=0.9),
    (ao.sgd, {"nesterov": True}, ("nesterov=True needs momentum=",)),
    (ao.rmsprop, {"nesterov": True}, ("nesterov=True needs momentum=",)),
    (ao.global_rmsprop, {"nesterov": True}, ("nesterov=True needs momentum=",)),
    (ao.sgd, {"accumulator_dtype": "bfloat16"}, ("accumulator_dtype needs momentum=, got 'bfloat16'",)),
    *dtypes(ao.sgd, "accumulator_dtype", momentum=0.9),
    *dtypes(ao.trace, "accumulator_dtype"),
    *dtypes(ao.scale_by_adam, "mu_dtype"),
    *dtypes(ao.adamw, "mu_dtype"),
    *((f, {"eps_form": "keras"}, (EPS_FORM,)) for f in (ao.scale_by_adam, ao.adam, ao.adamw)),
    (ao.adam, {"eps_form": None}, ("eps_form must be one of 'paper', 'tensorflow', got None.",)),
    *(
        (factory, {"granularity": wrong}, (GRANULARITY + repr(wrong),))
        for factory in (ao.scale_by_adam, ao.adam, ao.adamw, ao.scale_by_rms, ao.rmsprop)
        for wrong in ("axis", "Global", None, 0, ao.Tensor, {"kernel": "tensor"})
    ),
    *(
        (
            factory,
            {name: wrong},
            (f"{name} must be Float32(), BFloat16(...), Int8(...) or one of ", f"'int8', got {wrong!r}."),
        )
        for factory, names in (
            (ao.scale_by_adam, ("mu_storage", "nu_storage")),
            (ao.adamw, ("mu_storage", "nu_storage")),
            (ao.scale_by_rms, ("storage",)),
            (ao.scale_by_global_rms, ("storage",)),
            (ao.rmsprop, ("storage",)),
            (ao.global_rmsprop, ("storage",)),
        )
        for name in names
        for wrong in ("float16", None, jnp.float32, ao.Float32, 32)
    ),
    (ao.add_decoupled_weight_decay, {"coupling": "lr"}, (f"coupling {COUPLINGS}",)),
    (ao.adamw, {"decay_coupling": "lr"}, (f"decay_coupling {COUPLINGS}",)),
    (
        ao.add_decoupled_weight_decay,
        {"coupling": "schedule"},
        ("coupling='schedule' needs schedule= (decay_schedule= in adamw)",),
    ),
    (ao.adamw, {"decay_coupling": "schedule"}, ("'schedule' needs schedule= (decay_schedule= in adamw)",)),
    *(
        (factory, {coupling: name, argument: given}, ("is used by coupling='schedule' only", f"'{name}'"))
        for factory, coupling, argument in (
            (ao.add_decoupled_weight_decay, "coupling", "schedule"),
            (ao.adamw, "decay_coupling", "decay_schedule"),
        )
        for name in ("learning_rate", "independent")
        for given in (schedule, 0.5, 0)
    ),
    *(
        (
            factory,
            {coupling: "schedule", argument: -0.5},
            ("schedule must be a number in [0, inf)", "got -0.5."),
        )
        for factory, coupling, argument in (
            (ao.add_decoupled_weight_decay, "coupling", "schedule"),
            (ao.adamw, "decay_coupling", "decay_schedule"),
        )
    ),
    *(
        (ao.adam_bound, {"count": count}, (f"count must be an integer in [1, inf), got {count!r}.",))
        for count in (0, -1, 1.5, 2.0, True, "2", math.inf)
    ),
]


@pytest.mark.parametrize(
    ("factory", "wrong", "fragments"), CHOICES, ids=["-".join([f.__name__, *w]) for f, w, _ in CHOICES]
)
def test_choices(factory, wrong, fragments):
    refused(lambda: factory(**(VALID[factory] | wrong)), *fragments)


GRANULARITIES = [
    (lambda: ao.Axis(), ("Axis needs at least one axis",)),
    *(
        (lambda axis=axis: ao.Axis(0, axis), ("axes must be an integer in (-inf, inf)", f"got {axis!r}."))
        for axis in (0.5, 1.0, True, "0", None, (1,), math.inf)
    ),
    (lambda: ao.Axis(0, reduce="max"), (REDUCE,)),
    (lambda: ao.Tensor("max"), (REDUCE,)),
    (lambda: ao.Global(reduce="max"), (REDUCE,)),
    (lambda: ao.Labels(lambda path, leaf: path, reduce="max"), (REDUCE,)),
    (lambda: ao.Labels.by_path({"a": 1}, reduce="max"), (REDUCE,)),
    (lambda: ao.Tensor(None), ("reduce must be one of 'mean', 'sum', got None.",)),
    (lambda: ao.Tensor(0), ("reduce must be one of 'mean', 'sum', got 0.",)),
    (lambda: ao.Labels("kernel"), ("label_fn must be a function (path, leaf) -> label, got 'kernel'.",)),
    (lambda: ao.Labels({"kernel": 0}), ("label_fn must be a function", "got {'kernel': 0}.")),
    (lambda: ao.Labels.by_path({"w": [0]}), ("patterns must give hashable labels, got {'w': [0]}.",)),
    (lambda: ao.Labels.by_path({"w": 0}, default=[1]), ("patterns must give hashable labels",)),
    (lambda: ao.Labels.by_path("w"), ("patterns must be a mapping {pattern: label}, got 'w'.",)),
    (lambda: ao.Labels.by_path(None), ("patterns must be a mapping {pattern: label}, got None.",)),
    (lambda: ao.Labels.by_path({"(": 0}), ("patterns must be regular expressions, got '(': ",)),
    (
        lambda: ao.Labels.by_path({0: 0}),
        ("patterns must be regular expressions, got 0, which is not a str",),
    ),
]


@pytest.mark.parametrize(("build", "fragments"), GRANULARITIES)
def test_granularities(build, fragments):
    refused(build, *fragments)


@pytest.mark.parametrize("factory", [ao.scale_by_adam, ao.adam, ao.adamw], ids=lambda f: f.__name__)
def test_mu_dtype_excludes_another_mu_storage(factory):
    class Other(ao.Float32):
        pass

    refused(
        lambda: factory(**VALID[factory], mu_dtype=jnp.bfloat16, mu_storage=Other()),
        "Give mu_dtype or mu_storage, not both",
        repr(jnp.bfloat16),
        repr(Other()),
    )
    assert factory(**VALID[factory], mu_dtype="bfloat16", mu_storage="float32") is not None
    assert factory(**VALID[factory], mu_storage=Other()) is not None


UNBOUNDED = [(0.9, 0.81), (0.99, 0.9), (0.5, 0.0), (np.float32(0.9), 0.8), (1 - 1e-9, 0.999)]


@pytest.mark.parametrize(("b1", "b2"), UNBOUNDED)
def test_unbounded_decays_warn(b1, b2):
    for factory in (ao.scale_by_adam, ao.adam, ao.adamw):
        with pytest.warns(UserWarning, match=r"b1\*\*2 >= b2 .* has no bound") as caught:
            factory(**(VALID[factory] | {"b1": b1, "b2": b2}))
        assert len(caught) == 1 and f"({b1}**2 >= {b2})" in str(caught[0].message)


def test_bounded_decays_do_not_warn():
    for b1, b2 in ((0.9, 0.811), (0.0, 0.0), (0.9, 0.9), (schedule, 0.1), (0.9, schedule)):
        ao.scale_by_adam(b1, b2)  # a warning is an error


# --- Tracers ------------------------------------------------------------------------------------------------


def traced(build, value):
    """Builds with a tracer in place of `value`, without compiling anything."""
    return jax.eval_shape(lambda value: (build(value), jnp.zeros(()))[1], value)


@each_traceable_scalar
def test_traced_arrays_are_refused_by_shape(factory, name, interval, may_be_schedule):
    def build(value):
        return factory(**(VALID[factory] | {name: value}))

    sentence = expected(name, interval, may_be_schedule) + "a traced array of type "
    for shape in ((1,), (2,), (0,), (3, 1)):
        value = np.full(shape, 0.5, np.float32)
        refused(lambda value=value: traced(build, value), sentence + f"float32[{','.join(map(str, shape))}].")
    refused(lambda: traced(build, jnp.asarray(True)), sentence + "bool[].")
    for inside in (jnp.float32(2.0), jnp.bfloat16(-1.0), jnp.int32(7)):  # no value, no check
        assert traced(build, inside).shape == ()


PARAMS = {
    "w": np.array([[3.0, -2.0, 0.5], [1.0, 0.25, -1.5]], np.float32),
    "b": np.array([0.5, -4.0], np.float32),
}
GRADIENTS = [
    jax.tree.map(lambda x, s=s: np.float32(s) * x - np.float32(0.125), PARAMS) for s in (1.0, -0.5, 2.0)
]
# Arguments of schedules; `test_contract.py` sweeps those of transformations.
SWEEPS = {
    "adamw, schedule": (
        lambda h: ao.adamw(
            0.125, 0.5, 0.875, weight_decay=0.5, decay_coupling="schedule", decay_schedule=h["factor"]
        ),
        {"factor": [0.5, 0.125]},
    ),
    "schedule": (
        lambda h: ao.sgd(ao.warmup_cosine(h["peak"], 4)),
        {"peak": [0.5, 0.25]},
    ),
}


def three_steps(hyperparameters):
    """What every transformation of `SWEEPS` returns in three steps."""
    results = {}
    for name, (build, _) in SWEEPS.items():
        tx = build(hyperparameters[name])
        state = tx.init(PARAMS)
        results[name] = []
        for gradient in GRADIENTS:
            updates, state = tx.update(gradient, state, PARAMS)
            results[name].append(updates)
    return results


@pytest.fixture(scope="module")
def sweeps():
    """All sweeps at once, traced (jit of vmap) and concrete: three compilations for all of them."""
    values = {name: table for name, (_, table) in SWEEPS.items()}
    together = jax.jit(jax.vmap(three_steps))(
        jax.tree.map(np.float32, values, is_leaf=lambda x: isinstance(x, list))
    )
    each = [
        jax.jit(lambda i=i: three_steps({n: {k: v[i] for k, v in t.items()} for n, t in values.items()}))()
        for i in range(2)
    ]
    return together, each


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_over_a_schedule_is_a_vmap(sweeps, name):
    together, each = sweeps
    for path, updates in jax.tree.leaves_with_path(together[name]):
        alone = [dict(jax.tree.leaves_with_path(each[i][name]))[path] for i in range(2)]
        assert not np.array_equal(*alone)  # or the sweep would prove nothing
        np.testing.assert_allclose(updates, np.stack(alone), rtol=2e-6)


@pytest.mark.parametrize("name", SCHEDULED)
def test_pairs_of_schedules_and_schedules_of_something_else(name):
    pair = ao.one_cycle(0.5, 10)
    refused(lambda: SCHEDULED[name](pair), f"{name} must be a number in ", "got a set of schedules")
    for value in (None, ones(1), ones(2, 2)):
        tx = SCHEDULED[name](lambda count, value=value: value)
        refused(lambda tx=tx: tx.init(TREE), "A schedule must return a scalar, got ", repr(value))


def test_what_is_no_transformation_and_no_state():
    for wrong in (3, None, ao.adam, (ao.adam(0.1),)):
        refused(
            lambda wrong=wrong: ao.verified(wrong),
            "inner must be an optax.GradientTransformation",
            repr(wrong),
        )
    for wrong in (ao.adam(0.1), optax.sgd(0.1).init(TREE), (), TREE):
        refused(
            lambda wrong=wrong: ao.get_hyperparams(wrong),
            "opt_state holds no hyperparameters of this library",
            f"got a {type(wrong).__name__};",
        )


def test_the_bound_of_a_traced_decay():
    refused(
        lambda: traced(lambda b1: ao.adam_bound(b1, 0.9), np.float32(0.5)),
        "b1 must be concrete in adam_bound",
    )
    refused(
        lambda: traced(lambda b2: ao.adam_bound(0.9, b2), np.float32(0.5)),
        "b2 must be concrete in adam_bound",
    )


UNUSUAL = {
    "a traced complex number": (
        lambda: traced(ao.trace, np.complex64(0.5)),
        "decay must be a number in [0, 1) or a schedule of the step count, got a traced array",
    ),
    "an integer past float64": (lambda: ao.clip_by_global_norm(-(10**400)), "max_norm must be a number in"),
    "nesterov, no momentum": (
        lambda: ao.sgd(0.1, nesterov="no"),
        "nesterov must be True or False, got 'no'.",
    ),
    "an array as a mask": (
        lambda: ao.adamw(0.1, mask={"bias": ones(2, dtype=bool), "layer": True}).init(TREE),
        "mask must hold bools, got array([ True,  True]) at 'bias'.",
    ),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_mistakes(kind):
    build, sentence = UNUSUAL[kind]
    refused(build, sentence)
