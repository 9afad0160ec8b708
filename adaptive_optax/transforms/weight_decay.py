"""Decoupled weight decay, with three kinds of coupling."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_optax._core.checks import check_choice, check_params, check_same_tree
from adaptive_optax._core.foresight import Magnitudes
from adaptive_optax._core.paths import masked_leaves
from adaptive_optax._core.precision import scalar_dtype, scale, widen
from adaptive_optax._core.state_check import SCHEDULED, check_state
from adaptive_optax._core.states import carries_hyperparameters
from adaptive_optax._core.transformation import transformation
from adaptive_optax._core.trees import Mask, Scalar, by_leaf
from adaptive_optax._core.values import (
    ScheduleState,
    as_hyperparameter,
    next_schedule_state,
    schedule_state,
    step_of,
    value_at,
)

Coupling = Literal["learning_rate", "schedule", "independent"]
"""What the decay is multiplied by; see `add_decoupled_weight_decay`."""


@carries_hyperparameters("weight_decay")
class AddDecoupledWeightDecayState(NamedTuple):
    """State of `add_decoupled_weight_decay`.

    Attributes:
        weight_decay: The weight decay of the last step, without the schedule's factor.
        schedule_state: The step count of schedules; empty for numbers.
    """

    weight_decay: Scalar
    schedule_state: ScheduleState


def add_decoupled_weight_decay(
    weight_decay: optax.ScalarOrSchedule,
    *,
    coupling: Coupling = "learning_rate",
    schedule: optax.ScalarOrSchedule | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the parameters directly, without adaptive scaling.

    Its place in the chain depends on the coupling. With $\theta$ the parameters, $\lambda$
    `weight_decay`, u the direction and $\Delta = -\eta_t u$ the update:

    | `coupling`        | place                    | returns                              |
    | ----------------- | ------------------------ | ------------------------------------ |
    | `"learning_rate"` | before the learning rate | $u + \lambda\theta$ (PyTorch, optax) |
    | `"schedule"`      | after the learning rate  | $\Delta - s_t\lambda\theta$          |
    | `"independent"`   | after the learning rate  | $\Delta - \lambda\theta$             |

    With "learning_rate" a step multiplies the parameters by $1 - \eta_t\lambda$, so a new learning rate
    needs a new $\lambda$. With the other two it does not. "schedule" is the algorithm of Loshchilov and
    Hutter, in which $s_t$ is the schedule without its peak value, between 0 and 1.

    Args:
        weight_decay: $\lambda \ge 0$, or a schedule. Dimensionless; with "learning_rate" per unit
            of the learning rate, typically 1e-4 to 0.1.
        coupling: `"learning_rate"`, `"schedule"` or `"independent"`.
        schedule: $s_t$, a schedule or a number >= 0; required for `coupling="schedule"` and only used
            with it.
        mask: Which leaves decay: a tree of bools like the parameters or a prefix of it, or a function from
            the parameters to one. None for all leaves.

    Returns:
        The transformation; `update` needs `params`. Nothing of a NaN is kept.

    Raises:
        ValueError: If an argument is out of range or not used by the coupling (at construction), a leaf is
            not floating or the mask does not fit (at init), or `params` is missing or does not match the
            updates.

    State cost: two scalars.

    Examples:
        >>> import adaptive_optax as ao, jax.numpy as jnp
        >>> tx = ao.add_decoupled_weight_decay(0.1, mask=lambda params: {"w": True, "b": False})
        >>> params = {"w": jnp.ones(1), "b": jnp.ones(1)}
        >>> updates, _ = tx.update({"w": jnp.zeros(1), "b": jnp.zeros(1)}, tx.init(params), params)
        >>> [round(float(updates[name][0]), 3) for name in "wb"]
        [0.1, 0.0]

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2, line 12.
    """
    weight_decay = as_hyperparameter("weight_decay", weight_decay)
    check_choice("coupling", coupling, ("learning_rate", "schedule", "independent"))
    if coupling == "schedule":
        if schedule is None:
            raise ValueError(
                "coupling='schedule' needs schedule= (decay_schedule= in adamw), the factor of each step."
            )
        schedule = as_hyperparameter("schedule", schedule, owner="add_decoupled_weight_decay")
    elif schedule is not None:
        raise ValueError(
            "schedule= (decay_schedule= in adamw) is used by coupling='schedule' only, "
            f"got it with coupling={coupling!r}."
        )

    def init_fn(params):
        masked_leaves(mask, params)
        steps = schedule_state(weight_decay, schedule)
        value = value_at(weight_decay, step_of(steps), scalar_dtype(params))
        return AddDecoupledWeightDecayState(value, steps)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_params("add_decoupled_weight_decay", params)
        check_same_tree("add_decoupled_weight_decay", "updates", updates, "params", params)
        check_state("add_decoupled_weight_decay", state, init_fn, "params", params, SCHEDULED)
        dtype = state.weight_decay.dtype
        count = step_of(state.schedule_state)
        value = value_at(weight_decay, count, dtype)
        factor = value if coupling == "learning_rate" else -value
        if coupling == "schedule":
            factor *= value_at(schedule, count, dtype)
        leaves, treedef = jax.tree.flatten(widen(updates))
        decaying = zip(leaves, jax.tree.leaves(widen(params)), masked_leaves(mask, params), strict=True)
        leaves = [_decayed(factor, u, theta) if decays else u for u, theta, decays in decaying]
        state = AddDecoupledWeightDecayState(value, next_schedule_state(state.schedule_state))
        return jax.tree.unflatten(treedef, leaves), state

    growth = _growth if coupling != "schedule" else None  # the schedule's factor is not in the state
    return transformation("add_decoupled_weight_decay", init_fn, update_fn, growth=growth)


def _growth(given: Magnitudes, state: AddDecoupledWeightDecayState) -> tuple[jax.Array, jax.Array]:
    return given.updates + jnp.abs(state.weight_decay) * given.params, given.state


@by_leaf(like="u")
def _decayed(factor: jax.Array, u: jax.Array, theta: jax.Array) -> jax.Array:
    return u + scale(theta, factor)
