"""A third party's storage or granularity works everywhere, or is refused in a sentence."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from halves import Halves
from lossy import Lossy

import adaptive_optax as ao
from adaptive_optax.moments.formats import CHECKED
from adaptive_optax.moments.storage import NearestCast, check_storage

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
RNG = np.random.default_rng(5)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32), "b": jnp.ones(16)}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def trained(tx, steps=5, state=None):
    state = tx.init(PARAMS) if state is None else state
    for step in range(steps):
        _, state = tx.update(gradients(step), state, PARAMS)
    return state


def test_the_page_on_extending_runs():
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    assert "class Strided(ao.Granularity)" in code and "class Float8(ao.Storage)" in code
    exec(compile(code, "docs/extending.md", "exec"), {"__name__": "docs.extending"})


def lossy(**arguments):
    return ao.scale_by_adam(mu_storage=Lossy(), nu_storage=Lossy(), **arguments)


def test_dense_reads_it():
    state = trained(lossy())
    for moment, role in ((state.mu, "mu"), (state.nu, "nu")):
        read, plain = ao.dense(moment), Lossy().decode(moment)
        jax.tree.map(np.testing.assert_array_equal, read, plain)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(read)), role
    exact = trained(ao.scale_by_adam())
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=0.1), ao.dense(state.mu), exact.mu)


def test_convert_storage_moves_from_it_and_to_it():
    state = trained(lossy())
    wide = ao.convert_storage(state, mu_storage="float32", nu_storage="float32")
    jax.tree.map(np.testing.assert_array_equal, wide.mu, ao.dense(state.mu))
    # The second moment is at least what the bound says, as decoding it in a step makes it.
    floor = jax.tree.map(lambda m: jnp.square(m) / state.bound_sq, wide.mu)
    assert all(jax.tree.leaves(jax.tree.map(lambda v, low: bool(jnp.all(v >= low)), wide.nu, floor)))
    trained(ao.scale_by_adam(), state=wide)
    back = ao.convert_storage(wide, mu_storage=Lossy(), nu_storage=Lossy())
    assert jax.tree.structure(back) == jax.tree.structure(state)
    trained(lossy(), state=back)


def test_telemetry_reads_its_values_and_not_its_codes():
    def seen(tx):
        state = trained(ao.telemetry(optax.chain(tx, ao.scale_by_learning_rate(0.1))))
        return ao.get_telemetry(state)

    rough, exact = seen(lossy()), seen(ao.scale_by_adam())
    assert 0 < rough.bound_utilisation <= 1.05
    assert abs(rough.snr - exact.snr) < 0.2
    np.testing.assert_allclose(rough.histogram.sum(), 1, rtol=1e-6)


def test_states_of_other_libraries_go_into_it_and_come_out_of_it():
    theirs = trained(optax.scale_by_adam())
    state = ao.from_optax(theirs, lossy(), PARAMS)
    largest = jax.tree.map(lambda x: float(jnp.max(jnp.abs(x))), theirs.mu)
    jax.tree.map(
        lambda x, y, top: np.testing.assert_allclose(x, y, atol=top / 15),
        ao.dense(state.mu),
        theirs.mu,
        largest,
    )
    out = ao.to_optax(state)
    jax.tree.map(np.testing.assert_array_equal, out.mu, ao.dense(state.mu))
    state, table = ao.transfer_state(trained(ao.scale_by_adam()), ao.scale_by_adam(), lossy(), PARAMS)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=0.1),
        ao.dense(state.mu),
        trained(ao.scale_by_adam()).mu,
    )


@dataclasses.dataclass(frozen=True)
class Plain(ao.Storage):
    """Rounds to float16 and keeps float32."""

    def init(self, params_like, role):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params_like)

    def decode(self, moment, *, lower=None):
        return moment if lower is None else jax.tree.map(jnp.maximum, moment, lower())

    def encode(self, moment, values, *, count, role):
        return jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), values)


class Unhashable(Plain):
    __hash__ = None  # pyright: ignore (a type checker allows no such class)


class Integers(Plain):
    """Codes in a plain tree: read without the storage, they would be taken for values."""

    def init(self, params_like, role):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int16), params_like)

    def decode(self, moment, *, lower=None):
        return jax.tree.map(lambda x: x / 100.0, moment)

    def encode(self, moment, values, *, count, role):
        return jax.tree.map(lambda x: (x * 100).astype(jnp.int16), values)


class Roots(Plain):
    """Keeps square roots, in a tree of floats that looks like the values."""

    def decode(self, moment, *, lower=None):
        return jax.tree.map(lambda x: jnp.sign(x) * jnp.square(x), moment)

    def encode(self, moment, values, *, count, role):
        return jax.tree.map(lambda x: jnp.sign(x) * jnp.sqrt(jnp.abs(x)), values)


class Pair(NamedTuple):
    high: Any
    low: Any


class Undecodable(Plain):
    """A NamedTuple that only its storage can read."""

    def init(self, params_like, role):
        return Pair(super().init(params_like, role), super().init(params_like, role))

    def decode(self, moment, *, lower=None):
        return moment.high

    def encode(self, moment, values, *, count, role):
        return Pair(values, values)


class Half(Plain):
    def decode(self, moment, *, lower=None):
        return jax.tree.map(lambda x: x.astype(jnp.float16), moment)


class StartsAtOne(Plain):
    def init(self, params_like, role):
        return jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), params_like)


class ChangesDtype(Plain):
    def encode(self, moment, values, *, count, role):
        return jax.tree.map(lambda x: x.astype(jnp.float16), values)


class ChangesShape(Plain):
    def encode(self, moment, values, *, count, role):
        return jax.tree.map(lambda x: x[None], values)


class Forgets(Lossy):
    """Its moment encodes in another way than it does."""

    def encode(self, moment, values, *, count, role):
        return super().encode(moment, jax.tree.map(lambda x: x / 2, values), count=count, role=role)


REFUSED = {
    Unhashable: "hashable",
    Integers: "tree of integers.*decoded",
    Roots: "different values",
    Undecodable: "Pair.*decoded",
    Half: "float32 arrays",
    StartsAtOne: "decode to zeros",
    ChangesDtype: "other shapes or dtypes",
    ChangesShape: "other shapes or dtypes",
    Forgets: "different moments",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("argument", ["mu_storage", "nu_storage"])
def test_a_storage_that_others_could_not_read_is_refused(kind, argument):
    with pytest.raises(ValueError, match=f"^{argument} must .*{REFUSED[kind]}"):
        ao.scale_by_adam(**{argument: kind()})
    with pytest.raises(ValueError, match=f"^storage must .*{REFUSED[kind]}"):
        ao.scale_by_rms(storage=kind())


def test_a_plain_storage_needs_nothing_more():
    state = trained(ao.scale_by_adam(mu_storage=Plain(), nu_storage=Plain()))
    jax.tree.map(np.testing.assert_array_equal, ao.dense(state.mu), state.mu)


OWN = [
    ao.Float32(),
    ao.BFloat16(),
    ao.BFloat16("nearest"),
    ao.Int8(),
    ao.Int8(block_size=16, min_size=1),
    NearestCast(jnp.dtype(jnp.float16)),
    NearestCast(jnp.dtype(jnp.bfloat16)),
]


@pytest.mark.parametrize("storage", OWN, ids=repr)
def test_the_library_s_own_formats_pass_the_check(storage):
    assert type(storage) in CHECKED
    check_storage("storage", storage)


def test_every_format_that_is_built_unchecked_is_checked_here():
    assert set(CHECKED) == set(map(type, OWN))

    class Deeper(ao.Float32):
        def init(self, params_like, role):
            return jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), params_like)

    with pytest.raises(ValueError, match="decode to zeros"):
        ao.scale_by_adam(mu_storage=Deeper())


def test_a_storage_is_checked_inside_a_trace_too():
    def step(g):
        tx = ao.scale_by_adam(mu_storage=Lossy())
        return tx.update(g, tx.init(g))[0]

    assert jnp.isfinite(jax.jit(step)(PARAMS)["w"]).all()
    with pytest.raises(ValueError, match="tree of integers"):
        jax.jit(lambda g: ao.scale_by_adam(nu_storage=Integers()).init(g))(PARAMS)


# ---- A granularity of the user's own ----


def halves_by_hand(steps, b1=0.9, b2=0.999, eps=1e-8):
    """Adam in NumPy float64 with one second moment for each half."""
    mu = {name: np.zeros(p.shape) for name, p in PARAMS.items()}
    nu = {name: np.zeros(2) for name in PARAMS}
    for step in range(steps):
        out = {}
        for name, g in gradients(step).items():
            g = np.asarray(g, float)
            mu[name] = b1 * mu[name] + (1 - b1) * g
            nu[name] = b2 * nu[name] + (1 - b2) * np.array([np.mean(half**2) for half in np.split(g, 2)])
            root = np.sqrt(nu[name] / (1 - b2 ** (step + 1))) + eps
            root = np.repeat(root, len(g) // 2).reshape(-1, *(1,) * (g.ndim - 1))
            out[name] = mu[name] / (1 - b1 ** (step + 1)) / root
    return out


@pytest.mark.parametrize("storage", ["float32", Lossy()], ids=["float32", "lossy"])
def test_a_granularity_steps_as_it_says(storage):
    tx = ao.scale_by_adam(granularity=Halves(), nu_storage=storage)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    assert jax.tree.map(jnp.shape, ao.dense(state.nu)) == {"w": (2,), "b": (2,)}
    updates = None
    for count in range(5):
        updates, state = step(gradients(count), state)
    tolerance = 2e-6 if storage == "float32" else 0.1
    jax.tree.map(
        lambda u, e: np.testing.assert_allclose(u, e, rtol=tolerance, atol=tolerance),
        updates,
        halves_by_hand(5),
    )


@pytest.mark.parametrize("rows", [2, 8])
def test_telemetry_leaves_undefined_what_such_a_state_does_not_tell(rows):
    """With two columns, a statistic of shape (2,) would broadcast along the wrong axis."""
    params = {"w": jnp.asarray(RNG.normal(size=(rows, 2)), jnp.float32)}
    tx = ao.telemetry(ao.adam(0.1, granularity=Halves()))
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    seen = ao.get_telemetry(state)
    assert np.isnan(seen.snr) and np.isnan(seen.bound_utilisation) and np.isnan(seen.histogram).all()
    assert seen.cosine > 0 and seen.learning_rate == np.float32(0.1)


def test_conversions_refuse_or_carry_such_a_state():
    tx = ao.scale_by_adam(granularity=Halves())
    state = trained(tx)
    smaller = ao.convert_storage(state, mu_storage="bfloat16", nu_storage=Lossy())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0.1), ao.dense(smaller.nu), ao.dense(state.nu)
    )
    with pytest.raises(ValueError, match="per coordinate"):
        ao.to_optax(state)
    with pytest.raises(ValueError, match="per coordinate"):
        ao.from_optax(trained(optax.scale_by_adam()), tx, PARAMS)
    kept, _ = ao.transfer_state(state, tx, tx, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


# ---- A transformation of the user's own ----


def _at_least_squares(state, values):
    def leaf(v, m):
        return jnp.maximum(v, jnp.square(m) / 100) if v.shape == m.shape else v

    if jax.tree.structure(values["first"]) != jax.tree.structure(values["second"]):
        return values
    return values | {"second": jax.tree.map(leaf, values["second"], values["first"])}


@ao.carries_hyperparameters("b")
@ao.carries_moments(
    _at_least_squares,
    first=ao.MomentField("mu", weight="weight", decay="b"),
    second=ao.MomentField("nu", weight="weight", decay="b"),
)
class Theirs(NamedTuple):
    """Under other names than those of the library."""

    count: Any
    first: Any
    second: Any
    b: Any
    weight: Any


class Undeclared(NamedTuple):
    count: Any
    first: Any
    second: Any
    b: Any
    weight: Any


def theirs(storage="float32", granularity="coordinate", b=0.9, state_type=Theirs):
    """Divides a moving mean by a moving root mean square, both with one decay."""
    storage, granularity = ao.as_storage(storage, b=b), ao.as_granularity(granularity)

    def init(params):
        def zero():
            return jnp.zeros((), jnp.float32)

        second = storage.init(granularity.template(params), "nu")
        first = storage.init(params, "mu")
        return state_type(jnp.zeros((), jnp.int32), first, second, zero() + b, zero())

    def update(updates, state, params=None):
        count = state.count + 1

        def ema(old, new):
            return jax.tree.map(lambda x, y: b * x + (1 - b) * y, old, new)

        squares = granularity.pool(jax.tree.map(jnp.square, updates))
        first, second = ema(storage.decode(state.first), updates), ema(storage.decode(state.second), squares)
        direction = jax.tree.map(
            lambda m, v: m / jnp.sqrt(v + 1e-8), first, granularity.spread(second, first)
        )
        first = storage.encode(state.first, first, count=count, role="mu")
        second = storage.encode(state.second, second, count=count, role="nu")
        return direction, state_type(count, first, second, state.b, ema(state.weight, 1.0))

    return optax.GradientTransformation(init, update)


def deep(inner):
    return ao.reject_nonfinite(optax.chain(inner, ao.scale_by_learning_rate(0.1)))


def own(state):
    return state.inner_state[0]


@pytest.mark.parametrize("new", ["bfloat16", ao.Int8(min_size=1), Lossy()], ids=str)
def test_a_declared_state_is_converted_at_any_depth(new):
    tx = deep(theirs(new))
    state = trained(deep(theirs()))
    moved = ao.convert_storage(state, mu_storage=new, nu_storage=new)
    assert jax.tree.structure(moved) == jax.tree.structure(tx.init(PARAMS))
    for field in ("first", "second"):
        pairs = ao.dense(getattr(own(moved), field)), getattr(own(state), field)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0.15, atol=0.1), *pairs)
    trained(tx, state=moved)
    # Converting back restores what rounding broke.
    wide = own(ao.convert_storage(moved, mu_storage="float32", nu_storage="float32"))
    jax.tree.map(lambda m, v: np.testing.assert_array_less(m**2 / 101, v + 1e-30), wide.first, wide.second)
    with pytest.raises(ValueError, match=r"^b must be at most 0.99609375 with mu_storage=.*0.999"):
        ao.convert_storage(trained(deep(theirs(b=0.999))), mu_storage=ao.BFloat16("nearest"))


@pytest.mark.parametrize("granularity", ["tensor", "global", ao.Axis(-1)], ids=str)
def test_a_declared_state_is_transferred(granularity):
    old, new = deep(theirs()), deep(theirs("bfloat16", granularity))
    state = trained(old)
    moved, table = ao.transfer_state(state, old, new, PARAMS | {"head": jnp.ones(2)})
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-7),
        {name: x for name, x in ao.dense(own(moved).first).items() if name != "head"},
        own(state).first,
    )
    expected = ao.as_granularity(granularity).pool(own(state).second)
    got = ao.dense(own(moved).second)
    got = {name: got[name] for name in PARAMS} if isinstance(got, dict) else got
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y.reshape(x.shape), rtol=2**-7), got, expected)
    outcomes = {row.path: row.outcome for row in table}
    assert outcomes["inner_state/0/first/w"] == "kept" and outcomes["inner_state/0/first/head"] == "new"
    assert own(moved).count == 5 and own(moved).weight == own(state).weight
    # The moments of two groups go into one state.
    groups = ao.partition_by_path({"w": theirs(), "b": theirs()})
    together, _ = ao.transfer_state(trained(groups), groups, theirs(), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, together, trained(theirs()))


def test_moments_with_other_weights_keep_their_means():
    groups = ao.partition_by_path({"w": theirs(), "b": theirs()})
    state, weights = trained(groups), iter((1.0, 3.0))

    def heavier(x):
        if not isinstance(x, Theirs):
            return x
        by = next(weights)
        first, second = (jax.tree.map(lambda m: by * m, moment) for moment in (x.first, x.second))
        return x._replace(first=first, second=second, weight=by * x.weight)

    state = jax.tree.map(heavier, state, is_leaf=lambda x: isinstance(x, Theirs))
    moved, _ = ao.transfer_state(state, groups, theirs(), PARAMS)
    expected = trained(theirs())
    for field in ("first", "second"):
        means = [jax.tree.map(lambda m, x=x: m / x.weight, getattr(x, field)) for x in (moved, expected)]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *means)


def test_a_repair_that_changes_shapes_is_refused():
    @ao.carries_moments(lambda state, values: {"first": jnp.ones(7)}, first="mu")
    class Wrong(NamedTuple):
        count: Any
        first: Any

    state = Wrong(jnp.zeros((), jnp.int32), jnp.ones(3, jnp.bfloat16))
    with pytest.raises(
        ValueError, match=r"^Wrong: '' has shape \(7,\) in the repaired first and \(3,\) in the state"
    ):
        ao.convert_storage(state, mu_storage="float32")


def test_a_declaration_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"^The role of 'first' must be one of 'mu', 'nu', got 'sigma'\.$"):
        ao.carries_moments(first="sigma")
    for field, lacking in (("third", "third"), ("first", "sum")):
        with pytest.raises(
            ValueError, match=rf"^carries_moments: Undeclared .* got one without '{lacking}'\.$"
        ):
            ao.carries_moments(**{field: ao.MomentField("mu", weight="sum")})(Undeclared)


def test_a_first_moment_of_theirs_needs_its_second():
    old = theirs(granularity=ao.Labels(lambda path, leaf: path))
    moved, table = ao.transfer_state(trained(old), old, theirs(), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, moved, theirs().init(PARAMS))
    assert "its second moment could not be carried over" in {row.reason for row in table}


def test_an_undeclared_state_is_new_and_says_why():
    tx = optax.chain(theirs(state_type=Undeclared), ao.scale_by_learning_rate(0.1))
    moved, table = ao.transfer_state(trained(tx), tx, tx, PARAMS)
    assert not moved[0].first["w"].any()
    assert {row.reason for row in table if row.path.startswith("0/")} == {
        "its state is of another library, and does not declare its moments"
    }
    with pytest.raises(ValueError, match="convert_storage: opt_state must hold a state"):
        ao.convert_storage(trained(tx), mu_storage="bfloat16")


def test_the_hyperparameters_of_a_declared_state_are_read():
    assert ao.get_hyperparams(trained(deep(theirs())))["b"] == np.float32(0.9)


def test_declarations_that_are_mistaken_are_refused():
    class Named(NamedTuple):
        count: jax.Array
        average: jax.Array

    class Inherits(Named):
        """A state with a name of its own."""

    for build, sentence in (
        (lambda: ao.carries_moments(Named), "repair must be a function"),
        (lambda: ao.carries_moments("mu"), "repair must be a function"),
        (lambda: ao.carries_moments(), "needs at least one moment"),
        (
            lambda: ao.carries_moments(average=ao.MomentField("mu", weight=3)),
            "The weight of 'average' must be",
        ),
        (lambda: ao.carries_hyperparameters(Named), "needs the names of hyperparameters"),
        (lambda: ao.carries_hyperparameters("zzz")(Named), "Named has no attribute 'zzz'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build()
    ao.carries_hyperparameters("average")(Named)
    assert ao.get_hyperparams(Inherits(jnp.int32(0), jnp.float32(2.0))) == {"average": 2.0}
    ao.carries_moments(lambda state, values: {"averge": values["average"]}, average="mu")(Named)
    state = Named(jnp.int32(0), ao.BFloat16().init(jnp.ones(3), "mu"))
    with pytest.raises(ValueError, match="Named: repair must return a dictionary of moments among 'average'"):
        ao.convert_storage(state, mu_storage="float32")
