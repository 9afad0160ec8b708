"""The registry of public factories: what each needs for the contracts of `test_contract.py`.

An exception from a contract is declared here with its reason, never by name inside a test.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from lossy import Lossy

import adaptive_optax as ao


@dataclasses.dataclass(frozen=True)
class Case:
    """A factory with arguments.

    Attributes:
        name: Test id.
        factory: The public name.
        make: Builds the transformation; keyword arguments override scalar hyperparameters.
        sweep: Two values for each scalar hyperparameter.
        shares: Whether coordinates share a moment (the range of gradients is then 1e15, not 1e18).
        rounding: Relative rounding of the stored state. Two correct runs may differ by one level of it.
        zero_moves: Whether a zero gradient gives a non-zero update (weight decay).
        not_traceable: Why contract 1 does not hold, if it does not.
        arguments: What `make` gives to the factory.
        raises_at_nan: Whether a NaN gradient raises, instead of going through.
        hides_nan: Why a NaN gradient does not reach the updates, if it does not.
        scalars_follow: Whether the state's scalars take the widest dtype of the tree (a scalar moment takes
            its own leaf's).
    """

    name: str
    factory: str
    make: Callable[..., optax.GradientTransformationExtraArgs]
    sweep: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    shares: bool = False
    rounding: float = 0.0
    zero_moves: bool = False
    not_traceable: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    raises_at_nan: bool = False
    hides_nan: str = ""
    scalars_follow: bool = True


DECLARED = {field.name for field in dataclasses.fields(Case)}


def _case(name, factory, sweep=None, **keywords):
    """A case from the arguments of the factory and what is to be declared."""
    declared = {key: value for key, value in keywords.items() if key in DECLARED}
    arguments = {key: value for key, value in keywords.items() if key not in DECLARED}

    def make(**overrides):
        return getattr(ao, factory)(**(arguments | overrides))

    return Case(name, factory, make, sweep or {}, arguments=arguments, **declared)


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
}

BY_PATH = ao.ByPath({"kernel|wide": ao.Axis(-1), "bias|half": "global"}, default="tensor", strict=False)


def given(tx: Any, **arguments: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation with extra arguments that it needs, where the contracts give none."""

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, **(arguments | extra_args))

    return optax.GradientTransformationExtraArgs(tx.init, update)


# On leaves as small as these, so that they are compressed.
INT8 = ao.Int8(block_size=64, min_size=1)
FORMATS = [
    ("bfloat16", ao.BFloat16(), 2**-7),
    ("bfloat16_to_nearest", ao.BFloat16("nearest"), 2**-8),
    ("int8", INT8, 1 / 8),
]

