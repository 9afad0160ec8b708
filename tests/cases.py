"""The registry of public factories: what each needs for the contracts of `test_contract.py`.

An exception from a contract is declared here with its reason, never by name inside a test.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from halves import Halves
from lossy import Lossy

import adaptive_optax as ao


class Rounding(NamedTuple):
    """The largest relative step between neighbouring values of what is kept, and what rounds to it."""

    level: float
    reason: str


class After(NamedTuple):
    """What an unusual gradient does to the steps from it on.

    Kinds, as `test_contract.py` asserts them:
        recovers: That step and all later ones are finite, and so is the state.
        passes: It goes into the update of that step. Later updates, and the state, are those of a run that
            had an ordinary gradient in its place.
        fades: The state stays finite, and what it holds of the gradient shrinks with every step.
        kept: It is in the state for good. Updates are as with "passes".
        stops: The state is not finite, for good. The coordinate's updates are 0 but for what dies away
            (momentum) and what does not come from gradients (weight decay); none is NaN. Leaves that share no
            moment with it do not notice.
        poisoned: The state is NaN, for good, and so are the coordinate's updates, unless something behind
            replaces them. Leaves that share no moment with it do not notice.
        rejects: The updates are 0, the state stays but for counters, and the run goes on as if the gradient
            had not been there.
        raises: The step raises an AssertionError.
    """

    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Case:
    """A factory with arguments, and what it is exempt from, with the reason.

    Attributes:
        name: Test id.
        factory: The public name.
        make: Builds the transformation; keyword arguments override those of the case.
        sweep: Two values for each scalar hyperparameter.
        arguments: What `make` gives to the factory.
        period: Calls of `update` for one step, with the same gradient: contracts about what a step does look
            at the last of them.
        given_to_update: Turns gradients of the loss, with the state, into those that the caller passes.
        after_zero: What a zero gradient does.
        after_spike: What 1e20 in one coordinate does.
        after_nan: What a NaN in one coordinate does.
        shares: Why the range of gradients ends at 1e15 and not at 1e18, if it does.
        rounds: What is rounded, and how coarsely. Two correct runs may differ by a level of it.
        zero_moves: Why a zero gradient gives a non-zero update, if it does.
        not_traceable: Why contract 1 does not hold, if it does not.
        hides_nan: Why a NaN gradient does not reach the updates, if it does not.
        own_scalars: Why the state's scalars do not all take the widest dtype of the tree, if they do not.
        updates_dtype: What dtype updates leave in, with the reason, if not float32 at least.
        untracked: Why contract 9 does not hold, if it does not.
    """

    name: str
    factory: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    sweep: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    period: int = 1
    given_to_update: Callable[[Any, Any], Any] = lambda gradients, state: gradients
    after_zero: After = After("recovers", "a zero is a gradient like others")
    after_spike: After = After("stops", "its square overflows in v, which it is divided by")
    after_nan: After = After("poisoned", "it stays in the moments")
    shares: str = ""
    rounds: Rounding | None = None
    zero_moves: str = ""
    not_traceable: str = ""
    hides_nan: str = ""
    own_scalars: str = ""
    updates_dtype: str = ""
    untracked: str = ""

    @property
    def rounding(self) -> float:
        """The level of `rounds`, 0 where nothing is rounded."""
        return self.rounds.level if self.rounds else 0.0


DECLARED = {field.name for field in dataclasses.fields(Case)}


def _case(name, factory, sweep=None, **keywords):
    """A case from the arguments of the factory and what is to be declared."""
    declared = {key: value for key, value in keywords.items() if key in DECLARED}
    arguments = {key: value for key, value in keywords.items() if key not in DECLARED}

    def make(**overrides):
        return getattr(ao, factory)(**(arguments | overrides))

    return Case(name, factory, make, sweep or {}, arguments, **declared)


SUMS = "squares are summed before they are averaged, and the sum overflows first"
DECAYS = "the parameters decay whatever the gradient is"
OWN = "a moment of one value per leaf has its leaf's dtype"
LEVELS = Rounding(1 / 15, "Lossy has 15 levels per leaf")
LOST = "Lossy rounds small values to 0 on purpose, so that what is divided by their root has no bound"
NEAREST = Rounding(2**-8, "bfloat16, to nearest")

PASSES = After("passes", "no gradient is kept")
MOMENTUM = After("fades", "the momentum holds it and decays")
STATELESS = {"after_spike": PASSES, "after_nan": PASSES}
WITH_MOMENTUM = {"after_spike": MOMENTUM, "after_nan": After("poisoned", "it stays in the momentum")}
AVERAGES = {
    "after_spike": After("fades", "its weight in the average shrinks"),
    "after_nan": After("kept", "it is in the average for good, which no update is made from"),
}
REJECTED = After("rejects", "a step that is not finite, or would make the state so, is not taken")
REJECTS = {"after_spike": REJECTED, "after_nan": REJECTED}

RATE = {"learning_rate": (0.1, 0.003)}
RMS = {"decay": (0.9, 0.5), "eps": (1e-8, 1e-3)}
ADAM = {"b1": (0.9, 0.0), "b2": (0.999, 0.95), "eps": (1e-8, 1e-3), "eps_root": (0.0, 1e-3)}


def _by_name(path: str, leaf: Any) -> str:
    return path.split("/")[-1]


COARSE = {
    "axis": ao.Axis(-1),
    "axes": ao.Axis(0, 1),  # vectors stay per coordinate
    "tensor": ao.Tensor(),
    "labels": ao.Labels(_by_name),
    "global_sum": ao.Global("sum"),
    "halves": Halves(),  # a user's own
}

BY_PATH = ao.ByPath({"kernel|wide": ao.Axis(-1), "bias|half": "global"}, default="tensor", strict=False)


def given(tx: Any, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation with extra arguments that it needs, where the contracts give none."""

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, **(arguments | extra_args))

    return optax.GradientTransformationExtraArgs(tx.init, update)


