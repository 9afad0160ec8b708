"""The learning rate, with the value that was used kept in the state."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._checks import check_bool, check_inexact, check_scalar, check_state
from adaptive_optax._precision import incremented, scalar_dtype, scaled, value_at, widen


class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`. The scalars are float32, or float64 if a parameter is.

    Attributes:
        count: Number of steps taken, int32 scalar.
        learning_rate: The learning rate of the last step; before the first step, of the first.
        override: A learning rate that stands for the given one; negative for none (not NaN, at which
            `jax_debug_nans` would stop).
    """

    count: jax.Array
    learning_rate: jax.Array
    override: jax.Array

    hyperparameters = ("learning_rate",)  # not a field: it has no annotation


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule, *, flip_sign: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by the (negative) learning rate.

    The last adaptive link of a chain: :math:`\Delta_t = -\eta_t u_t`. optax's function of the same name, with
    the learning rate of the last step in the state, where `get_hyperparams` finds it.

    Args:
        learning_rate: :math:`\eta \ge 0`, or a schedule of the step count, which starts at 0.
        flip_sign: Whether to multiply by :math:`-\eta` (descent) rather than :math:`\eta`.

    The number may be a JAX scalar or a tracer, so that a sweep is a `vmap`; a tracer's range cannot be
    checked.

    Returns:
        The transformation. It returns float32 (or wider) updates; `params` and extra arguments are ignored.

    Raises:
        ValueError: If `learning_rate` is negative or no scalar (at construction), or a leaf is not floating.

    State cost: three scalars.

    Example:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_learning_rate(ao.step_decay(0.1, 0.8, every=5))
        >>> state = tx.init(jnp.ones(2))
        >>> updates, state = tx.update(jnp.ones(2), state)
        >>> updates.tolist() == [-jnp.float32(0.1)] * 2, bool(state.learning_rate == jnp.float32(0.1))
        (True, True)
    """
    check_scalar("learning_rate", learning_rate, "[0, inf)", schedule=True)
    check_bool("flip_sign", flip_sign)
    sign = -1 if flip_sign else 1

    def init_fn(params):
        check_inexact("scale_by_learning_rate", "params", params)
        dtype = scalar_dtype(params)
        count = jnp.zeros((), jnp.int32)
        return ScaleByLearningRateState(count, value_at(learning_rate, count, dtype), jnp.full((), -1, dtype))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state("scale_by_learning_rate", state, ScaleByLearningRateState)
        check_inexact("scale_by_learning_rate", "updates", updates)
        given = value_at(learning_rate, state.count, state.learning_rate.dtype)
        value = jnp.where(state.override < 0, given, state.override)
        return scaled(widen(updates), sign * value), ScaleByLearningRateState(
            incremented(state.count), value, state.override
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
