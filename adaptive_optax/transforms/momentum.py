"""Momentum: a decaying sum of the updates, in float32 whatever the parameters' dtype."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_optax._core.checks import check_bool, check_real, check_same_tree
from adaptive_optax._core.foresight import ROUNDED, Magnitudes, accepted, holding, if_accepted
from adaptive_optax._core.precision import as_wide_as, scalar_dtype, scale, widen
from adaptive_optax._core.state_check import SCHEDULED, Settings, check_state
from adaptive_optax._core.states import carries_hyperparameters
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Scalar, Updates
from adaptive_optax._core.values import (
    ScheduleState,
    as_hyperparameter,
    next_schedule_state,
    schedule_state,
    step_of,
    value_at,
)
from adaptive_optax.moments.formats import as_storage
from adaptive_optax.moments.storage import as_nearest


@carries_hyperparameters("momentum")
class TraceState(NamedTuple):
    """State of `trace`.

    Attributes:
        trace: The decaying sum, like the parameters, float32 or wider, or `accumulator_dtype`.
        momentum: The decay of the last step.
        schedule_state: The step count of a schedule; empty for a number.
    """

    trace: Updates
    momentum: Scalar
    schedule_state: ScheduleState


_SETTINGS = {"trace": Settings(form="accumulator_dtype"), **SCHEDULED}


def trace(
    decay: optax.ScalarOrSchedule, nesterov: bool = False, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Accumulates updates into a decaying sum.

    Like optax's function of the same name, but in float32 or wider (optax's state takes the dtype of the last
    gradients) and with a decay that may be a schedule. Unlike Adam's first moment, the sum is not an average:
    its length grows to $1/(1-\mu)$ times the length of the updates.

    $$
    t_k = g_k + \mu_k t_{k-1}, \qquad u_k = t_k \quad\text{or, with nesterov,}\quad g_k + \mu_k t_k
    $$

    Args:
        decay: $\mu$ in [0, 1), or a schedule of the step count.
        nesterov: Whether to use Nesterov momentum.
        accumulator_dtype: The dtype in which the sum is stored, rounded to nearest; None for float32.

    A huge update fades by $\mu$ per step. A NaN stays in the sum for good; `reject_nonfinite`
    keeps it out.

    Returns:
        The transformation, which ignores `params`.

    Raises:
        ValueError: If an argument is out of range (at construction), a leaf is not floating (at init), or the
            updates' tree differs from the state's (at update).

    State cost: one float32 copy of the parameters.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.trace(0.5)
        >>> state = tx.init(jnp.zeros(1))
        >>> for _ in range(3):
        ...     updates, state = tx.update(jnp.ones(1), state)
        >>> updates.tolist()
        [1.75]

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum", equations 1-4.
    """
    decay = as_hyperparameter("decay", decay)
    check_bool("nesterov", nesterov)
    storage = as_storage(as_nearest("accumulator_dtype", accumulator_dtype), "accumulator_dtype", decay=decay)

    def init_fn(params):
        schedule = schedule_state(decay)
        momentum = value_at(decay, step_of(schedule), scalar_dtype(params))
        return TraceState(storage.init(params, "mu"), momentum, schedule)

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state("trace", state, init_fn, "updates", updates, _SETTINGS)
        momentum = value_at(decay, step_of(state.schedule_state), state.momentum.dtype)
        g, total = widen(updates), storage.decode(state.trace)
        check_same_tree("trace", "updates", g, "the state", total)
        check_real("trace", "updates", g, "the state", total)

        total = as_wide_as(total, g)

        def decayed_sum(g, t):
            return g + scale(t, momentum)

        total = jax.tree.map(lambda g, t: if_accepted(accepted(), decayed_sum(g, t), t), g, total)
        updates = jax.tree.map(decayed_sum, g, total) if nesterov else total
        schedule = next_schedule_state(state.schedule_state)
        # Any rounding is to nearest, so the count does not matter.
        stored = storage.encode(state.trace, total, count=step_of(schedule), role="mu")
        if storage.only_rounds:
            holding(stored)
        return updates, TraceState(stored, momentum, schedule)

    return transformation("trace", init_fn, update_fn, growth=_growth if storage.only_rounds else None)


def _growth(given: Magnitudes, state: TraceState) -> tuple[jax.Array, jax.Array]:
    """Bounds on the direction and on the sum, from the recursion; with nesterov it is applied twice."""
    total = ROUNDED * (given.updates + jnp.abs(state.momentum) * given.state)
    return given.updates + total, total