def on_a_slope(tx: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation with the loss that it needs: one with the gradient, and a curvature like it."""

    def update(updates, state, params=None, **extra_args):
        given = [jnp.asarray(x) for x in jax.tree.leaves(params)]
        slopes = [jnp.asarray(x) for x in jax.tree.leaves(updates)]

        def loss(moved):
            total = jnp.zeros((), jnp.float32)
            for x, p, g in zip(jax.tree.leaves(moved), given, slopes, strict=True):
                wide = functools.reduce(np.promote_types, (x.dtype, p.dtype, g.dtype, np.float32))
                g, step = g.astype(wide), x.astype(wide) - p.astype(wide)
                curved = jnp.abs(g) * jnp.square(jnp.abs(step)) / 2
                total += jnp.sum((jnp.conj(g) * step).real + curved).astype(jnp.float32)
            return total

        return tx.update(updates, state, params, **(extra_args | {"value": 0.0, "value_fn": loss}))

    return optax.GradientTransformationExtraArgs(tx.init, update)


# On leaves as small as these, so that they are compressed.
CODES = "int8 codes, to either neighbour"
INT8 = ao.Int8(block_size=64, min_size=1)
FORMATS = [
    ("bfloat16", ao.BFloat16(), Rounding(2**-7, "bfloat16, to either neighbour")),
    ("bfloat16_to_nearest", ao.BFloat16("nearest"), NEAREST),
    ("int8", INT8, Rounding(1 / 8, CODES)),
]

CASES = [
    _case("rms", "scale_by_rms", RMS | {"initial_scale": (0.0, 1.0)}),
    _case("rms_beside", "scale_by_rms", RMS, eps_in_sqrt=False, bias_correction=True),
    _case("rms_centered", "scale_by_rms", RMS, centered=True),
    _case("rms_centered_corrected", "scale_by_rms", RMS, centered=True, bias_correction=True),
    _case("rms_scheduled", "scale_by_rms", decay=optax.linear_schedule(0.5, 0.9, 3), bias_correction=True),
    *(
        _case(
            f"rms_{n}", "scale_by_rms", granularity=g, shares=SUMS, own_scalars=OWN if n == "tensor" else ""
        )
        for n, g in COARSE.items()
    ),
    _case(
        "rms_centered_tensor",
        "scale_by_rms",
        centered=True,
        granularity="tensor",
        shares=SUMS,
        own_scalars=OWN,
    ),
    _case("rms_lossy", "scale_by_rms", storage=Lossy(), rounds=LEVELS, untracked=LOST),
    _case(
        "rms_lossy_centered",
        "scale_by_rms",
        centered=True,
        storage=Lossy(),
        rounds=LEVELS,
        untracked=LOST,
    ),
    _case(
        "rms_lossy_global",
        "scale_by_rms",
        storage=Lossy(),
        granularity="global",
        rounds=LEVELS,
        shares=SUMS,
    ),
    _case("global_rms", "scale_by_global_rms", RMS, shares=SUMS),
    _case("adam", "scale_by_adam", ADAM),
    _case("adam_tensorflow", "scale_by_adam", ADAM, eps_form="tensorflow"),
    _case("adam_nesterov", "scale_by_adam", ADAM, nesterov=True),
    _case("adam_amsgrad", "scale_by_adam", ADAM, amsgrad=True),
    _case("adam_uncorrected", "scale_by_adam", ADAM, bias_correction=False),
    _case("adam_mu_dtype", "scale_by_adam", mu_dtype=jnp.bfloat16, rounds=NEAREST),
    _case("adam_scheduled", "scale_by_adam", b1=optax.linear_schedule(0.95, 0.85, 3)),
    *(
        _case(
            f"adam_{n}", "scale_by_adam", granularity=g, shares=SUMS, own_scalars=OWN if n == "tensor" else ""
        )
        for n, g in COARSE.items()
    ),
    _case(
        "adam_lossy",
        "scale_by_adam",
        mu_storage=Lossy(),
        nu_storage=Lossy(),
        rounds=LEVELS,
        untracked=LOST,
    ),
    _case("adam_lossy_mu", "scale_by_adam", mu_storage=Lossy(), rounds=LEVELS, untracked=LOST),
    _case(
        "adam_lossy_amsgrad",
        "scale_by_adam",
        nu_storage=Lossy(),
        amsgrad=True,
        rounds=LEVELS,
        untracked=LOST,
    ),
    *(
        _case(
            f"adam_lossy_{n}",
            "scale_by_adam",
            nu_storage=Lossy(),
            granularity=g,
            rounds=LEVELS,
            untracked="" if n in ("tensor", "global_sum") else LOST,  # a single value is its scale
            shares=SUMS,
        )
        for n, g in COARSE.items()
    ),
    _case("learning_rate", "scale_by_learning_rate", RATE, learning_rate=0.1, **STATELESS),
    _case(
        "learning_rate_scheduled",
        "scale_by_learning_rate",
        learning_rate=ao.step_decay(0.1, 0.8, 2),
        **STATELESS,
    ),
    _case(
        "weight_decay",
        "add_decoupled_weight_decay",
        {"weight_decay": (0.1, 0.0)},
        weight_decay=0.1,
        zero_moves=DECAYS,
        **STATELESS,
    ),
    _case(
        "weight_decay_scheduled",
        "add_decoupled_weight_decay",
        {"weight_decay": (0.1, 0.0)},
        weight_decay=0.1,
        coupling="schedule",
        schedule=ao.step_decay(1.0, 0.8, 2),
        zero_moves=DECAYS,
        **STATELESS,
    ),
    _case(
        "clip",
        "clip_by_global_norm",
        {"max_norm": (1.0, 1e-3)},
        max_norm=1.0,
        after_spike=After("recovers", "the norm is right up to 1e30, and the step is clipped"),
        after_nan=PASSES,
    ),
    _case("trace", "trace", {"decay": (0.9, 0.0)}, decay=0.9, nesterov=True, **WITH_MOMENTUM),
    _case(
        "trace_bfloat16", "trace", decay=0.9, accumulator_dtype=jnp.bfloat16, rounds=NEAREST, **WITH_MOMENTUM
    ),
    _case("average_parameters", "average_parameters", {"power": (8.0, 0.0)}, **AVERAGES),
    _case("average_parameters_decay", "average_parameters", {"decay": (0.9, 0.0)}, decay=0.9, **AVERAGES),
    *(
        _case(
            f"adgd_{rule}",
            "adgd",
            {"initial_learning_rate": (0.1, 0.003), "max_learning_rate": (0.5, 0.001)},
            initial_learning_rate=0.1,
            rule=rule,
            **STATELESS,
        )
        for rule in ("2020", "2023")
    ),
    _case(
        "adgd_scheduled",
        "adgd",
        max_learning_rate=ao.step_decay(0.1, 0.8, 2),
        initial_learning_rate=0.1,
        **STATELESS,
    ),
    _case("optimizer_adam", "adam", RATE | ADAM, learning_rate=0.1),
    _case(
        "optimizer_adamw", "adamw", RATE | {"weight_decay": (0.1, 0.0)}, learning_rate=0.1, zero_moves=DECAYS
    ),
    _case(
        "optimizer_adamw_independent",
        "adamw",
        RATE,
        learning_rate=ao.one_cycle(0.1, 20).learning_rate,
        b1=ao.one_cycle(0.1, 20).momentum,
        decay_coupling="independent",
        zero_moves=DECAYS,
    ),
    _case(
        "optimizer_rmsprop",
        "rmsprop",
        RATE | RMS | {"initial_scale": (0.0, 1.0), "momentum": (0.9, 0.0)},
        learning_rate=0.1,
        momentum=0.9,
        centered=True,
    ),
    _case("optimizer_global_rmsprop", "global_rmsprop", RATE | RMS, learning_rate=0.1, shares=SUMS),
    _case(
        "optimizer_sgd",
        "sgd",
        RATE | {"momentum": (0.9, 0.0)},
        learning_rate=0.1,
        momentum=0.9,
        **WITH_MOMENTUM,
    ),
    *(
        _case(
            f"adam_{name}",
            "scale_by_adam",
            b2=0.99,
            mu_storage=storage,
            nu_storage=storage,
            rounds=rounding,
        )
        for name, storage, rounding in FORMATS
    ),
    _case(
        "adam_int8_bfloat16",
        "scale_by_adam",
        mu_storage=INT8,
        nu_storage="bfloat16",
        rounds=Rounding(1 / 8, CODES),
    ),
    _case("adam_float32_int8", "scale_by_adam", nu_storage=INT8, amsgrad=True, rounds=Rounding(1 / 8, CODES)),
    *(
        _case(
            f"adam_{name}_{n}",
            "scale_by_adam",
            mu_storage=storage,
            nu_storage=storage,
            granularity=g,
            rounds=rounding,
            shares=SUMS,
        )
        for name, storage, rounding in FORMATS[::2]
        for n, g in COARSE.items()
    ),
    *(
        _case(f"rms_{name}", "scale_by_rms", RMS, storage=storage, centered=True, rounds=rounding)
        for name, storage, rounding in FORMATS
    ),
    _case(
        "stochastic_rounding",
        "stochastic_rounding",
        rounds=Rounding(2**-7, "the sum of parameter and update, to either neighbour"),
        **STATELESS,
    ),
    _case(
        "match_parameter_dtype",
        "match_parameter_dtype",
        rounds=Rounding(2**-7, "the parameter's own dtype, to nearest, twice"),
        **STATELESS,
        updates_dtype="the parameters' dtype, which is what it is for",
    ),
    Case("kahan_summation", "kahan_summation", lambda: ao.kahan_summation(ao.adam(0.1)), rounds=NEAREST),
    Case("master_weights", "master_weights", lambda: ao.master_weights(ao.adam(0.1)), rounds=NEAREST),
    Case(
        "reject_nonfinite",
        "reject_nonfinite",
        lambda: ao.reject_nonfinite(ao.adam(0.1)),
        hides_nan="a step with a NaN is not taken",
        **REJECTS,
    ),
    *(
        _case(f"{n}_by_path", f"scale_by_{n}", granularity=BY_PATH, shares=SUMS, own_scalars=OWN)
        for n in ("rms", "adam")
    ),
    _case(
        "adam_int8_by_path",
        "scale_by_adam",
        mu_storage=INT8,
        nu_storage=INT8,
        granularity=BY_PATH,
        rounds=Rounding(1 / 8, CODES),
        shares=SUMS,
    ),
    _case(
        "optimizer_adam_mini",
        "adam_mini",
        RATE | {"weight_decay": (0.1, 0.0)},
        learning_rate=0.1,
        params_layout={p: role for p, role in ao.FLAX_LAYOUT.items() if role != "query_key"},
        shares=SUMS,
        zero_moves=DECAYS,
        own_scalars=OWN,
    ),
    Case(
        "partition_by_path",
        "partition_by_path",
        lambda: ao.partition_by_path({"kernel|a|steps|^$": ao.adam(0.1), "": ao.sgd(0.1, momentum=0.9)}),
        own_scalars="a group's scalars go with the leaves of the group",
    ),
    Case(
        "telemetry",
        "telemetry",
        lambda: ao.telemetry(ao.adam(0.1), every=2),
    ),
    Case(
        "telemetry_per_tensor",
        "telemetry",
        lambda: ao.telemetry(ao.adamw(0.1, granularity="tensor"), per="tensor"),
        zero_moves=DECAYS,
        shares=SUMS,
        own_scalars=OWN,
    ),
    Case("accumulate_gradients", "accumulate_gradients", lambda: ao.accumulate_gradients(ao.adam(0.1), 1)),
    Case(
        "accumulate_gradients_dropping",
        "accumulate_gradients",
        lambda: ao.accumulate_gradients(
            ao.reject_nonfinite(ao.adam(0.1)), optax.constant_schedule(1), drop_nonfinite=True
        ),
        hides_nan="a micro-batch with a NaN is dropped",
        after_spike=After("rejects", "a micro-batch whose squared norm overflows is dropped"),
        after_nan=After("rejects", "a micro-batch that is not finite is dropped"),
    ),
    Case(
        "freeze",
        "freeze",
        # In the trees of the contracts this freezes what every contract lets stand still.
        lambda: ao.freeze(ao.adam(0.1), lambda params: jax.tree.map(lambda x: x.size == 0, params)),
    ),
    Case(
        "dynamic_loss_scale",
        "dynamic_loss_scale",
        lambda: ao.dynamic_loss_scale(ao.adam(0.1), init_scale=1.0),
        given_to_update=ao.scale_loss,  # multiplies a tree
        hides_nan="a step with an overflow is not taken",
        **REJECTS,
    ),
    Case(
        "accumulate_gradients_waiting",
        "accumulate_gradients",
        lambda: ao.accumulate_gradients(ao.adam(0.1), 3),
        period=3,
    ),
    *(
        Case(
            f"accumulate_gradients_{every}",
            "accumulate_gradients",
            # Every call flushes, so that a window is cut short at each.
            lambda every=every: given(ao.accumulate_gradients(ao.adam(0.1), every), emit=True),
        )
        for every in (2, 3)
    ),
    Case(
        "reduce_on_plateau",
        "reduce_on_plateau",
        lambda: given(ao.reduce_on_plateau(), value=1.0),
        **STATELESS,
    ),
    *(
        Case(
            f"error_controlled_{name}",
            "error_controlled",
            # No limit is ever below the given rate: what probes find depends on all leaves.
            lambda make=make: on_a_slope(make()),
            shares=shares,
        )
        for name, make, shares in (
            ("adam", lambda: ao.error_controlled(ao.scale_by_adam(), 1e-4, initial_learning_rate=0.3), ""),
            (
                "scheduled",
                lambda: ao.error_controlled(
                    ao.scale_by_adam(), optax.linear_schedule(1e-4, 0.0, 10), initial_learning_rate=0.3
                ),
                "",
            ),
            (
                "followed",
                lambda: ao.error_controlled(
                    ao.scale_by_adam(), 1e-4, initial_learning_rate=0.3, controller="noisy"
                ),
                "",
            ),
            (
                "gradient",
                lambda: ao.error_controlled(
                    ao.scale_by_adam(granularity=ao.Axis(-1)),
                    1e-4,
                    estimate="gradient",
                    initial_learning_rate=0.3,
                ),
                SUMS,
            ),
        )
    ),
    Case(
        "injected",
        "adam",
        lambda **overrides: ao.inject_hyperparams(ao.adam)(0.1, **overrides),
        own_scalars="values in the state are float32 whatever the parameters are",
    ),
    Case(
        "verified",
        "verified",
        lambda: ao.verified(ao.scale_by_adam()),
        after_spike=After("raises", "the state becomes not finite, which is checked"),
        after_nan=After("raises", "the update is not finite, which is checked"),
        not_traceable="checks values, which needs chex.chexify around the outermost jitted function",
    ),
]


def mixed_params() -> dict[str, Any]:
    """A tree with every kind of leaf that a user may have."""
    return {
        "block": {"kernel": jnp.full((4, 3), 0.5), "bias": jnp.full((3,), -0.25, jnp.bfloat16)},
        "scalar": jnp.asarray(2.0),
        "half": jnp.full((2,), 0.125, jnp.float16),
        "complex": jnp.full((2,), 0.5 - 1.0j, jnp.complex64),
        "empty": jnp.zeros((0, 2)),
        "none": None,
        "masked": optax.MaskedNode(),
        "wide": jnp.linspace(-1.0, 1.0, 160).reshape(2, 80),  # wide enough for `Int8`
    }


def random_gradients(params: Any, seed: int) -> Any:
    """Standard normal gradients in the dtypes of the parameters."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, _drawn(seed, *((x.shape, jnp.dtype(x.dtype)) for x in leaves)))


@functools.cache
def _drawn(seed: int, *kinds: tuple[tuple[int, ...], Any]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), len(kinds))

    def drawn(key, shape, dtype):
        return jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32)).astype(dtype)

    return [drawn(key, *kind) for key, kind in zip(keys, kinds, strict=True)]
