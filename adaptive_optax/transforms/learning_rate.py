"""The learning rate, whose last value is kept in the state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.checks import check_bool
from adaptive_optax._core.entries import entry, stacked, with_entries
from adaptive_optax._core.foresight import Magnitudes
from adaptive_optax._core.overrides import assigned, filled_like, in_effect, replacement
from adaptive_optax._core.precision import scalar_dtype, scaled, widen
from adaptive_optax._core.state_check import SCHEDULED, check_state
from adaptive_optax._core.states import carries_hyperparameters
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Scalar, Scalars
from adaptive_optax._core.values import (
    ScheduleState,
    as_hyperparameter,
    next_schedule_state,
    schedule_state,
    step_of,
    value_at,
)


def _set_learning_rate(state: Any, name: str, value: Any) -> Any:
    field = "learning_rate" if isinstance(state, ScaleByLearningRateState) else "held"
    new, overridden = replacement(name, value, state.given, state.overridden)
    return state._replace(**{field: filled_like(getattr(state, field), new)}, overridden=overridden)


@carries_hyperparameters("learning_rate", set_value=_set_learning_rate)
@with_entries
class ScaleByLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate`.

    Attributes:
        learning_rate: The learning rate of the last step; before the first step, of the first. A value that
            you assign here is used from then on, as with `set_hyperparams`.
        scalars: One array of the following two, so that passing the state to a step is cheap.
        given: The value that the number or schedule gave in the last step.
        overridden: Whether the user set the learning rate.
        schedule_state: The step count of a schedule; empty for a number.
    """

    learning_rate: Scalar
    scalars: Scalars
    schedule_state: ScheduleState

    given = entry("scalars")  # type: jax.Array
    overridden = entry("scalars", is_flag=True)  # type: jax.Array


@carries_hyperparameters("learning_rate", set_value=_set_learning_rate)
@with_entries
class ScaleByHeldLearningRateState(NamedTuple):
    """State of `scale_by_learning_rate` if the learning rate is an array.

    The array usually belongs to another transformation, such as `inject_hyperparams`, whose state has it
    under its name. The field has another name here, so that `optax.tree_utils.tree_get(state,
    "learning_rate")` finds only one place and `tree_set` does not set a copy.

    Attributes:
        held: The learning rate of the last step; before the first step, of the first.
        scalars: One array of the following two.
        given: The array's value in the last step.
        overridden: Whether the user set the learning rate.
    """

    held: Scalar
    scalars: Scalars

    given = entry("scalars")  # type: jax.Array
    overridden = entry("scalars", is_flag=True)  # type: jax.Array

    @property
    def learning_rate(self) -> Scalar:
        """The learning rate of the last step."""
        return self.held


LEARNING_RATE_STATES = (ScaleByLearningRateState, ScaleByHeldLearningRateState)


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule, *, flip_sign: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by the (negative) learning rate.

    Usually the last adaptive link of a chain: $\Delta_t = -\eta_t u_t$. Like optax's function of the
    same name, but the state keeps the learning rate of the last step, where `get_hyperparams` finds it.

    Args:
        learning_rate: $\eta \ge 0$, or a schedule of the step count, which starts at 0.
        flip_sign: Whether to multiply by $-\eta$ (descent) rather than $\eta$.

    Returns:
        The transformation, which ignores `params`. Nothing of a NaN is kept.

    Raises:
        ValueError: If `learning_rate` is negative or not a scalar (at construction), or a leaf is not
            floating.

    State cost: two scalars and a flag, plus a counter for a schedule.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.scale_by_learning_rate(ao.step_decay(0.1, 0.8, every=5))
        >>> state = tx.init(jnp.ones(2))
        >>> updates, state = tx.update(jnp.ones(2), state)
        >>> updates.tolist() == [-jnp.float32(0.1)] * 2, bool(state.learning_rate == jnp.float32(0.1))
        (True, True)
    """
    learning_rate = as_hyperparameter("learning_rate", learning_rate)
    check_bool("flip_sign", flip_sign)
    sign = -1 if flip_sign else 1

    def plain_init(params):
        dtype = scalar_dtype(params)
        schedule = schedule_state(learning_rate)
        # Two arrays, so that the state can be donated.
        value, given = (value_at(learning_rate, step_of(schedule), dtype) for _ in range(2))
        return ScaleByLearningRateState(value, stacked([given, False], dtype), schedule)

    def held_init(params):
        return ScaleByHeldLearningRateState(*plain_init(params)[:2])

    init_fn = held_init if isinstance(learning_rate, jax.Array) else plain_init

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        # A number at init may be an array now, and vice versa.
        is_held = isinstance(state, ScaleByHeldLearningRateState) and not callable(learning_rate)
        own_init = held_init if is_held else plain_init
        check_state("scale_by_learning_rate", state, own_init, "updates", updates, SCHEDULED)
        schedule = getattr(state, "schedule_state", ())
        dtype = state.scalars.dtype
        given = value_at(learning_rate, step_of(schedule), dtype)
        current = assigned("learning_rate", state.learning_rate, state.given)
        value, overridden, given = in_effect(current, state.given, state.overridden, given)
        scalars = stacked([given, overridden], dtype)
        if isinstance(state, ScaleByLearningRateState):
            state = ScaleByLearningRateState(value, scalars, next_schedule_state(schedule))
        else:
            state = ScaleByHeldLearningRateState(value, scalars)
        return scaled(widen(updates), sign * value), state

    return transformation("scale_by_learning_rate", init_fn, update_fn, growth=_growth)


def _growth(given: Magnitudes, state: Any) -> tuple[jax.Array, jax.Array]:
    return given.updates * jnp.abs(state.learning_rate), given.state