CASES = [
    _case("rms", "scale_by_rms", RMS | {"initial_scale": (0.0, 1.0)}),
    _case("rms_beside", "scale_by_rms", RMS, eps_in_sqrt=False, bias_correction=True),
    _case("rms_centered", "scale_by_rms", RMS, centered=True),
    _case("rms_centered_corrected", "scale_by_rms", RMS, centered=True, bias_correction=True),
    _case("rms_scheduled", "scale_by_rms", decay=optax.linear_schedule(0.5, 0.9, 3), bias_correction=True),
    *(
        _case(f"rms_{n}", "scale_by_rms", granularity=g, shares=True, scalars_follow=n != "tensor")
        for n, g in COARSE.items()
    ),
    _case(
        "rms_centered_tensor",
        "scale_by_rms",
        centered=True,
        granularity="tensor",
        shares=True,
        scalars_follow=False,
    ),
    _case("rms_lossy", "scale_by_rms", storage=Lossy(), rounding=1 / 15),
    _case("rms_lossy_centered", "scale_by_rms", centered=True, storage=Lossy(), rounding=1 / 15),
    _case(
        "rms_lossy_global",
        "scale_by_rms",
        storage=Lossy(),
        granularity="global",
        rounding=1 / 15,
        shares=True,
    ),
    _case("global_rms", "scale_by_global_rms", RMS, shares=True),
    _case("adam", "scale_by_adam", ADAM),
    _case("adam_tensorflow", "scale_by_adam", ADAM, eps_form="tensorflow"),
    _case("adam_nesterov", "scale_by_adam", ADAM, nesterov=True),
    _case("adam_amsgrad", "scale_by_adam", ADAM, amsgrad=True),
    _case("adam_uncorrected", "scale_by_adam", ADAM, bias_correction=False),
    _case("adam_bfloat16", "scale_by_adam", mu_dtype=jnp.bfloat16, rounding=2**-8),
    _case("adam_scheduled", "scale_by_adam", b1=optax.linear_schedule(0.95, 0.85, 3)),
    *(
        _case(f"adam_{n}", "scale_by_adam", granularity=g, shares=True, scalars_follow=n != "tensor")
        for n, g in COARSE.items()
    ),
    _case("adam_lossy", "scale_by_adam", mu_storage=Lossy(), nu_storage=Lossy(), rounding=1 / 15),
    _case("adam_lossy_mu", "scale_by_adam", mu_storage=Lossy(), rounding=1 / 15),
    _case("adam_lossy_amsgrad", "scale_by_adam", nu_storage=Lossy(), amsgrad=True, rounding=1 / 15),
    *(
        _case(
            f"adam_lossy_{n}",
            "scale_by_adam",
            nu_storage=Lossy(),
            granularity=g,
            rounding=1 / 15,
            shares=True,
        )
        for n, g in COARSE.items()
    ),
    _case("learning_rate", "scale_by_learning_rate", RATE, learning_rate=0.1),
    _case("learning_rate_scheduled", "scale_by_learning_rate", learning_rate=ao.step_decay(0.1, 0.8, 2)),
    _case(
        "weight_decay",
        "add_decoupled_weight_decay",
        {"weight_decay": (0.1, 0.0)},
        weight_decay=0.1,
        zero_moves=True,
    ),
    _case(
        "weight_decay_scheduled",
        "add_decoupled_weight_decay",
        {"weight_decay": (0.1, 0.0)},
        weight_decay=0.1,
        coupling="schedule",
        schedule=ao.step_decay(1.0, 0.8, 2),
        zero_moves=True,
    ),
    _case("clip", "clip_by_global_norm", {"max_norm": (1.0, 1e-3)}, max_norm=1.0, shares=True),
    _case("trace", "trace", {"decay": (0.9, 0.0)}, decay=0.9, nesterov=True),
    _case("trace_bfloat16", "trace", decay=0.9, accumulator_dtype=jnp.bfloat16, rounding=2**-8),
    _case("average_parameters", "average_parameters", {"power": (8.0, 0.0)}),
    _case("optimizer_adam", "adam", RATE, learning_rate=0.1),
    _case(
        "optimizer_adamw", "adamw", RATE | {"weight_decay": (0.1, 0.0)}, learning_rate=0.1, zero_moves=True
    ),
    _case(
        "optimizer_adamw_independent",
        "adamw",
        RATE,
        learning_rate=ao.one_cycle(0.1, 20).learning_rate,
        b1=ao.one_cycle(0.1, 20).momentum,
        decay_coupling="independent",
        zero_moves=True,
    ),
    _case("optimizer_rmsprop", "rmsprop", RATE, learning_rate=0.1, momentum=0.9, centered=True),
    _case("optimizer_global_rmsprop", "global_rmsprop", RATE, learning_rate=0.1, shares=True),
    _case("optimizer_sgd", "sgd", RATE | {"momentum": (0.9, 0.0)}, learning_rate=0.1, momentum=0.9),
    *(
        _case(
            f"adam_{name}",
            "scale_by_adam",
            b2=0.99,
            mu_storage=storage,
            nu_storage=storage,
            rounding=rounding,
        )
        for name, storage, rounding in FORMATS
    ),
    _case("adam_int8_bfloat16", "scale_by_adam", mu_storage=INT8, nu_storage="bfloat16", rounding=1 / 8),
    _case("adam_float32_int8", "scale_by_adam", nu_storage=INT8, amsgrad=True, rounding=1 / 8),
    *(
        _case(
            f"adam_{name}_{n}",
            "scale_by_adam",
            mu_storage=storage,
            nu_storage=storage,
            granularity=g,
            rounding=rounding,
            shares=True,
        )
        for name, storage, rounding in FORMATS[::2]
        for n, g in COARSE.items()
    ),
    *(
        _case(f"rms_{name}", "scale_by_rms", RMS, storage=storage, centered=True, rounding=rounding)
        for name, storage, rounding in FORMATS
    ),
    _case("stochastic_rounding", "stochastic_rounding", rounding=2**-7),
    Case("kahan_summation", "kahan_summation", lambda: ao.kahan_summation(ao.adam(0.1)), rounding=2**-8),
    Case("master_weights", "master_weights", lambda: ao.master_weights(ao.adam(0.1)), rounding=2**-8),
    Case(
        "reject_nonfinite",
        "reject_nonfinite",
        lambda: ao.reject_nonfinite(ao.adam(0.1)),
        hides_nan="a step with a NaN is not taken",
    ),
    *(
        _case(f"{n}_by_path", f"scale_by_{n}", granularity=BY_PATH, shares=True, scalars_follow=False)
        for n in ("rms", "adam")
    ),
    _case(
        "adam_int8_by_path",
        "scale_by_adam",
        mu_storage=INT8,
        nu_storage=INT8,
        granularity=BY_PATH,
        rounding=1 / 8,
        shares=True,
    ),
    _case(
        "optimizer_adam_mini",
        "adam_mini",
        RATE | {"weight_decay": (0.1, 0.0)},
        learning_rate=0.1,
        params_layout={p: role for p, role in ao.FLAX_LAYOUT.items() if role != "query_key"},
        shares=True,
        zero_moves=True,
        scalars_follow=False,
    ),
    Case(
        "partition_by_path",
        "partition_by_path",
        lambda: ao.partition_by_path({"kernel|a|steps|^$": ao.adam(0.1), "": ao.sgd(0.1, momentum=0.9)}),
        scalars_follow=False,
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
        zero_moves=True,
        shares=True,
        scalars_follow=False,
    ),
    Case("accumulate_gradients", "accumulate_gradients", lambda: ao.accumulate_gradients(ao.adam(0.1), 1)),
    Case(
        "accumulate_gradients_dropping",
        "accumulate_gradients",
        lambda: ao.accumulate_gradients(
            ao.reject_nonfinite(ao.adam(0.1)), optax.constant_schedule(1), drop_nonfinite=True
        ),
        hides_nan="a micro-batch with a NaN is dropped",
    ),
    Case("reduce_on_plateau", "reduce_on_plateau", lambda: given(ao.reduce_on_plateau(), value=1.0)),
    Case("injected", "adam", lambda: ao.inject_hyperparams(ao.adam)(0.1), scalars_follow=False),
    Case(
        "verified",
        "verified",
        lambda: ao.verified(ao.scale_by_adam()),
        raises_at_nan=True,
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
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def drawn(key, x):
        return jax.random.normal(key, x.shape, jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)

    return jax.tree.unflatten(treedef, list(map(drawn, keys, leaves)))
